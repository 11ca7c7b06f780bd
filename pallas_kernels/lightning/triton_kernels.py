"""Triton kernels of lightning attention for GPUs from sm_80 on; `triton.py` calls them. Imports triton, so load lazily.

One program owns one head of one row and COLUMNS columns of its state, which stays in registers in fp32 from the first
chunk to the last. Dots take operands of the input dtype and accumulate in fp32. No exponent is ever positive.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def scan_kernel(
    x,
    y,
    z,
    slopes,
    ids,
    arriving,
    start,
    out,
    end,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = (x y^T * weights) z + enter * (x state);  state = keep*state + (leave * y)^T z, chunk after chunk.

    With REVERSE chunks are walked backwards, the weights are transposed, and `enter` and `leave` change places: that is
    the recurrence of the state's gradient (model.md 4.5, 4.6). `ids` are canonical segment ids [B, T]; `arriving`
    [B, chunks] holds the id of the last real token before each chunk.
    """
    row_head = tl.program_id(0)
    row = (row_head // HEADS).to(tl.int64)
    head = row_head % HEADS
    slope = tl.load(slopes + head)
    place = tl.arange(0, CHUNK)
    down = tl.arange(0, WIDTH)
    across = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = (row * LENGTH * HEADS + head) * WIDTH
    square = row_head.to(tl.int64) * (WIDTH * WIDTH) + down[:, None] * WIDTH + across[None, :]
    state = tl.load(start + square) if HAS_START else tl.zeros((WIDTH, COLUMNS), tl.float32)
    causal = place[:, None] <= place[None, :] if REVERSE else place[:, None] >= place[None, :]

    for step in range(CHUNKS):
        chunk = CHUNKS - 1 - step if REVERSE else step
        token = chunk * CHUNK + place
        inside = token < LENGTH
        if PACKED:
            arrived = tl.load(arriving + row * CHUNKS + chunk)
            segment = tl.load(ids + row * LENGTH + token, mask=inside, other=0)
            real = segment > 0
            total = tl.sum(real.to(tl.float32), 0)
            newest = tl.maximum(arrived, tl.max(segment, 0))
            age = tl.cumsum(real.to(tl.float32), 0)
            enters = real & (segment == arrived)
            leaves = real & (segment == newest)
            visible = causal & real[:, None] & (segment[:, None] == segment[None, :])
            keep = tl.where(newest == arrived, tl.exp(-slope * total), 0.0)
        else:
            real = inside
            total = tl.sum(real.to(tl.float32), 0)
            age = (place + 1).to(tl.float32)
            enters = real
            leaves = real
            visible = causal & real[:, None] & real[None, :]
            keep = tl.exp(-slope * total)
        enter = tl.where(enters, tl.exp(-slope * age), 0.0)
        leave = tl.where(leaves, tl.exp(-slope * tl.maximum(total - age, 0.0)), 0.0)
        into, onward = (leave, enter) if REVERSE else (enter, leave)

        rows = first + token.to(tl.int64)[:, None] * (HEADS * WIDTH)
        y_tile = tl.load(y + rows + down[None, :], mask=real[:, None], other=0.0)
        z_tile = tl.load(z + rows + across[None, :], mask=real[:, None], other=0.0)
        if HAS_OUT:
            x_tile = tl.load(x + rows + down[None, :], mask=real[:, None], other=0.0)
            between = tl.abs(age[:, None] - age[None, :])
            weights = tl.where(visible, tl.exp(-slope * between), 0.0)
            scores = tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION) * weights
            result = tl.dot(x_tile, state.to(x_tile.dtype), input_precision=PRECISION) * into[:, None]
            result = tl.dot(scores.to(z_tile.dtype), z_tile, result, input_precision=PRECISION)
            tl.store(out + rows + across[None, :], result.to(z_tile.dtype), mask=inside[:, None])
        decayed = (y_tile.to(tl.float32) * onward[:, None]).to(y_tile.dtype)
        state = tl.dot(tl.trans(decayed), z_tile, state * keep, input_precision=PRECISION)
    tl.store(end + square, state)


@triton.jit
@no_type_check
def decode_kernel(
    q,
    k,
    v,
    slopes,
    slots,
    pool,
    out,
    new_pool,
    POOL: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """pool[slot] = exp(-slope)*pool[slot] + k v^T;  out = q pool[slot]. `new_pool` is the memory of `pool`."""
    row_head = tl.program_id(0)
    head = row_head % HEADS
    slot = row_head // HEADS
    if SLOTS:
        slot = tl.load(slots + slot)
    live = (slot >= 0) & (slot < POOL)
    down = tl.arange(0, WIDTH)
    across = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = row_head.to(tl.int64) * WIDTH
    square = (slot.to(tl.int64) * HEADS + head) * (WIDTH * WIDTH) + down[:, None] * WIDTH + across[None, :]
    # The state first: the rest has barriers before its use, and loads asked for earlier are under way by then.
    state = tl.load(pool + square, mask=live, other=0.0)
    key = tl.load(k + token + down).to(tl.float32)
    query = tl.load(q + token + down).to(tl.float32)
    value = tl.load(v + token + across)
    state *= tl.exp(-tl.load(slopes + head))
    state += key[:, None] * value.to(tl.float32)[None, :]
    tl.store(new_pool + square, state, mask=live)
    result = tl.where(live, tl.sum(query[:, None] * state, 0), 0.0)
    tl.store(out + token + across, result.to(value.dtype))
