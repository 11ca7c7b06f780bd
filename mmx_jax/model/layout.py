"""What all layers need to know of a batch of rows, computed once per forward pass."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mmx_jax.config import IN_ORDER, SequenceSplit
from mmx_jax.model.rope import Rotation, rotation
from parallel.lasp import Passage, passage
from parallel.stripes import check_length, on_whole_rows, sequence_ranks

LayerCache = tuple[Array, ...]
"""One layer's part of the cache: a lightning state, keys and values, or nothing."""


class Layout(NamedTuple):
    """Segments and positions of the tokens of a forward pass."""

    segment_ids: Int[Array, "B T"]
    """0 is padding; other ids change where a document ends."""
    k_start: Int[Array, "B T"]
    """First key that each query may see, counted in the whole row in natural order."""
    k_end: Int[Array, "B T"]
    """One past the last key that each query may see; equal to `k_start` for padding."""
    rotation: Rotation
    tokens: Int[Array, ""]
    """Number of tokens that are not padding."""
    split: SequenceSplit | None = None
    """How the tokens lie on the ranks of the mesh's sequence axis; None where each rank holds whole rows."""
    passage: Passage | None = None
    """With `split`: which lightning states pass from stripe to stripe."""

    @property
    def real(self) -> Bool[Array, "B T"]:
        """Tokens that are not padding."""
        return self.segment_ids != 0


def packed_layout(
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    rotary_dim: int,
    rope_base: float,
    split: SequenceSplit = IN_ORDER,
) -> Layout:
    """Layout of rows that hold whole segments: each query sees its own segment up to itself (INV-36).

    Padding may stand before, between and after segments, not inside one. On a mesh with a sequence axis the tokens lie
    as `split` says (`parallel.stripes.arrange`), and what depends on neighbours is computed from whole rows.

    Raises:
      ShardingError: T does not divide into the stripes of the split.
    """
    turned, tokens = rotation(positions, rotary_dim, rope_base), (segment_ids != 0).sum(dtype=jnp.int32)
    if sequence_ranks() == 1:
        return Layout(segment_ids, *_key_ranges(segment_ids), turned, tokens)
    check_length(segment_ids.shape[1], split.order)
    start, end = on_whole_rows(_key_ranges, segment_ids, split.order)
    return Layout(segment_ids, start, end, turned, tokens, split, passage(segment_ids, split.order))


def _key_ranges(segment_ids: Int[Array, "B S"]) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """First and one past the last key that each query of packed rows sees."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    start = jax.lax.cummax(jnp.where(segment_ids != before, index, 0), axis=1)
    return start, jnp.where(segment_ids != 0, index + 1, start)


def cached_layout(
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    rotary_dim: int,
    rope_base: float,
) -> Layout:
    """Layout of new tokens that continue cached rows: each query sees its whole row up to itself."""
    real = (segment_ids != 0).astype(jnp.int32)
    end = (lengths[:, None] + jnp.cumsum(real, axis=1)) * real
    turned = rotation(positions, rotary_dim, rope_base)
    return Layout(real, jnp.zeros_like(end), end, turned, real.sum(dtype=jnp.int32))
