"""The text model: embed, backbone, head."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from mmx_jax.config import IN_ORDER, LOSSLESS, ExpertTransport, ModelConfig, SequenceSplit
from mmx_jax.model.block import Block
from mmx_jax.model.cache import Cache
from mmx_jax.model.dot import DotPolicy, Weight
from mmx_jax.model.layout import LayerCache, Layout, cached_layout, packed_layout
from mmx_jax.model.lightning import layer_slopes
from mmx_jax.model.moe import RouterStats, balance_loss
from mmx_jax.model.norm import rms_norm
from mmx_jax.model.plan import Section, layer_plan
from pallas_kernels.softmax import RESULTS as SOFTMAX_RESULTS
from parallel.lasp import ENTERING_STATE
from parallel.rows import EXPERT_RESULTS
from parallel.sharding import constrain


@partial(jax.tree_util.register_dataclass, data_fields=("aux_loss", "load", "dropped", "lost"), meta_fields=())
@dataclass(frozen=True)
class Aux:
    """What the layers report beside the hidden states; all fp32, over the real tokens of the batch."""

    aux_loss: Float[Array, ""]
    """Load-balancing loss without its coefficient (`moe.balance_loss`)."""
    load: Float[Array, "L E"]
    """Share of each layer's routed slots that each expert receives; rows sum to 1."""
    dropped: Float[Array, " L"]
    """Share of each layer's routed slots over capacity."""
    lost: Float[Array, " L"]
    """Share of each layer's routed slots that found no place on the way to their expert."""


KEPT = (ENTERING_STATE, SOFTMAX_RESULTS)
"""Checkpoint names that every policy keeps: lightning's states, small and slow to gather over the sequence axis, and
softmax attention's output and log-sum-exp, N * H of a token for work that grows with the length."""
REMAT_POLICIES = {
    "layer": jax.checkpoint_policies.save_only_these_names(*KEPT),
    "attention": jax.checkpoint_policies.save_only_these_names("attention", *KEPT),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(*KEPT),
    ),
    "experts": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(EXPERT_RESULTS, *KEPT),
    ),
}
"""What the backward pass keeps of a layer; "none" keeps everything."""


class TextModel(nnx.Module):
    """A MiniMax-01 shaped language model over a flat dict of parameters (`spec.parameter_spec`)."""

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Weight],
        *,
        remat: str = "none",
        transport: ExpertTransport = LOSSLESS,
    ):
        self.config = config
        self.remat = remat
        self.embedding = nnx.Param(params["embedding"])
        self.final_norm = nnx.Param(params["final_norm"])
        self.head_weight = nnx.Param(params["head"])
        self.sections: nnx.List[nnx.List[Block]] = nnx.List()
        for s, section in enumerate(layer_plan(config)):
            blocks: nnx.List[Block] = nnx.List()
            for r, run in enumerate(section.runs):
                prefix = f"layers/{s}/{r}/"
                part = {path.removeprefix(prefix): w for path, w in params.items() if path.startswith(prefix)}
                blocks.append(Block(config, run.kind, part, transport))
            self.sections.append(blocks)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding, unscaled (INV-30), in the compute dtype."""
        with jax.named_scope("embed"):
            table = DotPolicy(self.config.compute_dtype).cast(self.embedding[...])
            rows = _rows(table.shape[0], constrain(table, "vocab", None), tokens)
            return constrain(rows, "batch", "sequence", None)

    def backbone(
        self,
        embeddings: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: Cache | None = None,
        *,
        train: bool = False,
        split: SequenceSplit = IN_ORDER,
    ) -> tuple[Float[Array, "B T D"], Aux, Cache | None]:
        """All layers and the final norm.

        Args:
          embeddings: [B, T, D], of tokens or of anything else.
          positions: absolute positions; only softmax layers read them.
          segment_ids: 0 is padding. Without a cache, a new id starts a new document: states reset, attention is masked.
            With a cache, the real tokens of a row continue that row.
          cache: earlier tokens, or None.
          train: whether expert capacity applies.
          split: without a cache, how the tokens lie on the mesh's sequence axis (`parallel.stripes.arrange`); the
            default is their natural order.

        Returns:
          Hidden states after the final norm, what the layers report, and the cache with the new tokens (None without).
        """
        c = self.config
        if cache is None:
            layout = packed_layout(positions, segment_ids, c.rotary_dim, c.rope_base, split)
        else:
            layout = cached_layout(positions, segment_ids, cache.lengths, c.rotary_dim, c.rope_base)
        x = DotPolicy(c.compute_dtype).cast(embeddings)
        all_stats: list[RouterStats] = []
        new_layers: dict[str, LayerCache] = {}
        for s, section in enumerate(layer_plan(c)):
            x, stats, entries = self._section(s, section, x, layout, cache, train=train)
            all_stats.append(stats)
            new_layers |= {f"{s}/{r}": entry for r, entry in enumerate(entries)}
        with jax.named_scope("final_norm"):
            hidden = rms_norm(x, self.final_norm[...], c.norm_eps)
        return hidden, self._aux(all_stats), self._updated(cache, new_layers, segment_ids)

    def head(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """fp32 logits from an fp32 matmul (INV-40)."""
        with jax.named_scope("head"):
            weight = self.head_weight[...].astype(jnp.float32)
            return jnp.einsum("BTD,DV->BTV", hidden.astype(jnp.float32), weight, precision=jax.lax.Precision.HIGHEST)

    def _section(
        self, index: int, section: Section, x: Array, layout: Layout, cache: Cache | None, *, train: bool
    ) -> tuple[Array, RouterStats, list[LayerCache]]:
        """Runs one section: a scan over groups of scans over runs. Statistics come back stacked in layer order."""
        slopes_table = layer_slopes(self.config.num_heads, self.config.num_layers)
        runs = []
        for r, run in enumerate(section.runs):
            layers = np.array([[section.layer(run, g, i) for i in range(run.length)] for g in range(section.groups)])
            runs.append((self.sections[index][r], jnp.asarray(slopes_table[layers]), _cached(cache, f"{index}/{r}")))

        def layer(x: Array, inputs: tuple[Block, Array, LayerCache]) -> tuple[Array, tuple[RouterStats, LayerCache]]:
            block, slopes, cached = inputs
            x, stats, cached = block(x, slopes, layout, cached, train=train)
            return constrain(x, "batch", "sequence", None), (stats, cached)

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)

        def group(x: Array, inputs: list) -> tuple[Array, tuple[RouterStats, list[LayerCache]]]:
            outputs = []
            for stacked in inputs:
                x, out = jax.lax.scan(layer, x, stacked)
                outputs.append(out)
            stats = jax.tree.map(lambda *parts: jnp.concatenate(parts), *[stats for stats, _ in outputs])
            return x, (stats, [cached for _, cached in outputs])

        x, (stats, entries) = jax.lax.scan(group, x, runs)
        return x, jax.tree.map(lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]), stats), entries

    def _aux(self, sections: list[RouterStats]) -> Aux:
        stats = jax.tree.map(lambda *parts: jnp.concatenate(parts), *sections)
        loss = balance_loss(stats.fraction, stats.probability, self.config.aux_loss)
        return Aux(loss, stats.fraction / self.config.experts_per_token, stats.dropped, stats.lost)

    def _updated(
        self, cache: Cache | None, layers: dict[str, LayerCache], segment_ids: Int[Array, "B T"]
    ) -> Cache | None:
        if cache is None:
            return None
        return replace(
            cache,
            lengths=cache.lengths + (segment_ids != 0).sum(axis=1, dtype=jnp.int32),
            states={name: layers[name][0] for name in cache.states},
            keys={name: layers[name][0] for name in cache.keys},
            values={name: layers[name][1] for name in cache.values},
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(vocab: int, table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of the table, whose gradient sums in fp32 and is rounded once.

    Summed in bf16, a frequent token's gradient would stall at 256 times its addends, and GPUs, which add bf16 in memory
    by compare and swap, would spend half of a small model's step on it.
    """
    return table[tokens]


def _rows_forward(vocab: int, table: Array, tokens: Array) -> tuple[Array, Array]:
    return table[tokens], tokens


def _rows_backward(vocab: int, tokens: Array, gradient: Array) -> tuple[Array, None]:
    total = jnp.zeros((vocab, gradient.shape[-1]), jnp.float32)
    return total.at[tokens].add(gradient.astype(jnp.float32)).astype(gradient.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


def _cached(cache: Cache | None, name: str) -> LayerCache:
    if cache is None:
        return ()
    return (cache.states[name],) if name in cache.states else (cache.keys[name], cache.values[name])
