"""The weights' gradient of the grouped matmul on Hopper (sm_90a), in Pallas Mosaic GPU.

An expert has few rows for the size of its matrix, so that a tile's product is short beside reading its first operands
and writing its result. Here the CTAs stay (`mosaic_gpu_cta.py`). Two CTAs, with tiles one above the other, are a
cluster: each loads half of the dy that both multiply with, since the cache's bandwidth is what limits. Where the tiles
are odd in number, each CTA is a cluster.

Tiles of shared memory are filled from multiples of 8 rows. An expert's rows up to the first of these, and those left
over at its end, are copied beforehand, zeros after them: the kernel masks nothing.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.arrays import varying_like
from pallas_kernels.grouped_matmul.mosaic_gpu_cta import ALIGNMENT, STAGES, WIDTHS, Cta, launch
from pallas_kernels.hopper import MULTIPROCESSORS, tiles

ROWS, COLUMNS = WIDTHS
"""Of a tile of the result."""
STEP = 64
"""How many rows of x and dy are multiplied at a time."""
EDGE = 2 * STEP
"""Rows of an expert at its ends, at most 7 and STEP - 1 of them."""
STORED = 128
"""Columns that are written at a time: what the rest of the tile would take in shared memory is another stage."""
BAND = 4
"""Clusters' tiles above each other that are worked on before those to their right: together they read little."""


class _Walk(NamedTuple):
    """What each expert's tiles walk over: from row `first` on `whole` steps of x and dy, then `edge` of the copies."""

    first: jax.Array
    whole: jax.Array
    edge: jax.Array


def weight_gradient(
    x: jax.Array, dy: jax.Array, group_sizes: jax.Array, *, programs: int = MULTIPROCESSORS
) -> jax.Array:
    """Returns [E, D, F], for each expert the sum over its rows of x^T dy, in x's dtype.

    Args:
        x: [M, D].
        dy: [M, F], in x's dtype.
        group_sizes: [E] int32, in order.
        programs: how many CTAs share the work, an even number.
    """
    experts, inner, outer = group_sizes.shape[0], x.shape[1], dy.shape[1]
    if padding := -x.shape[0] % ALIGNMENT:
        x, dy = (jnp.pad(a, ((0, padding), (0, 0))) for a in (x, dy))
    walk, edge_rows = _cut(group_sizes, x.shape[0])
    members = 1 if inner // ROWS % 2 else 2
    grid = (experts, inner // (members * ROWS), outer // COLUMNS)
    (dw,) = launch(
        functools.partial(_Cta, grid=grid),
        (x, dy, _take(x, edge_rows), _take(dy, edge_rows), *walk),
        [jax.ShapeDtypeStruct((experts * inner, outer), x.dtype)],
        {
            "x": tiles(x.dtype, STAGES, STEP, ROWS),
            "dy": tiles(x.dtype, STAGES, STEP, COLUMNS),
            "out": tiles(x.dtype, 2, ROWS // 2, STORED),
        },
        programs=programs,
        members=members,
    )
    return varying_like(dw.reshape(experts, inner, outer), x)


def _cut(group_sizes: jax.Array, rows: int) -> tuple[_Walk, jax.Array]:
    """Returns each expert's walk, and the rows that are copied for it [E, EDGE], `rows` where there is none."""
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    starts = ends - group_sizes
    first = jnp.minimum(-(-starts // ALIGNMENT) * ALIGNMENT, ends)
    whole = (ends - first) // STEP
    last = first + whole * STEP
    before = (first - starts)[:, None]
    index = jnp.arange(EDGE, dtype=jnp.int32)
    row = jnp.where(index < before, starts[:, None] + index, last[:, None] + index - before)
    held = index < before + (ends - last)[:, None]
    edge = -(-(first - starts + ends - last) // STEP)
    return _Walk(first, whole, edge), jnp.where(held, row, rows)


def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Copies rows; those beyond the end are 0."""
    return x.at[rows.reshape(-1)].get(mode="fill", fill_value=0)


class _Cta(Cta):
    """The body of one CTA."""

    def __init__(self, *refs: Any, grid: tuple[int, int, int], **keywords: Any) -> None:
        super().__init__(**keywords)
        self.x, self.dy, self.x_edge, self.dy_edge, first, whole, edge, self.out = refs
        self.walk = _Walk(first, whole, edge)
        self.experts, self.down, self.across = grid
        self.tiles = self.experts * self.down * self.across

    def place(self, visit: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Expert, first row and first column of the tile of a visit of this CTA."""
        tile = self.cluster + visit * self.clusters
        expert, inside = lax.div(tile, self.down * self.across), lax.rem(tile, self.down * self.across)
        band, inside = lax.div(inside, BAND * self.across), lax.rem(inside, BAND * self.across)
        height = jnp.minimum(self.down - band * BAND, BAND)
        row, column = band * BAND + lax.rem(inside, height), lax.div(inside, height)
        return expert, (row * self.members + self.member) * ROWS, column * COLUMNS

    @property
    def visits(self) -> jax.Array:
        return lax.div(self.tiles - self.cluster + self.clusters - 1, self.clusters)

    def load(self) -> None:
        """Streams the rows that each tile adds up, tile after tile."""
        full = self.smem["full"]

        def visit(index: jax.Array, count: jax.Array) -> jax.Array:
            expert, row, column = self.place(index)
            first, whole, edge = (ref[expert] for ref in self.walk)

            def copy(slot: jax.Array, rows: Any, x: Any, dy: Any) -> None:
                plgpu.copy_gmem_to_smem(x.at[rows, pl.ds(row, ROWS)], self.smem["x"].at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(
                    dy.at[rows, pl.ds(column, COLUMNS)],
                    self.smem["dy"].at[slot],
                    full.at[slot],
                    collective_axes="member",
                )

            @pl.loop(0, whole + edge)
            def _(step: jax.Array) -> None:
                slot = self.free_slot(count + step)

                @pl.when(step < whole)
                def _() -> None:
                    rows = pl.ds(pl.multiple_of(first + step * STEP, ALIGNMENT), STEP)
                    copy(slot, rows, self.x, self.dy)

                @pl.when(step >= whole)
                def _() -> None:
                    rows = pl.ds(expert * EDGE + (step - whole) * STEP, STEP)
                    copy(slot, rows, self.x_edge, self.dy_edge)

            return count + whole + edge

        self.drain(lax.fori_loop(0, self.visits, visit, jnp.int32(0)))

    def multiply(self, half: jax.Array) -> None:
        """Computes half of the rows of each tile, and writes them while the next ones are being loaded."""
        own = pl.ds(half * (ROWS // 2), ROWS // 2)
        out = self.smem["out"].at[half]

        def operands(slot: jax.Array) -> tuple[Any, Any]:
            return self.smem["x"].at[slot, :, own].T, self.smem["dy"].at[slot]

        def visit(index: jax.Array, count: jax.Array) -> jax.Array:
            expert, row, column = self.place(index)
            steps = self.walk.whole[expert] + self.walk.edge[expert]
            result = self.sum_up((ROWS // 2, COLUMNS), count, steps, operands)
            rows = pl.ds(expert * (self.down * self.members * ROWS) + row + half * (ROWS // 2), ROWS // 2)
            for left in range(0, COLUMNS, STORED):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out[...] = result[:, left : left + STORED].astype(out.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, self.out.at[rows, pl.ds(column + left, STORED)])
            return count + steps

        lax.fori_loop(0, self.visits, visit, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
