"""What the Hopper kernels must know about packed rows: ages and ids by token, boundaries by chunk.

Two small Triton kernels, imported at the first call, find it out where they can be launched, and else XLA.
"""

import enum

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

from pallas_kernels import triton_launch
from pallas_kernels.lightning.segments import canonical_segment_ids
from pallas_kernels.triton_launch import launch as _launch

Description = Int[Array, "B chunks entries"]

BLOCK, WARPS = 1024, 4
"""Tokens and warps of a program of the Triton kernels."""
MOST_BLOCKS = 1024
"""Blocks of a row whose summaries one program reads; blocks of longer rows are larger."""
LONGEST = 2**22
"""Tokens of a row that they are made for: in longer ones registers spill."""
MOST_ROWS = 2**16 - 1
"""What the second dimension of a CUDA grid may have."""

AGES = 128
"""A token's entry holds its age in the chunk, less than this, and this times its place among the chunk's segments."""

FACTS = 32
"""Entries that a chunk's facts take, filled up to the 128 bytes that a copy to shared memory is aligned to."""


class Fact(enum.IntEnum):
    """Where each fact stands in a chunk's description, from the first of its last `FACTS` entries.

    A state belongs to the segment it may flow into. Ascending scans carry that of the last real token seen, descending
    scans that of the next real token in reading order (the last token's at the row's end); before any token it is 1.
    """

    PLAIN = 0  # 1 when the chunk and the states at both of its ends belong to one segment
    AGE_BEFORE = 1
    AGE_AFTER = 2
    ENTER_ASCENDING = 3
    LEAVE_ASCENDING = 4
    ENTER_DESCENDING = 5
    LEAVE_DESCENDING = 6


def describe(segment_ids: Int[Array, "B T"], chunk: int) -> Description:
    """Describes packed rows chunk by chunk.

    Args:
        segment_ids: [B, T] integers as `lightning_attention` takes them.
        chunk: tokens per chunk C; a last partial chunk is filled with padding.

    Returns:
        [B, chunks, C + FACTS] int32: an entry per token, then the facts. A token's entry is its age, the real tokens of
        the chunk up to and including it, plus `AGES` times its place: 0 for padding, 1 for the segment that an
        ascending state enters with, 2 for the next.
    """
    batch, length = segment_ids.shape
    suits = np.can_cast(segment_ids.dtype, np.int32) and length <= LONGEST and batch <= MOST_ROWS
    if suits and triton_launch.obstacle(()) is None:
        return describe_by_triton(segment_ids, chunk)
    return describe_by_xla(segment_ids, chunk)


def describe_by_triton(
    segment_ids: Int[Array, "B T"], chunk: int, block: int = BLOCK, warps: int = WARPS
) -> Description:
    """`describe` in two launches, of segment ids that int32 holds; `block` is a power of two times the chunk."""
    from pallas_kernels.lightning import mosaic_gpu_segments_kernels as kernels

    batch, length = segment_ids.shape
    while block * MOST_BLOCKS < length:
        block *= 2
    blocks, chunks = pl.cdiv(length, block), pl.cdiv(length, chunk)
    ids = segment_ids.astype(jnp.int32)
    sizes = {"LENGTH": length, "BLOCK": block, "BLOCKS": blocks}
    (summaries,) = _launch(
        kernels.summary_kernel,
        (ids,),
        (jax.ShapeDtypeStruct((batch, len(kernels.Summary), blocks), jnp.int32),),
        (blocks, batch),
        sizes,
        warps=warps,
    )
    (description,) = _launch(
        kernels.description_kernel,
        (ids, summaries),
        (jax.ShapeDtypeStruct((batch, chunks, chunk + FACTS), jnp.int32),),
        (blocks, batch),
        {**sizes, "ROW": pl.next_power_of_2(blocks), "CHUNK": chunk, "CHUNKS": chunks},
        warps=warps,
    )
    return description


def describe_by_xla(segment_ids: Int[Array, "B T"], chunk: int) -> Description:
    """`describe` as the definition has it: on the canonical ids of `implementation.py`."""
    batch, length = segment_ids.shape
    chunks = -(-length // chunk)
    ids = jnp.pad(canonical_segment_ids(segment_ids), ((0, 0), (0, chunks * chunk - length)))
    ages = jnp.cumsum(ids > 0, axis=1, dtype=jnp.int32)
    last = jnp.maximum(lax.cummax(ids, axis=1), 1)
    upcoming = lax.cummin(jnp.where(ids > 0, ids, last[:, -1:]), axis=1, reverse=True)

    def ends(x: Int[Array, "B T"], before: Int[Array, "B 1"]) -> tuple[Int[Array, "B chunks"], Int[Array, "B chunks"]]:
        after = x[:, chunk - 1 :: chunk]
        return jnp.concatenate([before, after[:, :-1]], axis=1), after

    age_before, age_after = ends(ages, jnp.zeros((batch, 1), jnp.int32))
    enter_up, leave_up = ends(last, jnp.ones((batch, 1), jnp.int32))
    leave_down = upcoming[:, ::chunk]
    enter_down = jnp.concatenate([leave_down[:, 1:], last[:, -1:]], axis=1)
    tiles = ids.reshape(batch, chunks, chunk)
    whole = jnp.all(tiles == tiles[:, :, :1], axis=2) & (tiles[:, :, 0] > 0)
    plain = whole & (enter_up == tiles[:, :, 0]) & (enter_down == tiles[:, :, 0])
    facts = {
        Fact.PLAIN: plain,
        Fact.AGE_BEFORE: age_before,
        Fact.AGE_AFTER: age_after,
        Fact.ENTER_ASCENDING: enter_up,
        Fact.LEAVE_ASCENDING: leave_up,
        Fact.ENTER_DESCENDING: enter_down,
        Fact.LEAVE_DESCENDING: leave_down,
    }
    row = jnp.stack([facts[fact].astype(jnp.int32) for fact in Fact], axis=2)
    row = jnp.pad(row, ((0, 0), (0, 0), (0, FACTS - len(Fact))))
    places = jnp.where(tiles > 0, tiles - enter_up[:, :, None] + 1, 0)
    entries = ages.reshape(tiles.shape) - age_before[:, :, None] + AGES * places
    return jnp.concatenate([entries, row], axis=2)


def crossing(
    description: Description, first: int, end: int, descending: bool
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """Says how many real tokens lie in chunks first to end, and whether a state survives crossing them."""
    before, after = description[:, first, -FACTS:], description[:, end - 1, -FACTS:]
    age = after[:, Fact.AGE_AFTER] - before[:, Fact.AGE_BEFORE]
    if descending:
        return age, before[:, Fact.LEAVE_DESCENDING] == after[:, Fact.ENTER_DESCENDING]
    return age, before[:, Fact.ENTER_ASCENDING] == after[:, Fact.LEAVE_ASCENDING]
