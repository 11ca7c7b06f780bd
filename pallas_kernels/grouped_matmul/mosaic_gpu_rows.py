"""Rows by the weights of their expert on Hopper (sm_90a), in Pallas Mosaic GPU: the forward and the rows' gradient.

The product is computed transposed: columns of the weights, always whole tiles of them, go down the tensor cores' tile
and rows across it, where a tile may have any multiple of 8. An expert's rows are dealt evenly to its tiles, so that
little is padding and none is so low that reading its weights takes longer than multiplying with them. Two CTAs with the
same rows and neighbouring columns are a cluster: each loads half of the rows for both. Where tiles of columns are odd
in number, each CTA is a cluster. The CTAs stay (`mosaic_gpu_cta.py`).

Which tile comes after which decides how often weights are read: those of one expert stay together, and experts whose
tiles are equally high follow each other, so that clusters that read the same weights stay side by side.

Tiles of shared memory are filled from, and written to, multiples of 8 rows. A tile starts at the last of these before
its expert's first row. Blocks of 8 rows that experts share are written to a place of their own, and their rows put
where they belong afterwards.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.arrays import varying_like
from pallas_kernels.grouped_matmul.mosaic_gpu_cta import ALIGNMENT, STAGES, Cta, launch
from pallas_kernels.hopper import MULTIPROCESSORS, tiles

COLUMNS, STEP = 128, 64
"""Columns of a tile of the result, and how much of the sum is taken at a time."""
UNIT = 16
"""Rows that are dealt to tiles at a time."""
HEIGHTS = (32, 64, 96, *range(128, 257, UNIT))
"""Rows that a tile may be computed with, a program for each: low tiles are few, and round up to fewer heights."""
ROWS = HEIGHTS[-1]
PIECE = 64
"""Rows that are written at a time."""
BAND = 8
"""Tiles of an expert's rows that are worked on before the columns to their right: together they read little."""


class _Groups(NamedTuple):
    """Where the rows of each expert, and last those of none, start and end."""

    starts: jax.Array
    ends: jax.Array


class _Tile(NamedTuple):
    """A tile of rows.

    Its band is `band` tiles from `first` on. It has `rows` rows of expert `owner`, E for rows of none, from `start` on,
    a multiple of 8, of which the first `before` share a block of 8 with another expert; it is computed with `height`.
    """

    first: jax.Array
    band: jax.Array
    owner: jax.Array
    start: jax.Array
    height: jax.Array
    before: jax.Array
    rows: jax.Array


# Lowering a kernel of so many heights takes seconds: once for all calls of one shape in a program.
@functools.partial(jax.jit, static_argnames=("transposed", "programs"))
def matmul(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, transposed: bool, *, programs: int = MULTIPROCESSORS
) -> jax.Array:
    """Returns [M, F] from x [M, D] and w [E, D, F], or with `transposed` [M, D] from x [M, F], in x's dtype.

    Args:
        x: rows sorted by expert.
        w: in x's dtype.
        group_sizes: [E] int32, in order; rows beyond their sum become 0.
        transposed: whether to multiply with the transposed weights.
        programs: how many CTAs share the work, an even number.
    """
    rows, inner = x.shape
    outer = w.shape[1] if transposed else w.shape[2]
    if padding := max(ROWS - rows, -rows % ALIGNMENT):
        x = jnp.pad(x, ((0, padding), (0, 0)))
    groups = _groups(group_sizes, x.shape[0])
    y, shared = launch(
        functools.partial(_Cta, sizes=(w.shape[0], inner, outer), transposed=transposed),
        (x, w.reshape(-1, w.shape[2]), *_tiles(groups, x.shape[0])),
        [
            jax.ShapeDtypeStruct((x.shape[0], outer), x.dtype),
            jax.ShapeDtypeStruct((2 * ALIGNMENT * groups.ends.shape[0], outer), x.dtype),
        ],
        {
            "x": tiles(x.dtype, STAGES, ROWS, STEP),
            "w": tiles(x.dtype, STAGES, *((COLUMNS, STEP) if transposed else (STEP, COLUMNS))),
            "out": tiles(x.dtype, 2, 2, PIECE, COLUMNS // 2),
        },
        programs=programs,
        members=1 if outer // COLUMNS % 2 else 2,
        # No thread reads what it writes to shared memory. Copies out of it wait for commit_smem, and writes over it for
        # wait_smem_to_gmem: both are barriers of the warpgroup.
        automatic_barriers=False,
    )
    return varying_like(_mended(y, shared, groups)[:rows], x)


def _groups(group_sizes: jax.Array, rows: int) -> _Groups:
    expert = jnp.arange(group_sizes.shape[0] + 1)
    earlier = expert[:-1] < expert[:, None]
    sums = jnp.sum(jnp.where(earlier, group_sizes.astype(jnp.int32), 0), axis=1, dtype=jnp.int32)
    starts = jnp.minimum(sums, rows)
    return _Groups(starts, jnp.append(starts[1:], jnp.int32(rows)))


def _tiles(groups: _Groups, rows: int) -> tuple[jax.Array, jax.Array]:
    """Cuts each expert's rows into tiles, and those that belong to none.

    Sums under masks, with nothing sorted or looked up, are few kernels.

    Returns:
        How many tiles there are [1], and of each a `_Tile` [most, 7]: as many as any group sizes could need.
    """
    starts, ends = groups
    aligned = starts // ALIGNMENT * ALIGNMENT
    length = jnp.where(ends > starts, ends - aligned, 0)
    count, units = -(-length // ROWS), -(-length // UNIT)
    expert = jnp.arange(starts.shape[0], dtype=jnp.int32)
    height = jnp.where(expert < expert.size - 1, -(-units // jnp.maximum(count, 1)), -1)
    precedes = (height > height[:, None]) | ((height == height[:, None]) & (expert < expert[:, None]))
    first = jnp.sum(jnp.where(precedes, count, 0), axis=1, dtype=jnp.int32)

    index = jnp.arange(-(-rows // ROWS) + 2 * expert.size, dtype=jnp.int32)[:, None]
    owns = (index >= first) & (index < first + count)
    facts = jnp.stack([expert, first, count, units, aligned, starts, ends])
    facts = jnp.sum(jnp.where(owns[:, None], facts, 0), axis=2, dtype=jnp.int32)
    owner, first, tiles_of_it, units, aligned, begins, ends = facts.T
    tiles_of_it = jnp.maximum(tiles_of_it, 1)
    own = index[:, 0] - first
    # The first tiles have one unit more.
    each, more = units // tiles_of_it, units % tiles_of_it
    top, bottom = (each * i + jnp.minimum(i, more) for i in (own, own + 1))
    start = aligned + top * UNIT
    computed = jnp.zeros_like(start)
    for allowed in reversed(HEIGHTS):
        computed = jnp.where((bottom - top) * UNIT <= allowed, allowed, computed)
    band = -(-tiles_of_it // -(-tiles_of_it // BAND))
    left = first + own // band * band
    tile = _Tile(
        first=left,
        band=jnp.minimum(band, first + tiles_of_it - left),
        owner=owner,
        start=start,
        height=computed,
        before=jnp.maximum(begins - start, 0),
        rows=jnp.minimum(aligned + bottom * UNIT, ends) - start,
    )
    return jnp.sum(count, keepdims=True, dtype=jnp.int32), jnp.stack(tile, axis=1)


def _mended(y: jax.Array, shared: jax.Array, groups: _Groups) -> jax.Array:
    """Puts rows of blocks of 8 that experts share, of each its first and its last, where they belong."""
    starts, ends = groups
    top, bottom = (x // ALIGNMENT * ALIGNMENT for x in groups)
    has_top, has_bottom = starts > top, (ends > bottom) & ((starts == top) | (bottom > top))
    row = jnp.stack([top, bottom], axis=1)[..., None] + jnp.arange(ALIGNMENT, dtype=jnp.int32)
    own = (row >= starts[:, None, None]) & (row < ends[:, None, None])
    own &= jnp.stack([has_top, has_bottom], axis=1)[..., None]
    # Rows that are dropped have numbers of their own too, beyond the end.
    nowhere = y.shape[0] + jnp.arange(row.size, dtype=jnp.int32).reshape(row.shape)
    return y.at[jnp.where(own, row, nowhere).reshape(-1)].set(shared, mode="drop", unique_indices=True)


class _Cta(Cta):
    """The body of one CTA."""

    def __init__(self, *refs: Any, sizes: tuple[int, int, int], transposed: bool, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.x, self.w, number, self.tiles, self.out, self.shared = refs
        self.experts, self.inner, self.outer = sizes
        self.transposed = transposed
        self.across = self.outer // (self.members * COLUMNS)
        self.number = number[0]

    def place(self, visit: jax.Array) -> tuple[_Tile, jax.Array]:
        """The tile of rows and the first column of a visit of this CTA, or of the last when there are no more."""
        index = jnp.minimum(self.index(visit), self.number * self.across - 1)
        slot = lax.div(index, self.across)
        first, band = self.tiles[slot, 0], self.tiles[slot, 1]
        inside = index - first * self.across
        tile = first + lax.rem(inside, band)
        facts = _Tile(first, band, *(self.tiles[tile, i] for i in range(2, len(_Tile._fields))))
        return facts, (lax.div(inside, band) * self.members + self.member) * COLUMNS

    def index(self, visit: jax.Array) -> jax.Array:
        """Which of all tiles comes next. From visit to visit CTAs change places, or some would have the low tiles."""
        return lax.rem(self.cluster + visit, self.clusters) + visit * self.clusters

    @property
    def visits(self) -> jax.Array:
        total = self.number * self.across
        whole = lax.div(total, self.clusters)
        return whole + (self.index(whole) < total)

    def steps(self, tile: _Tile) -> jax.Array:
        return jnp.where(tile.owner < self.experts, self.inner // STEP, 0)

    def load(self) -> None:
        """Streams rows and weights, tile after tile."""
        full = self.smem["full"]

        def visit(index: jax.Array, total: jax.Array) -> jax.Array:
            tile, column = self.place(index)
            steps = self.steps(tile)
            start = pl.multiple_of(tile.start, ALIGNMENT)

            def stream(count: int) -> None:
                @pl.loop(0, steps)
                def _(step: jax.Array) -> None:
                    slot = self.free_slot(total + step)
                    plgpu.copy_gmem_to_smem(
                        self.x.at[pl.ds(start, count), pl.ds(step * STEP, STEP)],
                        self.smem["x"].at[slot, pl.ds(0, count)],
                        full.at[slot],
                        collective_axes="member",
                    )
                    plgpu.copy_gmem_to_smem(self.weights(tile, column, step), self.smem["w"].at[slot], full.at[slot])

            for count in HEIGHTS:
                pl.when(tile.height == count)(functools.partial(stream, count))
            return total + steps

        self.drain(lax.fori_loop(0, self.visits, visit, jnp.int32(0)))

    def weights(self, tile: _Tile, column: jax.Array, step: jax.Array) -> Any:
        """The part of an expert's weights that a step multiplies with."""
        columns, along = pl.ds(column, COLUMNS), pl.ds(step * STEP, STEP)
        if self.transposed:
            return self.w.at[pl.ds(tile.owner * self.outer + column, COLUMNS), along]
        return self.w.at[pl.ds(tile.owner * self.inner + step * STEP, STEP), columns]

    def multiply(self, half: jax.Array) -> None:
        """Computes half of the columns of each tile, and writes them while the next ones are being loaded."""

        def visit(index: jax.Array, carry: Any) -> Any:
            total, tile, column = carry
            # Asked for early: it comes from device memory.
            following = self.place(index + 1)
            steps = self.steps(tile)
            for count in HEIGHTS:

                @pl.when(tile.height == count)
                def _(count: int = count) -> None:
                    result = self.product(half, count, total, steps)
                    self.write(half, result, tile, column + half * (COLUMNS // 2))

            return total + steps, *following

        lax.fori_loop(0, self.visits, visit, (jnp.int32(0), *self.place(jnp.int32(0))))
        plgpu.wait_smem_to_gmem(0)

    def product(self, half: jax.Array, count: int, total: jax.Array, steps: jax.Array) -> jax.Array:
        """Returns half of a tile's columns of `count` rows [COLUMNS // 2, count], in fp32."""
        own, rows = pl.ds(half * (COLUMNS // 2), COLUMNS // 2), pl.ds(0, count)

        def operands(slot: jax.Array) -> tuple[Any, Any]:
            w = self.smem["w"].at[slot]
            return w.at[own] if self.transposed else w.at[:, own].T, self.smem["x"].at[slot, rows].T

        return self.sum_up((COLUMNS // 2, count), total, steps, operands)

    def write(self, half: jax.Array, result: jax.Array, tile: _Tile, column: jax.Array) -> None:
        """Writes columns from `column` on of the tile's rows: `result` [COLUMNS // 2, rows] transposed."""
        columns = pl.ds(pl.multiple_of(column, COLUMNS // 2), COLUMNS // 2)
        start = pl.multiple_of(tile.start, ALIGNMENT)
        for top in range(0, result.shape[1], PIECE):
            height = min(PIECE, result.shape[1] - top)
            out = self.smem["out"].at[half, top // PIECE % 2, pl.ds(0, height)]
            plgpu.wait_smem_to_gmem(1 if top else 0, wait_read_only=True)
            piece = result[:, top : top + height].astype(out.dtype)
            out.T[...] = plgpu.layout_cast(piece, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            whole = tile.rows >= top + height
            if not top:
                whole &= tile.before == 0

            @pl.when(whole)
            def _(out: Any = out, top: int = top, height: int = height) -> None:
                plgpu.copy_smem_to_gmem(out, self.out.at[pl.ds(start + top, height), columns], commit_group=False)

            pl.when(~whole)(functools.partial(self.write_blocks, out, top, height, tile, columns))
            plgpu.commit_smem_to_gmem_group()

    def write_blocks(self, out: Any, top: int, height: int, tile: _Tile, columns: Any) -> None:
        """Writes a piece, the tile's rows from `top` on, block of 8 by block; those that experts share, to `shared`."""
        start = pl.multiple_of(tile.start, ALIGNMENT)

        def copy(block: Any, to: Any, row: Any) -> None:
            own = out.at[pl.ds(pl.multiple_of(block * ALIGNMENT, ALIGNMENT), ALIGNMENT)]
            to = to.at[pl.ds(pl.multiple_of(row, ALIGNMENT), ALIGNMENT), columns]
            plgpu.copy_smem_to_gmem(own, to, commit_group=False)

        left = tile.rows - top
        end = jnp.clip(lax.div(left, ALIGNMENT), 0, height // ALIGNMENT)
        first = jnp.int32(0)
        if not top:
            first = jnp.where(tile.before > 0, 1, 0)
            pl.when(tile.before > 0)(lambda: copy(jnp.int32(0), self.shared, tile.owner * (2 * ALIGNMENT)))

        @pl.loop(first, end)
        def _(block: jax.Array) -> None:
            copy(block, self.out, start + top + block * ALIGNMENT)

        @pl.when((left > end * ALIGNMENT) & (left < height))
        def _() -> None:
            copy(end, self.shared, (2 * tile.owner + 1) * ALIGNMENT)
