"""Triton kernels that describe packed rows for the Hopper kernels; `mosaic_gpu_segments.py` says what they write.

A program owns one block of a row's tokens. The first kernel sums every block up, the second one reads the summaries of
its whole row, so that it knows what lies before its block and after it. Imports triton, so load lazily.
"""

import enum
from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.lightning import mosaic_gpu_segments
from pallas_kernels.lightning.mosaic_gpu_segments import Fact


class Summary(enum.IntEnum):
    """What is known of a block, in the order of the summaries [B, summaries, blocks]."""

    COUNT = 0  # real tokens
    FIRST = 1  # id of the first real token, 0 without one
    LAST = 2
    CHANGES = 3  # segments that begin in it, save at its first real token: whether one does, the blocks before say


AGES, FACTS = tl.constexpr(mosaic_gpu_segments.AGES), tl.constexpr(mosaic_gpu_segments.FACTS)
COUNT, FIRST, LAST, CHANGES = (tl.constexpr(int(kind)) for kind in Summary)
SUMMARIES = tl.constexpr(len(Summary))
PLAIN = tl.constexpr(int(Fact.PLAIN))
AGE_BEFORE, AGE_AFTER = tl.constexpr(int(Fact.AGE_BEFORE)), tl.constexpr(int(Fact.AGE_AFTER))
ENTER_ASCENDING, LEAVE_ASCENDING = tl.constexpr(int(Fact.ENTER_ASCENDING)), tl.constexpr(int(Fact.LEAVE_ASCENDING))
ENTER_DESCENDING, LEAVE_DESCENDING = tl.constexpr(int(Fact.ENTER_DESCENDING)), tl.constexpr(int(Fact.LEAVE_DESCENDING))


@triton.jit
@no_type_check
def _newest(old, new):
    return tl.where(new > 0, new, old)


@triton.jit
@no_type_check
def _tokens(ids, block, arrived, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """A block's ids, 0 for padding, and before each token the id of the last real one, `arrived` before the block."""
    place = tl.arange(0, BLOCK)
    token = block * BLOCK + place
    inside = token < LENGTH
    own = tl.maximum(tl.load(ids + token, mask=inside, other=0), 0)
    # Loaded again one token on: what an inclusive scan gives for these excludes the token itself.
    previous = tl.maximum(tl.load(ids + token - 1, mask=inside & (place > 0), other=0), 0)
    return own, tl.associative_scan(tl.where(place > 0, previous, arrived), 0, _newest)


@triton.jit
@no_type_check
def summary_kernel(ids, summaries, LENGTH: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """summaries [B, SUMMARIES, BLOCKS] of ids [B, LENGTH]."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    own, before = _tokens(ids + row * LENGTH, block, 0, LENGTH, BLOCK)
    newest = tl.where(tl.arange(0, BLOCK) == BLOCK - 1, _newest(before, own), 0)
    summaries += row * (SUMMARIES * BLOCKS) + block
    tl.store(summaries + COUNT * BLOCKS, tl.sum((own > 0).to(tl.int32), 0))
    tl.store(summaries + FIRST * BLOCKS, tl.sum(tl.where(before == 0, own, 0), 0))
    tl.store(summaries + LAST * BLOCKS, tl.sum(newest, 0))
    changes = (own > 0) & (before > 0) & (own != before)
    tl.store(summaries + CHANGES * BLOCKS, tl.sum(changes.to(tl.int32), 0))


@triton.jit
@no_type_check
def _surroundings(summaries, block, BLOCKS: tl.constexpr, ROW: tl.constexpr):
    """What lies around a block of a row.

    Returns the real tokens before it, the segments that began there, the id of the last real token there (0 without
    one), and 1 where the next real token after the block starts a segment, else 0.
    """
    other = tl.arange(0, ROW)
    there = other < BLOCKS
    count = tl.load(summaries + COUNT * BLOCKS + other, mask=there, other=0)
    first = tl.load(summaries + FIRST * BLOCKS + other, mask=there, other=0)
    changes = tl.load(summaries + CHANGES * BLOCKS + other, mask=there, other=0)
    previous = tl.load(summaries + LAST * BLOCKS + other - 1, mask=there & (other > 0), other=0)
    before = tl.associative_scan(previous, 0, _newest)
    opens = ((first > 0) & (first != before)).to(tl.int32)
    earlier = other < block
    age = tl.sum(tl.where(earlier, count, 0), 0)
    seen = tl.sum(tl.where(earlier, changes + opens, 0), 0)
    arrived = tl.sum(tl.where(other == block, before, 0), 0)
    # The nearest is the least; twice its place leaves room for the answer.
    nearest = tl.min(tl.where((other > block) & (first > 0), 2 * other + opens, 2 * ROW), 0)
    return age, seen, arrived, nearest & 1


@triton.jit
@no_type_check
def description_kernel(
    ids,
    summaries,
    description,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROW: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """description [B, CHUNKS, CHUNK + FACTS] of ids [B, LENGTH]; ROW is a power of two that BLOCKS fit in."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    age, seen, arrived, opens_after = _surroundings(summaries + row * (SUMMARIES * BLOCKS), block, BLOCKS, ROW)
    own, before = _tokens(ids + row * LENGTH, block, arrived, LENGTH, BLOCK)
    parts: tl.constexpr = BLOCK // CHUNK
    part = tl.arange(0, parts)

    # A number counts real tokens below AGES and the segments that start in multiples of it.
    steps = (own > 0).to(tl.int32) + AGES * ((own > 0) & (own != before)).to(tl.int32)
    steps = tl.reshape(steps, (parts, CHUNK))
    passed = tl.cumsum(steps, 1)
    total = tl.sum(steps, 1)
    count, starts = total % AGES, total // AGES
    age_after, seen_after = age + tl.cumsum(count, 0), seen + tl.cumsum(starts, 0)
    age_before, seen_before = age_after - count, seen_after - starts

    # Whether the next real token, of the chunk or after it, starts a segment: the nearest chunk with one tells.
    opens = tl.max((passed == 1 + AGES).to(tl.int32), 1)
    beyond = 2 * parts + opens_after
    code = tl.where(count > 0, 2 * part + opens, beyond)
    following = tl.min(tl.where(part[None, :] > part[:, None], code[None, :], beyond), 1)
    enter_ascending, leave_ascending = tl.maximum(seen_before, 1), tl.maximum(seen_after, 1)
    enter_descending = tl.maximum(seen_after + (following & 1), 1)
    leave_descending = tl.maximum(seen_before + (tl.minimum(code, following) & 1), 1)
    whole = (count == CHUNK) & (enter_ascending == leave_ascending)
    plain = (whole & (enter_descending == leave_ascending)).to(tl.int32)

    chunk = block * parts + part
    inside = (chunk < CHUNKS)[:, None]
    lines = description + (row * CHUNKS + chunk)[:, None] * (CHUNK + FACTS)
    # An ascending state enters with the last segment that began before the chunk, or else with the first.
    entries = passed + tl.where(seen_before > 0, AGES, 0)[:, None]
    tl.store(lines + tl.arange(0, CHUNK)[None, :], tl.where(steps > 0, entries, passed % AGES), mask=inside)
    fact = tl.arange(0, FACTS)[None, :]
    facts = tl.where(fact == PLAIN, plain[:, None], 0)
    facts = tl.where(fact == AGE_BEFORE, age_before[:, None], facts)
    facts = tl.where(fact == AGE_AFTER, age_after[:, None], facts)
    facts = tl.where(fact == ENTER_ASCENDING, enter_ascending[:, None], facts)
    facts = tl.where(fact == LEAVE_ASCENDING, leave_ascending[:, None], facts)
    facts = tl.where(fact == ENTER_DESCENDING, enter_descending[:, None], facts)
    facts = tl.where(fact == LEAVE_DESCENDING, leave_descending[:, None], facts)
    tl.store(lines + (CHUNK + fact), facts, mask=inside)
