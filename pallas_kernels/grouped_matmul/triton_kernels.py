"""Triton kernels of the grouped matmul; `triton.py` calls them. Imports triton, so load lazily.

Dots take operands of the input dtype and accumulate in fp32. Widths are multiples of the tiles; rows are whatever the
groups leave.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _product(
    x, w, out, first, end, owner, column,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, TILE_K: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes TILE_N columns of the rows from first up to end, at most TILE_M."""
    row = first + tl.arange(0, TILE_M)
    across = tl.arange(0, TILE_N)
    along = tl.arange(0, TILE_K)
    acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    if owner < EXPERTS:
        # Rows beyond the end are another's; they are read, since the product keeps rows apart, and dropped.
        x_tiles = x + tl.minimum(row, ROWS - 1).to(tl.int64)[:, None] * INNER + along[None, :]
        w += owner.to(tl.int64) * (INNER * OUTER)
        if TRANSPOSED:
            w_tiles = w + ((column + across)[:, None] * INNER + along[None, :])
        else:
            w_tiles = w + (along[:, None] * OUTER + (column + across)[None, :])
        for _ in range(INNER // TILE_K):
            x_tile = tl.load(x_tiles)
            w_tile = tl.load(w_tiles)
            acc = tl.dot(x_tile, tl.trans(w_tile) if TRANSPOSED else w_tile, acc, input_precision=PRECISION)
            x_tiles += TILE_K
            w_tiles += TILE_K if TRANSPOSED else TILE_K * OUTER
    place = row.to(tl.int64)[:, None] * OUTER + (column + across)[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(row < end)[:, None])


@triton.jit
@no_type_check
def rows_kernel(
    x, w, owners, firsts, ends, out,
    ROWS: tl.constexpr, TILES: tl.constexpr, EXPERTS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, BAND: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[rows of a tile] = x[rows] w[their expert]; with TRANSPOSED by w^T. Rows of no expert become 0, unread.

    Tile i holds the rows from firsts[i] up to ends[i], at most TILE_M, of expert owners[i], which is EXPERTS for those
    of none. BAND tiles of rows share the weights in the cache: the programs walk down a band, then across.
    """
    columns: tl.constexpr = OUTER // TILE_N
    band = tl.program_id(0) // (BAND * columns)
    height = tl.minimum(TILES - band * BAND, BAND)
    inside = tl.program_id(0) % (BAND * columns)
    tile = band * BAND + inside % height
    column = inside // height * TILE_N

    first, end, owner = tl.load(firsts + tile), tl.load(ends + tile), tl.load(owners + tile)
    # An expert's last tile is half empty on average: half a tile's work is enough for half of them.
    half: tl.constexpr = TILE_M // 2
    if end - first > half:
        _product(
            x, w, out, first, end, owner, column,
            ROWS, EXPERTS, INNER, OUTER, TILE_M, TILE_N, TILE_K, TRANSPOSED, PRECISION,
        )  # fmt: skip
    elif end > first:
        _product(
            x, w, out, first, end, owner, column,
            ROWS, EXPERTS, INNER, OUTER, half, TILE_N, TILE_K, TRANSPOSED, PRECISION,
        )  # fmt: skip


@triton.jit
@no_type_check
def weights_kernel(
    x, dy, starts, ends, out,
    INNER: tl.constexpr, OUTER: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    BAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[e] = sum over the rows from starts[e] up to ends[e] of x^T dy, TILE_K rows at a time; 0 without rows."""
    down: tl.constexpr = INNER // TILE_M
    columns: tl.constexpr = OUTER // TILE_N
    expert = tl.program_id(0) // (down * columns)
    inside = tl.program_id(0) % (down * columns)
    band = inside // (BAND * columns)
    height = tl.minimum(down - band * BAND, BAND)
    left = (band * BAND + inside % (BAND * columns) % height) * TILE_M + tl.arange(0, TILE_M)
    right = inside % (BAND * columns) // height * TILE_N + tl.arange(0, TILE_N)
    start, end = tl.load(starts + expert), tl.load(ends + expert)

    step = tl.arange(0, TILE_K)[:, None]
    x_tiles = x + start.to(tl.int64) * INNER + (step * INNER + left[None, :])
    dy_tiles = dy + start.to(tl.int64) * OUTER + (step * OUTER + right[None, :])
    acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    for _ in range((end - start) // TILE_K):
        acc = tl.dot(tl.trans(tl.load(x_tiles)), tl.load(dy_tiles), acc, input_precision=PRECISION)
        x_tiles += TILE_K * INNER
        dy_tiles += TILE_K * OUTER
    rest = step < (end - start) % TILE_K
    if (end - start) % TILE_K > 0:
        x_tile = tl.load(x_tiles, mask=rest, other=0.0)
        acc = tl.dot(tl.trans(x_tile), tl.load(dy_tiles, mask=rest, other=0.0), acc, input_precision=PRECISION)
    place = expert.to(tl.int64) * (INNER * OUTER) + left.to(tl.int64)[:, None] * OUTER + right[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty))
