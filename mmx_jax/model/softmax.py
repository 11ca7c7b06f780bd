"""Softmax attention with grouped key/value heads and partial RoPE (model.md 5)."""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mmx_jax.config import ModelConfig
from mmx_jax.model.dot import DotPolicy, Weight
from mmx_jax.model.layout import LayerCache, Layout
from mmx_jax.model.rope import rotate
from parallel import context, local


def append(
    cached: Float[Array, "B S K H"], new: Float[Array, "B T K H"], ends: Int[Array, "B T"]
) -> Float[Array, "B S K H"]:
    """Writes each new entry at index `ends - 1` of its row; entries whose end is 0 (padding) are not written."""
    rows = jnp.arange(cached.shape[0], dtype=jnp.int32)[:, None]
    index = jnp.where(ends > 0, ends - 1, cached.shape[1])
    return cached.at[rows, index].set(new.astype(cached.dtype), mode="drop")


class SoftmaxAttention(nnx.Module):
    """One softmax attention layer (or a stack of them); query head n reads key/value head n // (N // K) (INV-21)."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Weight]):
        self.dot = DotPolicy(config.compute_dtype)
        self.scale = config.head_dim**-0.5
        self.query = nnx.Param(params["query"])
        self.key = nnx.Param(params["key"])
        self.value = nnx.Param(params["value"])
        self.out = nnx.Param(params["out"])

    def __call__(
        self, x: Float[Array, "B T D"], slopes: Float[Array, " N"], layout: Layout, cached: LayerCache = ()
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Attention output and, when `cached` holds keys and values, these with the new ones appended.

        There is no decay: the slopes are not read.
        """
        del slopes
        q = rotate(self.dot.einsum("BTD,DNH->BTNH", x, self.query[...]), layout.rotation)
        k = rotate(self.dot.einsum("BTD,DKH->BTKH", x, self.key[...]), layout.rotation)
        v = self.dot.einsum("BTD,DKH->BTKH", x, self.value[...])
        if cached:
            keys, values = cached
            cached = (append(keys, k, layout.k_end), append(values, v, layout.k_end))
            k, v = (entries.astype(q.dtype) for entries in cached)
        if layout.split is None:
            mixed = local.softmax_attention(q, k, v, layout.k_start, layout.k_end, scale=self.scale)
        else:
            order, exchange = layout.split.order, layout.split.exchange
            mixed = context.softmax_attention(
                q, k, v, layout.k_start, layout.k_end, scale=self.scale, order=order, exchange=exchange
            )
        return self.dot.einsum("BTNH,NHD->BTD", mixed, self.out[...]), cached
