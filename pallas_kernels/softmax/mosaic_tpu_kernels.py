"""Bodies of the TPU softmax kernels: one grid step is one tile of scores of one head; `mosaic_tpu.py` calls them.

A list says which tiles there are, so that a step that has nothing to compute does not exist. What belongs to a tile of
queries (forward) or of keys (backward) stays in VMEM while the list stays there. Exponents are to base 2. Dots take
operands of the input dtype and accumulate in fp32. Positions of keys count through all rows of the batch.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

FIRST, LAST, MASKED = 1, 2, 4
"""Flags of an entry of the list: the first or last one of its tile of queries (forward) or keys (backward), and that
not every query sees every key."""
FLAG_BITS = 3
LANES = 128
UNSEEN = -1e30
"""A score that no visible one is below; finite, so that differences of two are numbers."""
NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))
Ref = Any


def dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """Multiplies two tiles with fp32 accumulation; fp32 operands keep their precision, bf16 ones take one pass."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def columns(row: jax.Array) -> jax.Array:
    """[1, n] -> [n, LANES]: each number in all lanes of its own row."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def forward_kernel(
    place: Ref, queries: Ref, keys: Ref, q: Ref, k: Ref, v: Ref, start: Ref, end: Ref,
    out: Ref, lse: Ref, acc: Ref, total: Ref, top: Ref, *, factor: float,
) -> None:  # fmt: skip
    """out = softmax(scores) v and lse = log sum exp(scores) of one tile of queries, over its entries of the list.

    acc [Q, H], total [Q, LANES] (a lane's share of the sum of weights) and top [Q, LANES] (the largest exponent, the
    same in all lanes) run along.
    """
    entry = keys[pl.program_id(1)]

    @pl.when(entry & FIRST != 0)
    def begin() -> None:
        acc[...] = jnp.zeros_like(acc)
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, UNSEEN)

    def attend(masked: bool) -> None:
        count, tile = q.shape[0], k.shape[0]
        repeats = tile // LANES
        exponents = dot(q[...], k[...], NT) * factor
        if masked:
            position = (entry >> FLAG_BITS) * tile + jax.lax.broadcasted_iota(jnp.int32, (count, tile), 1)
            low, high = (jnp.tile(columns(bound[0]), (1, repeats)) for bound in (start, end))
            exponents = jnp.where((position >= low) & (position < high), exponents, UNSEEN)
        higher = jnp.maximum(top[...], jnp.max(exponents, axis=1, keepdims=True))
        weights = jnp.exp2(exponents - jnp.tile(higher, (1, repeats)))
        old = jnp.exp2(top[...] - higher)
        shares = sum(weights[:, i * LANES : (i + 1) * LANES] for i in range(repeats))
        total[...] = total[...] * old + shares
        acc[...] = acc[...] * old + dot(weights.astype(v.dtype), v[...], NN)
        top[...] = higher

    pl.when(entry & MASKED != 0)(functools.partial(attend, True))
    pl.when(entry & MASKED == 0)(functools.partial(attend, False))

    @pl.when(entry & LAST != 0)
    def finish() -> None:
        some = columns(start[0]) < columns(end[0])
        summed = jnp.where(some, jnp.sum(total[...], axis=1, keepdims=True), 1.0)
        out[...] = jnp.where(some, acc[...] / summed, 0.0).astype(out.dtype)
        result = jnp.where(some, (top[...] + jnp.log2(summed)) * math.log(2), -jnp.inf)
        lse[...] = result.T[None, :1]


def backward_kernel(
    place: Ref, queries: Ref, keys: Ref, q: Ref, k: Ref, v: Ref, do: Ref, norm: Ref, shared: Ref, start: Ref, end: Ref,
    dk_before: Ref, dv_before: Ref, dq: Ref, dk: Ref, dv: Ref, *, factor: float,
) -> None:  # fmt: skip
    """Adds the gradients that one head of queries gives to its keys and values, and computes those of the queries.

    `dq` [queries of the call, H] stays in VMEM through all entries of a head, `dk` and `dv` [K, H] through those of a
    tile of keys, all fp32 and without the scale. place[0] is the call's first tile of queries. Scores lie as [key,
    query], so that what belongs to a query is a row: `norm`, its log-sum-exp to base 2 (infinite where it sees
    nothing), and `shared`, what is the same for all keys in its scores' gradients.
    """
    step = pl.program_id(1)
    entry = keys[step]

    @pl.when(step == 0)
    def begin() -> None:
        dq[...] = jnp.zeros_like(dq)

    @pl.when(entry & FIRST != 0)
    def begin_keys() -> None:
        dk[...] = dk_before[...]
        dv[...] = dv_before[...]

    def attend(masked: bool) -> None:
        count, tile = q.shape[0], k.shape[0]
        own = pl.ds(pl.multiple_of((queries[step] - place[0]) * count, count), count)
        weights = jnp.exp2(dot(k[...], q[...], NT) * factor - norm[0])
        if masked:
            position = (entry >> FLAG_BITS) * tile + jax.lax.broadcasted_iota(jnp.int32, (tile, count), 0)
            weights = jnp.where((position >= start[0]) & (position < end[0]), weights, 0.0)
        dv[...] += dot(weights.astype(do.dtype), do[...], NN)
        dscores = (weights * (dot(v[...], do[...], NT) - shared[0])).astype(q.dtype)
        dk[...] += dot(dscores, q[...], NN)
        dq[own] += dot(dscores, k[...], TN)

    pl.when(entry & MASKED != 0)(functools.partial(attend, True))
    pl.when(entry & MASKED == 0)(functools.partial(attend, False))
