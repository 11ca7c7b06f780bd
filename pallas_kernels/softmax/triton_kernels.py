"""Triton kernels of softmax attention over key ranges; `triton.py` calls them. Imports triton, so load lazily.

A program owns one tile of queries (or of keys) of one head and walks only over the tiles of the other side that it can
see. A row of four numbers tells which: it walks [first, whole) with a mask, [whole, rest) without one, and [rest, last)
with a mask again. Dots take operands of the input dtype and accumulate in fp32; exponents are to base 2.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _rows(pointer, token, length, STRIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, INSIDE: tl.constexpr):
    """Loads TILE rows from row `token` on; rows beyond `length` are 0 unless all are promised to be INSIDE."""
    row = tl.arange(0, TILE)[:, None]
    pointers = pointer + tl.cast(token, tl.int64) * STRIDE + (row * STRIDE + tl.arange(0, WIDTH)[None, :])
    if INSIDE:
        return tl.load(pointers)
    return tl.load(pointers, mask=token + row < length, other=0.0)


@triton.jit
@no_type_check
def _attend(
    acc, total, top, query, k, v, first, last, start, end, factor,
    KEYS: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the tiles [first, last) of keys to the running output, sum of weights and largest exponent."""
    for tile in range(first, last):
        key = _rows(k, tile * TILE, KEYS, STRIDE, WIDTH, TILE, not MASKED)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if MASKED:
            position = tile * TILE + tl.arange(0, TILE)[None, :]
            scores = tl.where((position >= start[:, None]) & (position < end[:, None]), scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * factor)
        # A query may have seen nothing yet: its exponents are -inf, and -inf less -inf is not a number.
        base = tl.where(higher == -float("inf"), 0.0, higher) if MASKED else higher
        weights = tl.exp2(scores * factor - base[:, None])
        old = tl.exp2(top - base)
        total = total * old + tl.sum(weights, 1)
        value = _rows(v, tile * TILE, KEYS, STRIDE, WIDTH, TILE, not MASKED)
        acc = tl.dot(weights.to(value.dtype), value, acc * old[:, None], input_precision=PRECISION)
        top = higher
    return acc, total, top


@triton.jit
@no_type_check
def _own_queries(
    starts, ends, walks, QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr, TILE_Q: tl.constexpr,
):  # fmt: skip
    """The tile of queries of one head that this program owns.

    Returns where it lies (offset of its head's keys, head, batch, first token, rows, which of these exist), the keys
    that each row sees (start, end) and the walk over tiles of keys.
    """
    head, tile, batch = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS, tl.program_id(1).to(tl.int64)
    tiles: tl.constexpr = (QUERIES + TILE_Q - 1) // TILE_Q
    tile = tiles - 1 - tile  # under a causal mask the last have most to do
    keys = (batch * KEYS * KEY_HEADS + head // (HEADS // KEY_HEADS)) * WIDTH
    walk = walks + (batch * tiles + tile) * 4
    token = tile * TILE_Q
    row = token + tl.arange(0, TILE_Q)
    inside = row < QUERIES
    start = tl.load(starts + batch * QUERIES + row, mask=inside, other=0)
    end = tl.load(ends + batch * QUERIES + row, mask=inside, other=0)
    first, whole, rest, last = tl.load(walk), tl.load(walk + 1), tl.load(walk + 2), tl.load(walk + 3)
    return keys, head, batch, token, row, inside, start, end, first, whole, rest, last


@triton.jit
@no_type_check
def forward_kernel(
    q, k, v, starts, ends, walks, out, lse,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(scores) v and lse = log sum exp(scores), for one tile of queries of one head."""
    stride: tl.constexpr = KEY_HEADS * WIDTH
    keys, head, batch, token, row, inside, start, end, first, whole, rest, last = _own_queries(
        starts, ends, walks, QUERIES, KEYS, HEADS, KEY_HEADS, WIDTH, TILE_Q
    )
    k += keys
    v += keys
    query = _rows(q + (batch * QUERIES * HEADS + head) * WIDTH, token, QUERIES, HEADS * WIDTH, WIDTH, TILE_Q, False)
    acc = tl.zeros((TILE_Q, WIDTH), tl.float32)
    total = tl.zeros((TILE_Q,), tl.float32)
    top = tl.full((TILE_Q,), -float("inf"), tl.float32)
    acc, total, top = _attend(
        acc, total, top, query, k, v, first, whole, start, end, FACTOR, KEYS, stride, WIDTH, TILE_K, True, PRECISION
    )
    acc, total, top = _attend(
        acc, total, top, query, k, v, whole, rest, start, end, FACTOR, KEYS, stride, WIDTH, TILE_K, False, PRECISION
    )
    acc, total, top = _attend(
        acc, total, top, query, k, v, rest, last, start, end, FACTOR, KEYS, stride, WIDTH, TILE_K, True, PRECISION
    )
    some = start < end
    acc = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)
    result = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453, -float("inf"))
    place = (tl.arange(0, TILE_Q) * (HEADS * WIDTH))[:, None] + tl.arange(0, WIDTH)[None, :]
    out += ((batch * QUERIES + token) * HEADS + head) * WIDTH
    tl.store(out + place, acc.to(query.dtype), mask=inside[:, None])
    tl.store(lse + (batch * HEADS + head) * QUERIES + row, result, mask=inside)


@triton.jit
@no_type_check
def _query_gradient(
    acc, query, dout, k, v, first, last, start, end, lse, shared, factor,
    KEYS: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the tiles [first, last) of keys give to the gradient of a tile of queries."""
    for tile in range(first, last):
        key = _rows(k, tile * TILE, KEYS, STRIDE, WIDTH, TILE, not MASKED)
        value = _rows(v, tile * TILE, KEYS, STRIDE, WIDTH, TILE, not MASKED)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        dweights = tl.dot(dout, tl.trans(value), input_precision=PRECISION)
        weights = tl.exp2(scores * factor - lse[:, None])
        if MASKED:
            position = tile * TILE + tl.arange(0, TILE)[None, :]
            weights = tl.where((position >= start[:, None]) & (position < end[:, None]), weights, 0.0)
        dscores = weights * (dweights - shared[:, None])
        acc = tl.dot(dscores.to(key.dtype), key, acc, input_precision=PRECISION)
    return acc


@triton.jit
@no_type_check
def query_gradient_kernel(
    q, k, v, dout, lse, shared, starts, ends, walks, dq,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries of one head. `lse` is to base 2, +inf where a query sees nothing: its weights are 0."""
    stride: tl.constexpr = KEY_HEADS * WIDTH
    keys, head, batch, token, row, inside, start, end, first, whole, rest, last = _own_queries(
        starts, ends, walks, QUERIES, KEYS, HEADS, KEY_HEADS, WIDTH, TILE_Q
    )
    k += keys
    v += keys
    own = (batch * QUERIES * HEADS + head) * WIDTH
    query = _rows(q + own, token, QUERIES, HEADS * WIDTH, WIDTH, TILE_Q, False)
    gradient = _rows(dout + own, token, QUERIES, HEADS * WIDTH, WIDTH, TILE_Q, False)
    norm = tl.load(lse + (batch * HEADS + head) * QUERIES + row, mask=inside, other=float("inf"))
    common = tl.load(shared + (batch * HEADS + head) * QUERIES + row, mask=inside, other=0.0)
    acc = tl.zeros((TILE_Q, WIDTH), tl.float32)
    acc = _query_gradient(
        acc, query, gradient, k, v, first, whole, start, end, norm, common, FACTOR,
        KEYS, stride, WIDTH, TILE_K, True, PRECISION,
    )  # fmt: skip
    acc = _query_gradient(
        acc, query, gradient, k, v, whole, rest, start, end, norm, common, FACTOR,
        KEYS, stride, WIDTH, TILE_K, False, PRECISION,
    )  # fmt: skip
    acc = _query_gradient(
        acc, query, gradient, k, v, rest, last, start, end, norm, common, FACTOR,
        KEYS, stride, WIDTH, TILE_K, True, PRECISION,
    )  # fmt: skip
    place = (tl.arange(0, TILE_Q) * (HEADS * WIDTH))[:, None] + tl.arange(0, WIDTH)[None, :]
    dq += ((batch * QUERIES + token) * HEADS + head) * WIDTH
    tl.store(dq + place, (acc * SCALE).to(query.dtype), mask=inside[:, None])


@triton.jit
@no_type_check
def _key_gradients(
    dkey, dvalue, key, value, q, dout, lse, shared, starts, ends, first, last, position, factor,
    QUERIES: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the tiles [first, last) of one head's queries give to the gradients of a tile of keys and values."""
    for tile in range(first, last):
        token = tile * TILE
        row = token + tl.arange(0, TILE)
        query = _rows(q, token, QUERIES, STRIDE, WIDTH, TILE, not MASKED)
        gradient = _rows(dout, token, QUERIES, STRIDE, WIDTH, TILE, not MASKED)
        if MASKED:
            inside = row < QUERIES
            norm = tl.load(lse + row, mask=inside, other=float("inf"))
            common = tl.load(shared + row, mask=inside, other=0.0)
        else:
            norm = tl.load(lse + row)
            common = tl.load(shared + row)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        weights = tl.exp2(scores * factor - norm[None, :])
        if MASKED:
            start = tl.load(starts + row, mask=inside, other=0)
            end = tl.load(ends + row, mask=inside, other=0)
            visible = (position[:, None] >= start[None, :]) & (position[:, None] < end[None, :])
            weights = tl.where(visible, weights, 0.0)
        dvalue = tl.dot(weights.to(gradient.dtype), gradient, dvalue, input_precision=PRECISION)
        dweights = tl.dot(value, tl.trans(gradient), input_precision=PRECISION)
        dscores = weights * (dweights - common[None, :])
        dkey = tl.dot(dscores.to(query.dtype), query, dkey, input_precision=PRECISION)
    return dkey, dvalue


@triton.jit
@no_type_check
def key_gradients_kernel(
    q, k, v, dout, lse, shared, starts, ends, walks, dk, dv,
    BATCH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, SPLITS: tl.constexpr, SCALE: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv [SPLITS, B, S, K, H] of one tile of keys, from one part of the query heads that read them."""
    tile, batch = tl.program_id(0) // (KEY_HEADS * SPLITS), tl.program_id(1).to(tl.int64)
    key_head, split = tl.program_id(0) // SPLITS % KEY_HEADS, tl.program_id(0) % SPLITS
    tiles: tl.constexpr = (KEYS + TILE_K - 1) // TILE_K
    part: tl.constexpr = HEADS // KEY_HEADS // SPLITS
    stride: tl.constexpr = KEY_HEADS * WIDTH
    walk = walks + (batch * tiles + tile) * 4
    first, whole, rest, last = tl.load(walk), tl.load(walk + 1), tl.load(walk + 2), tl.load(walk + 3)

    token = tile * TILE_K
    position = token + tl.arange(0, TILE_K)
    own = batch * KEYS * stride + key_head * WIDTH
    key = _rows(k + own, token, KEYS, stride, WIDTH, TILE_K, False)
    value = _rows(v + own, token, KEYS, stride, WIDTH, TILE_K, False)
    starts += batch * QUERIES
    ends += batch * QUERIES
    dkey = tl.zeros((TILE_K, WIDTH), tl.float32)
    dvalue = tl.zeros((TILE_K, WIDTH), tl.float32)
    for index in range(part):
        head = (key_head * SPLITS + split) * part + index
        across = (batch * QUERIES * HEADS + head) * WIDTH
        along = (batch * HEADS + head) * QUERIES
        dkey, dvalue = _key_gradients(
            dkey, dvalue, key, value, q + across, dout + across, lse + along, shared + along, starts, ends,
            first, whole, position, FACTOR, QUERIES, HEADS * WIDTH, WIDTH, TILE_Q, True, PRECISION,
        )  # fmt: skip
        dkey, dvalue = _key_gradients(
            dkey, dvalue, key, value, q + across, dout + across, lse + along, shared + along, starts, ends,
            whole, rest, position, FACTOR, QUERIES, HEADS * WIDTH, WIDTH, TILE_Q, False, PRECISION,
        )  # fmt: skip
        dkey, dvalue = _key_gradients(
            dkey, dvalue, key, value, q + across, dout + across, lse + along, shared + along, starts, ends,
            rest, last, position, FACTOR, QUERIES, HEADS * WIDTH, WIDTH, TILE_Q, True, PRECISION,
        )  # fmt: skip
    place = (tl.arange(0, TILE_K) * stride)[:, None] + tl.arange(0, WIDTH)[None, :]
    here = ((split.to(tl.int64) * BATCH + batch) * KEYS + token) * stride + key_head * WIDTH
    inside = (position < KEYS)[:, None]
    tl.store(dk + here + place, (dkey * SCALE).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + here + place, dvalue.to(dv.dtype.element_ty), mask=inside)
