"""The grouped matmul in Triton through jax-triton, for NVIDIA GPUs from sm_80 on.

Three products, one kernel each way: rows by their expert's weights, rows by the weights transposed, and each expert's
rows by its gradients. Rows need not be aligned, weights are read as they lie, rows of no expert are written as zeros by
the same kernel. `triton` and `jax_triton` are imported at the first call.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import triton_launch
from pallas_kernels.arrays import varying_like
from pallas_kernels.triton_launch import launch as _launch

LEAST_WIDTH = 32


class Tiling(NamedTuple):
    """Rows and columns of a tile of the result, and how much of the sum is taken at a time; warps; stages; band."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    band: int

    def fitted(self, rows: int, columns: int, inner: int) -> "Tiling":
        """Returns the tiling whose sides divide these widths; 0 stands for a side that may be ragged."""
        sides = [
            min(tile, width & -width) if width else tile
            for tile, width in zip(self[:3], (rows, columns, inner), strict=True)
        ]
        return self._replace(rows=sides[0], columns=sides[1], inner=sides[2])


ROWS = {90: Tiling(128, 256, 64, 8, 3, 8), 80: Tiling(128, 128, 32, 8, 3, 8)}
WEIGHTS = {90: Tiling(128, 256, 64, 8, 3, 8), 80: Tiling(128, 128, 32, 8, 3, 8)}
"""By the oldest GPU that each is for."""
FULL_PRECISION = Tiling(32, 32, 32, 4, 1, 8)


def obstacle(x: jax.Array | jax.ShapeDtypeStruct, w: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    """Says why a call cannot run on the current device, or None when it can."""
    if reason := triton_launch.obstacle((jnp.bfloat16, jnp.float16, jnp.float32), x.dtype):
        return reason
    if x.shape[1] % LEAST_WIDTH or w.shape[2] % LEAST_WIDTH:
        return f"widths {x.shape[1]} and {w.shape[2]} are no multiples of {LEAST_WIDTH}"
    return None


def matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, transposed: bool) -> jax.Array:
    """Returns [M, F] from x [M, D] and w [E, D, F], or with `transposed` [M, D] from x [M, F], in x's dtype."""
    from pallas_kernels.grouped_matmul import triton_kernels

    rows, inner = x.shape
    outer = w.shape[1] if transposed else w.shape[2]
    tiling = triton_launch.tuning(ROWS, FULL_PRECISION, x).fitted(0, outer, inner)
    tiles = _tiles(group_sizes, rows, tiling.rows)
    (y,) = _launch(
        triton_kernels.rows_kernel,
        (x, w, *tiles),
        (jax.ShapeDtypeStruct((rows, outer), x.dtype),),
        (tiles.owner.size * (outer // tiling.columns),),
        {
            "ROWS": rows,
            "TILES": tiles.owner.size,
            "EXPERTS": w.shape[0],
            "INNER": inner,
            "OUTER": outer,
            "TILE_M": tiling.rows,
            "TILE_N": tiling.columns,
            "TILE_K": tiling.inner,
            "BAND": tiling.band,
            "TRANSPOSED": transposed,
            "PRECISION": "ieee",
        },
        stages=tiling.stages,
        warps=tiling.warps,
    )
    return varying_like(y, x)


def weight_gradient(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Returns [E, D, F], for each expert the sum over its rows of x^T dy, in x's dtype."""
    from pallas_kernels.grouped_matmul import triton_kernels

    experts, inner, outer = group_sizes.shape[0], x.shape[1], dy.shape[1]
    tiling = triton_launch.tuning(WEIGHTS, FULL_PRECISION, x).fitted(inner, outer, 0)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    (dw,) = _launch(
        triton_kernels.weights_kernel,
        (x, dy, ends - group_sizes, ends),
        (jax.ShapeDtypeStruct((experts, inner, outer), x.dtype),),
        (experts * (inner // tiling.rows) * (outer // tiling.columns),),
        {
            "INNER": inner,
            "OUTER": outer,
            "TILE_M": tiling.rows,
            "TILE_N": tiling.columns,
            "TILE_K": tiling.inner,
            "BAND": tiling.band,
            "PRECISION": "ieee",
        },
        stages=tiling.stages,
        warps=tiling.warps,
    )
    return varying_like(dw, x)


class _Tiles(NamedTuple):
    """Each tile's expert, E for rows of none, and its rows: from `first` up to `end`, none where these are equal."""

    owner: jax.Array
    first: jax.Array
    end: jax.Array


def _tiles(group_sizes: jax.Array, rows: int, tile: int) -> _Tiles:
    """Cuts each expert's rows into tiles, and those that belong to none; as many as any group sizes could need."""
    experts = group_sizes.shape[0]
    ends = jnp.append(jnp.cumsum(group_sizes, dtype=jnp.int32), rows)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    last = jnp.cumsum(-(-(ends - starts) // tile))
    index = jnp.arange(-(-rows // tile) + experts, dtype=jnp.int32)
    owner = jnp.minimum(jnp.searchsorted(last, index, side="right", method="compare_all"), experts).astype(jnp.int32)
    before = jnp.where(owner > 0, last[owner - 1], 0)
    first = jnp.minimum(starts[owner] + (index - before) * tile, ends[owner])
    return _Tiles(owner, first, jnp.minimum(first + tile, ends[owner]))
