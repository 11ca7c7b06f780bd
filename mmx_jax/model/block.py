"""One layer: attention and FFN, each with its norm, in DeepNorm's "postnorm" or in pre-norm form (model.md 3)."""

from collections.abc import Mapping

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mmx_jax.config import LIGHTNING, LOSSLESS, ExpertTransport, ModelConfig
from mmx_jax.model.dot import Weight
from mmx_jax.model.layout import LayerCache, Layout
from mmx_jax.model.lightning import LightningAttention
from mmx_jax.model.moe import Experts, RouterStats, SwiGLU
from mmx_jax.model.norm import rms_norm
from mmx_jax.model.softmax import SoftmaxAttention


def _part(params: Mapping[str, Weight], prefix: str) -> dict[str, Weight]:
    return {path.removeprefix(prefix): value for path, value in params.items() if path.startswith(prefix)}


class Block(nnx.Module):
    """One layer (or a stack of layers of one kind)."""

    def __init__(
        self,
        config: ModelConfig,
        kind: str,
        params: Mapping[str, Weight],
        transport: ExpertTransport = LOSSLESS,
    ):
        self.kind = kind
        self.deepnorm = config.norm == "deepnorm"
        self.eps = config.norm_eps
        self.alpha, self.beta = config.alpha(kind), getattr(config, f"{kind}_beta")
        self.ffn_alpha, self.ffn_beta = config.alpha("ffn"), config.ffn_beta
        self.attention_norm = nnx.Param(params["attention_norm"])
        self.ffn_norm = nnx.Param(params["ffn_norm"])
        attention = _part(params, "attention/")
        self.attention: LightningAttention | SoftmaxAttention = (
            LightningAttention(config, attention) if kind == LIGHTNING else SoftmaxAttention(config, attention)
        )
        self.ffn = (Experts if config.num_experts else SwiGLU)(config, _part(params, "ffn/"), transport)

    def __call__(
        self, x: Float[Array, "B T D"], slopes: Float[Array, " N"], layout: Layout, cached: LayerCache, *, train: bool
    ) -> tuple[Float[Array, "B T D"], RouterStats, LayerCache]:
        """The layer's output, its routing statistics, and its part of the cache (empty in, empty out)."""
        with jax.named_scope(f"{self.kind}_attention"):
            normed = rms_norm(x, self.attention_norm[...], self.eps)
            mixed, cached = self.attention(normed, slopes, layout, cached)
            mixed = checkpoint_name(mixed, "attention")
            x = self.alpha * (normed if self.deepnorm else x) + self.beta * mixed
        with jax.named_scope("ffn"):
            order = "contiguous" if layout.split is None else layout.split.order
            normed = rms_norm(x, self.ffn_norm[...], self.eps)
            mixed, stats = self.ffn(normed, layout.real, layout.tokens, train=train, order=order)
            x = self.ffn_alpha * (normed if self.deepnorm else x) + self.ffn_beta * mixed
        return x, stats, cached
