"""What all Mosaic GPU kernels for Hopper (sm_90a) have in common."""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

MULTIPROCESSORS = 132
"""Of an H100 SXM and an H200."""


def tiles(dtype: Any, *shape: int) -> Any:
    """Shared memory as the matrix units read it."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)
