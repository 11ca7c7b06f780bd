"""Lightning attention: linear attention with a fixed exponential decay, joint norm and output gate (model.md 4)."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mmx_jax.config import ModelConfig
from mmx_jax.model.dot import DotPolicy, Weight
from mmx_jax.model.layout import LayerCache, Layout
from parallel import lasp, local


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Standard ALiBi slopes, float64 [N]: 2^(-8(h+1)/N); other head counts than powers of two interleave two tables."""
    if num_heads & (num_heads - 1) == 0:
        return 2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads)
    smaller = 2 ** math.floor(math.log2(num_heads))
    return np.concatenate([alibi_slopes(smaller), alibi_slopes(2 * smaller)[::2][: num_heads - smaller]])


def layer_slopes(num_heads: int, num_layers: int) -> np.ndarray:
    """Decay rates of every layer, float32 [L, N]: ALiBi times 1 - l/(L-1) + 1e-5, l over ALL layers (INV-09)."""
    depth = np.arange(num_layers, dtype=np.float64) / max(num_layers - 1, 1)
    return ((1.0 - depth + 1e-5)[:, None] * alibi_slopes(num_heads)).astype(np.float32)


class LightningAttention(nnx.Module):
    """One lightning attention layer (or a stack of them); ignores positions (INV-14)."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Weight]):
        self.dot = DotPolicy(config.compute_dtype)
        self.norm_eps = config.lightning_norm_eps
        self.qkv = nnx.Param(params["qkv"])
        self.norm = nnx.Param(params["norm"])
        self.out = nnx.Param(params["out"])
        self.low_rank = config.gate_rank is not None
        if self.low_rank:
            self.gate_down = nnx.Param(params["gate_down"])
            self.gate_up = nnx.Param(params["gate_up"])
        else:
            self.gate = nnx.Param(params["gate"])

    def project(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        """q, k and v, each [B, T, N, H] after SiLU (INV-11), from the fused per-head weight (INV-12)."""
        qkv = jax.nn.silu(self.dot.einsum("BTD,DNCH->BTNCH", x, self.qkv[...]))
        return qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]

    def gate_logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        """Logits of the output gate, from the same normed input as q, k and v."""
        if self.low_rank:
            low = self.dot.einsum("BTD,DR->BTR", x, self.gate_down[...])
            return self.dot.einsum("BTR,RNH->BTNH", low, self.gate_up[...])
        return self.dot.einsum("BTD,DNH->BTNH", x, self.gate[...])

    def finish(self, mixed: Float[Array, "B T N H"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Joint norm over all heads, sigmoid gate, output projection (INV-13)."""
        gated = local.norm_gate(mixed, self.gate_logits(x), self.norm[...], self.norm_eps)
        return self.dot.einsum("BTNH,NHD->BTD", gated, self.out[...])

    def __call__(
        self,
        x: Float[Array, "B T D"],
        slopes: Float[Array, " N"],
        layout: Layout,
        cached: LayerCache = (),
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Attention output and, when `cached` holds a state, the state after each row's last real token (fp32)."""
        q, k, v = self.project(x)
        if not cached:
            return self.finish(_mixed(q, k, v, slopes, layout), x), ()
        (state,) = cached
        if x.shape[1] > 1:
            mixed, state = local.continued_lightning_attention(q, k, v, slopes, layout.segment_ids, state)
        else:
            step, new = local.decode_step(q[:, 0], k[:, 0], v[:, 0], state, slopes)
            mixed, state = step[:, None], jnp.where(layout.real[:, :, None, None], new, state)
        return self.finish(mixed, x), (state,)


def _mixed(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    slopes: Float[Array, " N"],
    layout: Layout,
) -> Float[Array, "B T N H"]:
    """Attention of whole packed rows, or of rows that are split over the mesh."""
    if layout.split is None or layout.passage is None:
        return local.lightning_attention(q, k, v, slopes, layout.segment_ids)
    return lasp.lightning_attention(q, k, v, slopes, layout.segment_ids, layout.passage, order=layout.split.order)
