"""Softmax attention over key ranges on TPU (Pallas Mosaic TPU), forward and backward, for whole and for split rows.

The kernels walk over a list of the tiles of scores in which some query sees some key, made here from the ranges:
causal, packed and offset masks, and the two stripes of a rank in zigzag order, cost what they see. Forward: the tiles
of one tile of queries after another. Backward: the tiles of one tile of keys after another, with dq of some tiles of
queries kept in VMEM, so that scores are computed again once and not twice; where several query heads read a key head,
one call for each adds to what the calls before it gave to dk and dv.

Arrays enter the kernels as [B * T, N * H]: code around the call that keeps that layout pays no copy.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.softmax import mosaic_tpu_kernels as kernels
from pallas_kernels.softmax.chunked import Ranges
from pallas_kernels.softmax.tiles import extent

WIDTH = 128
TILES = (1024, 512, 256, 128)
LONG = 32_768
"""Rows of so many keys are cut into the largest tiles; in shorter ones too much of these would lie behind the mask."""
MAX_LIST = 1 << 16
"""Entries of a list at most: two int32 each in a core's scalar memory of 1 MiB."""
MAX_HELD = 8192
"""Queries whose gradients stay in VMEM, in fp32 and twice."""
VMEM_LIMIT = 56 << 20
Tokens = jax.Array | jax.ShapeDtypeStruct


def supports(q: Tokens, k: Tokens) -> str | None:
    """Says why a call cannot run on the current device, or None when it can."""
    if dispatch.platform() != "tpu":
        return f"the platform is {dispatch.platform()}, not a TPU"
    if q.shape[3] != WIDTH:
        return f"it is written for head dim {WIDTH}, not {q.shape[3]}"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype is {q.dtype.name}"
    if k.shape[1] > MAX_LIST * TILES[0]:
        return f"{k.shape[1]} keys in a row are more than {MAX_LIST * TILES[0]}"
    if jax.typeof(q).manual_axis_type.varying:
        return "it cannot say over which mesh axes its results vary"
    return None


def forward(q: jax.Array, k: jax.Array, v: jax.Array, ranges: Ranges, scale: float) -> tuple[jax.Array, jax.Array]:
    """Returns the output [B, T, N, H] in q's dtype and the fp32 log-sum-exp [B, T, N], -inf where nothing is seen."""
    cut = Cut.of(q, k)
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    operands = (cut.queries(q), cut.keys(k), cut.keys(v), *cut.bounds(ranges))

    def tile(n: Any, s: Any, place: Any, queries: Any, keys: Any) -> tuple[Any, Any]:
        return queries[s], n

    def key_tile(n: Any, s: Any, place: Any, queries: Any, keys: Any) -> tuple[Any, Any]:
        return keys[s] >> kernels.FLAG_BITS, lax.div(n, group)

    def out_tile(n: Any, s: Any, place: Any, queries: Any, keys: Any) -> tuple[Any, Any]:
        return queries[s] - place[0], n

    keys = pl.BlockSpec((cut.key_tile, WIDTH), key_tile)

    def call(piece: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        place, count, *entries = piece
        return pl.pallas_call(
            functools.partial(kernels.forward_kernel, factor=scale * math.log2(math.e)),
            out_shape=(
                jax.ShapeDtypeStruct((cut.held, heads * WIDTH), q.dtype),
                jax.ShapeDtypeStruct((heads, 1, cut.held), jnp.float32),
            ),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(heads, count),
                in_specs=[pl.BlockSpec((cut.query_tile, WIDTH), tile), keys, keys, cut.bound, cut.bound],
                out_specs=(
                    pl.BlockSpec((cut.query_tile, WIDTH), out_tile),
                    pl.BlockSpec((1, 1, cut.query_tile), lambda n, s, *lists: (n, 0, out_tile(n, s, *lists)[0])),
                ),
                scratch_shapes=[pltpu.VMEM((cut.query_tile, WIDTH), jnp.float32)] * 3,
            ),
            compiler_params=_parameters(),
            name="softmax_forward",
        )(place, *entries, *operands)

    o, lse = lax.map(call, cut.lists(ranges, by_keys=False))
    o = cut.own_queries(o.reshape(-1, heads * WIDTH), q.shape[1])
    lse = jnp.moveaxis(lse[:, :, 0], 1, 0).reshape(heads, -1)
    return o.reshape(q.shape), cut.own_queries(lse.T, q.shape[1])


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
    cut = Cut.of(q, k, MAX_HELD)
    key_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    # Of a score's gradient, what is the same for all keys: the softmax's normalisation and the log-sum-exp's own part.
    shared = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
    shared = shared if dlse is None else shared - dlse
    some = jnp.isfinite(lse)
    rows = (jnp.where(some, lse * math.log2(math.e), jnp.inf), jnp.where(some, shared, 0))
    numbers = (cut.queries(x).T[:, None] for x in rows)
    operands = (*map(cut.keys, (k, v)), cut.queries(do.astype(q.dtype)), *numbers, *cut.bounds(ranges))

    def tile(h: Any, s: Any, place: Any, queries: Any, keys: Any) -> tuple[Any, Any]:
        return queries[s], h * group + place[1]

    def key_tile(h: Any, s: Any, place: Any, queries: Any, keys: Any) -> tuple[Any, Any]:
        return keys[s] >> kernels.FLAG_BITS, h

    def number_tile(h: Any, s: Any, place: Any, queries: Any, keys: Any) -> tuple[Any, Any, Any]:
        return h * group + place[1], 0, queries[s]

    queries, keys = pl.BlockSpec((cut.query_tile, WIDTH), tile), pl.BlockSpec((cut.key_tile, WIDTH), key_tile)
    number = pl.BlockSpec((1, 1, cut.query_tile), number_tile)
    sums = jax.ShapeDtypeStruct(operands[0].shape, jnp.float32)

    def call(piece: tuple[jax.Array, ...], member: jax.Array, down: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        place, count, *entries = piece
        return pl.pallas_call(
            functools.partial(kernels.backward_kernel, factor=scale * math.log2(math.e)),
            out_shape=(jax.ShapeDtypeStruct((cut.held, key_heads * WIDTH), jnp.float32), sums, sums),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(key_heads, count),
                in_specs=[queries, keys, keys, queries, number, number, cut.bound, cut.bound, keys, keys],
                out_specs=(pl.BlockSpec((cut.held, WIDTH), lambda h, s, *_: (0, h)), keys, keys),
            ),
            input_output_aliases={11: 1, 12: 2},
            compiler_params=_parameters(),
            name="softmax_backward",
        )(jnp.append(place, member), *entries, cut.queries(q), *operands, *down)

    def of_piece(down: tuple[jax.Array, ...], piece: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        def of_member(down: tuple[jax.Array, ...], member: jax.Array) -> tuple[Any, jax.Array]:
            dq, dk, dv = call(piece, member, down)
            return (dk, dv), (dq * scale).astype(q.dtype)

        return lax.scan(of_member, down, jnp.arange(group, dtype=jnp.int32))

    zeros = jnp.zeros(sums.shape, sums.dtype)
    (dk, dv), dq = lax.scan(of_piece, (zeros, zeros), cut.lists(ranges, by_keys=True))
    # [pieces, group, queries, key heads * H] -> [queries, N * H]
    dq = jnp.moveaxis(dq.reshape(*dq.shape[:3], key_heads, WIDTH), 1, 3).reshape(-1, q.shape[2] * WIDTH)
    dq = cut.own_queries(dq, q.shape[1]).reshape(q.shape)
    return dq, cut.own_keys(dk * scale, k), cut.own_keys(dv, v)


def tiles(queries: int, keys: int) -> tuple[int, int]:
    """Returns the lengths of tiles of queries and of keys in rows of so many: the largest that pad little."""

    def tile(size: int) -> int:
        return next((n for n in TILES[keys < LONG :] if -size % n <= size // 16), TILES[-1])

    return tile(queries), tile(keys)


def _parameters() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT)


class Cut(NamedTuple):
    """How queries and keys are cut into tiles, and the tiles of queries into pieces, one call each."""

    rows: int
    query_tile: int
    query_tiles: int
    """Of a row of the batch."""
    key_tile: int
    key_tiles: int
    """Of a row of the batch."""
    piece: int
    """Tiles of queries in a piece; the last piece may reach beyond them."""

    @classmethod
    def of(cls, q: Tokens, k: Tokens, held: int | None = None) -> "Cut":
        """Cuts into pieces whose lists are short enough, and of at most so many queries."""
        rows, length, keys = q.shape[0], q.shape[1], k.shape[1]
        query_tile, key_tile = tiles(length, keys)
        query_tiles, key_tiles = math.ceil(length / query_tile), math.ceil(keys / key_tile)
        most = min(MAX_LIST // key_tiles, math.inf if held is None else held // query_tile)
        pieces = math.ceil(rows * query_tiles / most)
        return cls(rows, query_tile, query_tiles, key_tile, key_tiles, math.ceil(rows * query_tiles / pieces))

    @property
    def held(self) -> int:
        """Queries of a piece."""
        return self.piece * self.query_tile

    @property
    def pieces(self) -> int:
        return math.ceil(self.rows * self.query_tiles / self.piece)

    @property
    def bound(self) -> pl.BlockSpec:
        """The blocks of `bounds`."""
        return pl.BlockSpec((1, 1, self.query_tile), lambda h, s, place, queries, keys: (0, 0, queries[s]))

    def queries(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [queries of all pieces, n]."""
        rows = _flat(x, self.query_tile)
        return jnp.pad(rows, ((0, self.pieces * self.held - rows.shape[0]), (0, 0)))

    def own_queries(self, x: jax.Array, length: int) -> jax.Array:
        """[queries of all pieces, n] -> [B, T, n], the inverse of `queries`."""
        whole = x[: self.rows * self.query_tiles * self.query_tile]
        return whole.reshape(self.rows, -1, x.shape[1])[:, :length]

    def keys(self, x: jax.Array) -> jax.Array:
        """[B, S, K, H] -> [keys of whole tiles, K * H]."""
        return _flat(x, self.key_tile)

    def own_keys(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """The inverse of `keys`, in another array's dtype."""
        return x.reshape(self.rows, -1, *like.shape[2:])[:, : like.shape[1]].astype(like.dtype)

    def bounds(self, ranges: Ranges) -> tuple[jax.Array, ...]:
        """Start and end [1, 1, queries] of what each query sees, counted through the keys of all rows."""
        first = jnp.arange(self.rows, dtype=jnp.int32)[:, None] * (self.key_tiles * self.key_tile)
        some = ranges.start < ranges.end
        return tuple(self.queries(jnp.where(some, x + first, 0)).T[None] for x in ranges)

    def lists(self, ranges: Ranges, *, by_keys: bool) -> tuple[jax.Array, ...]:
        """Of each piece its first tile of queries [pieces, 1], its number of entries, and these [pieces, entries].

        They come as the kernels read them: tiles of queries, and tiles of keys with flags. The entries of each tile of
        queries, or by keys those of each tile of keys, stand together. By queries each tile has one at least, without
        which its output would not be written; by keys each piece has.
        """
        keys = self.key_tiles * self.key_tile
        some, every = map(self._of_pieces, extent(ranges, keys, self.query_tile).visible(keys, self.key_tile))
        places = jnp.arange(self.pieces, dtype=jnp.int32)[:, None] * self.piece
        query = jnp.arange(self.piece, dtype=jnp.int32)[:, None]
        column = jnp.arange(self.key_tiles, dtype=jnp.int32)
        first_keys = jnp.minimum((places[..., None] + query) // self.query_tiles, self.rows - 1) * self.key_tiles
        if by_keys:
            some = some.at[:, 0, 0].set(True)
            major, minors, minor = first_keys + column, self.piece, query
        else:
            some = some.at[:, :, 0].set(some[:, :, 0] | ~some.any(2))
            major, minors, minor = query, self.key_tiles, column
        codes = jnp.where(some, (major * minors + minor) * 2 + ~every, jnp.iinfo(jnp.int32).max)
        codes = jnp.sort(codes.reshape(self.pieces, -1), axis=1)
        major, minor = codes // 2 // minors, codes // 2 % minors
        border = jnp.pad(major[:, 1:] != major[:, :-1], ((0, 0), (1, 1)), constant_values=True)
        flags = kernels.FIRST * border[:, :-1] + kernels.LAST * border[:, 1:] + kernels.MASKED * (codes % 2)
        if by_keys:
            tiles, key_tiles = places + minor, major
        else:
            row = jnp.minimum((places + major) // self.query_tiles, self.rows - 1)
            tiles, key_tiles = places + major, row * self.key_tiles + minor
        return places, some.sum((1, 2)), tiles, (key_tiles << kernels.FLAG_BITS) | flags

    def _of_pieces(self, x: jax.Array) -> jax.Array:
        """[B, tiles, key tiles] -> [pieces, tiles of a piece, key tiles]."""
        beyond = self.pieces * self.piece - self.rows * self.query_tiles
        x = jnp.pad(x.reshape(-1, self.key_tiles), ((0, beyond), (0, 0)))
        return x.reshape(self.pieces, self.piece, self.key_tiles)


def _flat(x: jax.Array, tile: int) -> jax.Array:
    """[B, T, ...] -> [B * T, n] with rows of whole tiles and one last axis."""
    x = x.reshape(*x.shape[:2], -1)
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), (0, 0))).reshape(-1, x.shape[2])
