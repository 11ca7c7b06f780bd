"""Small functions on arrays that several operations share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def accumulator(x: jax.Array) -> jnp.dtype:
    """Returns the dtype that sums of x's elements are kept in: fp32, and fp64 for fp64."""
    return jnp.promote_types(x.dtype, jnp.float32)


def dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies by einsum in the operands' dtype and adds in the accumulator's; fp32 operands never become tf32."""
    precision = None if a.dtype.itemsize < 4 else lax.Precision.HIGHEST
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=accumulator(a))


def varying_like(x: jax.Array, *others: jax.Array) -> jax.Array:
    """Marks x as varying over every manual mesh axis over which one of the others varies."""
    axes = set().union(*map(_varying_axes, others)) - _varying_axes(x)
    return lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def alike(*arrays: jax.Array | None) -> tuple[Any, ...]:
    """Marks each array as varying over every manual mesh axis over which one of them varies; None stays None.

    A function with its own backward needs it inside `jax.shard_map`: an argument that is the same on all devices, used
    with one that is not, receives a gradient of which each device has a part. The mark's own transpose adds them up.
    """
    present = [x for x in arrays if x is not None]
    return tuple(None if x is None else varying_like(x, *present) for x in arrays)


def _varying_axes(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
