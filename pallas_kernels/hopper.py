"""What all Mosaic GPU kernels for Hopper (sm_90a) have in common."""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

MULTIPROCESSORS = 132
"""Of an H100 SXM and an H200."""


def obstacle() -> str | None:
    """Says why none of the kernels can be traced now, or None."""
    return "it indexes with 32 bits, and jax_enable_x64 is on" if jax.config.jax_enable_x64 else None


def tiles(dtype: Any, *shape: int) -> Any:
    """Shared memory as the matrix units read it."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)
