"""Softmax attention in plain XLA, block by block in queries and keys, so that memory grows with T and S alone.

Scores exist for one block of queries and keys at a time; running maxima and sums join the blocks, and blocks of keys
that no query of a block sees are not visited. The backward keeps q, k, v, the output and its log-sum-exp, and computes
the scores again. Inside, arrays are [B, K, T, G, ..] with G = N / K query heads for each key head, the order in which
matrix products leave them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.arrays import accumulator, dot, varying_like


class Ranges(NamedTuple):
    """The half-open range of keys that each query sees: start and end [B, T] int32, 0 <= start, end <= S."""

    start: jax.Array
    end: jax.Array


def block_lengths(batch: int, queries: int, keys: int, heads: int) -> tuple[int, int]:
    """Returns the lengths of query and key blocks.

    On a CPU scores stay in the cache; elsewhere blocks are large, since each is a few kernel launches. Even for one
    query a block of keys is bounded, so that the unused end of a cache is not read.
    """
    least, most, size = (128, 1024, 2 << 20) if dispatch.platform() == "cpu" else (512, 8192, 256 << 20)
    block = min(queries, least)
    fitting = size // (4 * batch * heads * block) // least * least
    return block, min(keys, max(least, min(most, fitting)))


def forward(q: jax.Array, k: jax.Array, v: jax.Array, ranges: Ranges, scale: float) -> tuple[jax.Array, jax.Array]:
    """Returns the output [B, T, N, H] in q's dtype and the fp32 log-sum-exp [B, T, N], -inf where nothing is seen."""
    query_block, key_block = block_lengths(q.shape[0], q.shape[1], k.shape[1], q.shape[2])

    def step(_: None, block: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        query, *seen = block

        def body(index: jax.Array | int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            acc, total, top = carry
            (keys, values), visible, _ = _key_block((k, v), index, key_block, Ranges(*seen))
            scores = jnp.where(visible, dot("bktgh,bskh->bktgs", query, keys) * scale, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            shift = jnp.where(jnp.isfinite(new_top), new_top, 0)
            weights, kept = jnp.exp(scores - shift[..., None]), jnp.exp(top - shift)
            acc = acc * kept[..., None] + dot("bktgs,bskh->bktgh", weights.astype(v.dtype), values)
            return acc, total * kept + jnp.sum(weights, axis=-1), new_top

        zeros = jnp.zeros(query.shape, accumulator(q))
        start = (zeros, zeros[..., 0], jnp.full_like(zeros[..., 0], -jnp.inf))
        carry = tuple(varying_like(x, query) for x in start)
        acc, total, top = _visit_keys(body, carry, Ranges(*seen), k.shape[1], key_block)
        divisor = jnp.where(total > 0, total, 1)
        return None, ((acc / divisor[..., None]).astype(q.dtype), top + jnp.log(divisor))

    _, (o, lse) = lax.scan(step, None, _query_blocks((_grouped(q, k), *ranges), query_block))
    return _joined(o, q.shape), _joined(lse, q.shape[:3])


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ranges: Ranges,
    scale: float,
    o: jax.Array,
    lse: jax.Array,
    do: jax.Array,
    dlse: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns dq, dk, dv in the dtypes of q, k, v; `dlse` is the gradient arriving at the log-sum-exp."""
    query_block, key_block = block_lengths(q.shape[0], q.shape[1], k.shape[1], q.shape[2])
    # Of a score's gradient, what is the same for all keys: the softmax's normalisation and the log-sum-exp's own part.
    common = -jnp.sum(do.astype(lse.dtype) * o.astype(lse.dtype), axis=-1)
    common = common if dlse is None else common + dlse
    some = jnp.isfinite(lse)
    common, finite = jnp.where(some, common, 0), jnp.where(some, lse, 0)

    def step(carry: tuple[jax.Array, ...], block: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], jax.Array]:
        query, doutput, top, shared, *seen = block

        def body(index: jax.Array | int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dquery, dk, dv = carry
            (keys, values), visible, start = _key_block((k, v), index, key_block, Ranges(*seen))
            scores = dot("bktgh,bskh->bktgs", query, keys) * scale - top
            weights = jnp.exp(jnp.where(visible, scores, -jnp.inf))
            dscores = weights * (dot("bktgh,bskh->bktgs", doutput, values) + shared) * scale
            weights, dscores = weights.astype(do.dtype), dscores.astype(q.dtype)
            dquery = dquery + dot("bktgs,bskh->bktgh", dscores, keys)
            dk = _add(dk, dot("bktgs,bktgh->bskh", dscores, query), start)
            dv = _add(dv, dot("bktgs,bktgh->bskh", weights, doutput), start)
            return dquery, dk, dv

        dquery = varying_like(jnp.zeros(query.shape, accumulator(q)), *carry)
        dquery, *sums = _visit_keys(body, (dquery, *carry), Ranges(*seen), k.shape[1], key_block)
        return tuple(sums), dquery.astype(q.dtype)

    zeros = tuple(varying_like(jnp.zeros(x.shape, accumulator(x)), x) for x in (k, v))
    rows = (_grouped(x, k) for x in (q, do, finite[..., None], common[..., None]))
    (dk, dv), dq = lax.scan(step, zeros, _query_blocks((*rows, *ranges), query_block))
    return _joined(dq, q.shape), dk.astype(k.dtype), dv.astype(v.dtype)


def _grouped(x: jax.Array, k: jax.Array) -> jax.Array:
    """[B, T, N, H] -> [B, K, T, G, H]."""
    batch, length, heads, dim = x.shape
    return x.reshape(batch, length, k.shape[2], heads // k.shape[2], dim).swapaxes(1, 2)


def _query_blocks(arrays: tuple[jax.Array, ...], block: int) -> tuple[jax.Array, ...]:
    """Cuts T (axis 2 of grouped arrays, axis 1 of ranges) into blocks on a new first axis; padding sees no keys."""

    def cut(x: jax.Array) -> jax.Array:
        axis = 2 if x.ndim == 5 else 1
        blocks = math.ceil(x.shape[axis] / block)
        widths = [(0, blocks * block - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, widths).reshape(*x.shape[:axis], blocks, block, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    return tuple(map(cut, arrays))


def _joined(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[blocks, B, K, block, G, ..] -> [B, T, N, ..]."""
    x = jnp.moveaxis(blocks, 0, 2)
    batch, heads, count, block, group = x.shape[:5]
    x = jnp.moveaxis(x.reshape(batch, heads, count * block, group, *x.shape[5:]), 1, 2)
    return x[:, : shape[1]].reshape(shape)


def _key_block(
    arrays: tuple[jax.Array, ...], index: jax.Array | int, block: int, seen: Ranges
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """Takes a block of keys and says which query sees which [B, 1, T, 1, block], and where the block starts.

    The last block starts early enough to be whole; keys that the block before it holds as well count there.
    """
    nominal = jnp.asarray(index * block, jnp.int32)
    start = jnp.minimum(nominal, arrays[0].shape[1] - block)
    position = (start + jnp.arange(block))[None, None]
    visible = (position >= jnp.maximum(seen.start, nominal)[..., None]) & (position < seen.end[..., None])
    return tuple(lax.dynamic_slice_in_dim(x, start, block, 1) for x in arrays), visible[:, None, :, None], start


def _visit_keys(
    body: Callable[[jax.Array | int, tuple[jax.Array, ...]], tuple[jax.Array, ...]],
    carry: tuple[jax.Array, ...],
    seen: Ranges,
    length: int,
    block: int,
) -> tuple[jax.Array, ...]:
    """Runs the body over the blocks of keys that some query sees."""
    if length == block:
        return body(0, carry)
    some = seen.start < seen.end
    first = jnp.min(jnp.where(some, seen.start, length)) // block
    last = (jnp.max(jnp.where(some, seen.end, 0)) + block - 1) // block
    return lax.fori_loop(first, last, body, carry)


def _add(total: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """Adds a block's part in place."""
    if part.shape == total.shape:
        return total + part
    old = lax.dynamic_slice_in_dim(total, start, part.shape[1], 1)
    return lax.dynamic_update_slice_in_dim(total, old + part, start, 1)
