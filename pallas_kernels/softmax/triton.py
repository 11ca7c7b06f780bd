"""Softmax attention over key ranges in Triton through jax-triton, for NVIDIA GPUs from sm_80 on.

Forward and backward visit only the tiles of scores that some query of the tile sees, so that packed segments cost what
they would cost apart. Which tiles these are is computed here, from the ranges, before the kernels start. The backward
is two kernels, one for dq and one for dk and dv, without atomics: the same call gives the same bits. `triton` and
`jax_triton` are imported at the first call, so that this module can be asked `supports` anywhere.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import triton_launch
from pallas_kernels.arrays import varying_like
from pallas_kernels.softmax.chunked import Ranges
from pallas_kernels.softmax.tiles import extent
from pallas_kernels.triton_launch import launch as _launch

WIDTHS = (16, 32, 64, 128)
PROGRAMS = 1024
"""Enough of them keep every multiprocessor busy although some have more to do than others."""


class Tiling(NamedTuple):
    """Queries and keys in a tile of scores, warps a program, software pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD = {90: Tiling(128, 64, 8, 3), 80: Tiling(64, 32, 4, 2)}
QUERY_GRADIENT = {90: Tiling(128, 64, 8, 3), 80: Tiling(64, 32, 4, 2)}
KEY_GRADIENTS = {90: Tiling(64, 128, 8, 3), 80: Tiling(32, 64, 4, 2)}
"""By the oldest GPU that each is for."""
FULL_PRECISION = Tiling(32, 32, 4, 1)


def supports(q: jax.Array | jax.ShapeDtypeStruct, k: jax.Array | jax.ShapeDtypeStruct, scale: float) -> str | None:
    """Says why a call cannot run on the current device, or None when it can."""
    if reason := triton_launch.obstacle((jnp.bfloat16, jnp.float16, jnp.float32), q.dtype):
        return reason
    if q.shape[3] not in WIDTHS:
        return f"it is written for head dims {WIDTHS}, not {q.shape[3]}"
    return f"it is written for positive scales, not {scale}" if scale <= 0 else None


def forward(q: jax.Array, k: jax.Array, v: jax.Array, ranges: Ranges, scale: float) -> tuple[jax.Array, jax.Array]:
    """Returns the output [B, T, N, H] in q's dtype and the fp32 log-sum-exp [B, T, N], -inf where nothing is seen."""
    from pallas_kernels.softmax import triton_kernels

    batch, length, heads, _ = q.shape
    tiling = triton_launch.tuning(FORWARD, FULL_PRECISION, q)
    o, lse = _launch(
        triton_kernels.forward_kernel,
        (q, k, v, *ranges, _walks_over_keys(ranges, k.shape[1], tiling)),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)),
        (math.ceil(length / tiling.queries) * heads, batch),
        _constants(q, k, tiling, scale),
        stages=tiling.stages,
        warps=tiling.warps,
    )
    return varying_like(o, q), varying_like(lse.swapaxes(1, 2), q)


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
    """Returns dq, dk and dv in their inputs' dtypes; `dlse` None stands for zeros."""
    from pallas_kernels.softmax import triton_kernels

    batch, length, heads, _ = q.shape
    # Of a score's gradient, what is the same for all keys: the softmax's normalisation and the log-sum-exp's own part.
    shared = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
    shared = shared if dlse is None else shared - dlse
    some = jnp.isfinite(lse)
    shared = jnp.where(some, shared, 0).swapaxes(1, 2)
    norm = jnp.where(some, lse * math.log2(math.e), jnp.inf).swapaxes(1, 2)
    operands = (q, k, v, do.astype(q.dtype), norm, shared, *ranges)

    tiling = triton_launch.tuning(QUERY_GRADIENT, FULL_PRECISION, q)
    (dq,) = _launch(
        triton_kernels.query_gradient_kernel,
        (*operands, _walks_over_keys(ranges, k.shape[1], tiling)),
        (jax.ShapeDtypeStruct(q.shape, q.dtype),),
        (math.ceil(length / tiling.queries) * heads, batch),
        _constants(q, k, tiling, scale) | {"SCALE": scale},
        stages=tiling.stages,
        warps=tiling.warps,
    )
    tiling = triton_launch.tuning(KEY_GRADIENTS, FULL_PRECISION, q)
    programs = math.ceil(k.shape[1] / tiling.keys) * k.shape[2]
    splits = _splits(heads // k.shape[2], programs * batch)
    partial = jax.ShapeDtypeStruct((splits, *k.shape), k.dtype if splits == 1 else jnp.float32)
    dk, dv = _launch(
        triton_kernels.key_gradients_kernel,
        (*operands, _walks_over_queries(ranges, k.shape[1], tiling)),
        (partial, partial),
        (programs * splits, batch),
        _constants(q, k, tiling, scale) | {"SCALE": scale, "BATCH": batch, "SPLITS": splits},
        stages=tiling.stages,
        warps=tiling.warps,
    )
    dq, dk, dv = (varying_like(x, q) for x in (dq, dk, dv))
    return dq, dk.sum(0).astype(k.dtype), dv.sum(0).astype(v.dtype)


def _constants(q: jax.Array, k: jax.Array, tiling: Tiling, scale: float) -> dict[str, Any]:
    return {
        "QUERIES": q.shape[1],
        "KEYS": k.shape[1],
        "HEADS": q.shape[2],
        "KEY_HEADS": k.shape[2],
        "WIDTH": q.shape[3],
        "TILE_Q": tiling.queries,
        "TILE_K": tiling.keys,
        "FACTOR": scale * math.log2(math.e),
        "PRECISION": "ieee",
    }


def _splits(group: int, programs: int) -> int:
    """Returns into how many parts the query heads of a key head are cut, so that there are enough programs."""
    return next((n for n in range(1, group) if group % n == 0 and n * programs >= PROGRAMS), group)


def _walks_over_keys(ranges: Ranges, keys: int, tiling: Tiling) -> jax.Array:
    """Says for each tile of queries which tiles of keys it walks over [B, tiles, 4]: see `triton_kernels`."""
    over = extent(ranges, keys, tiling.queries)
    first = jnp.where(over.any, over.low // tiling.keys, 0)
    last = jnp.where(over.any, -(-over.high // tiling.keys), 0)
    whole = jnp.clip(-(-over.common_low // tiling.keys), first, last)
    rest = jnp.clip(over.common_high // tiling.keys, whole, last)
    return jnp.stack([first, whole, rest, last], axis=2).astype(jnp.int32)


def _walks_over_queries(ranges: Ranges, keys: int, tiling: Tiling) -> jax.Array:
    """Says for each tile of keys which tiles of queries it walks over [B, tiles, 4].

    Only the first run of tiles whose queries see all these keys goes unmasked. A tile that reaches beyond the queries
    is masked, since its rows are.
    """
    over = extent(ranges, keys, tiling.queries)
    low = jnp.arange(0, keys, tiling.keys, dtype=jnp.int32)[None, :, None]
    high = low + tiling.keys
    index = jnp.arange(over.any.shape[1], dtype=jnp.int32)
    inside = (index + 1) * tiling.queries <= ranges.start.shape[1]
    seen = over.any[:, None] & (over.low[:, None] < high) & (over.high[:, None] > low)
    every = seen & inside & (over.common_low[:, None] <= low) & (over.common_high[:, None] >= high)
    last = jnp.max(jnp.where(seen, index + 1, 0), axis=2)
    first = jnp.minimum(jnp.min(jnp.where(seen, index, index.size), axis=2), last)
    whole = jnp.min(jnp.where(every, index, last[..., None]), axis=2)
    rest = jnp.min(jnp.where(~every & (index >= whole[..., None]), index, last[..., None]), axis=2)
    return jnp.stack([first, whole, rest, last], axis=2).astype(jnp.int32)
