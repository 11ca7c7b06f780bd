"""How a Triton kernel becomes a call in a jitted function, for every operation that has one."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from pallas_kernels import dispatch


def obstacle(written_for: Sequence[DTypeLike], *dtypes: DTypeLike) -> str | None:
    """Says why kernels written for some dtypes cannot run on the current device on these, or None when they can."""
    capability = dispatch.compute_capability()
    if capability is None or capability < 8:
        found = "no NVIDIA GPU" if capability is None else f"sm_{round(10 * capability)}"
        return f"it needs an NVIDIA GPU of compute capability 8.0 or newer, found {found}"
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed"
    for dtype in dtypes:
        if jnp.dtype(dtype) not in written_for:
            *names, last = (jnp.dtype(d).name for d in written_for)
            return f"it is written for {', '.join(names)} and {last}, not {jnp.dtype(dtype).name}"
    return None


def tuning[Tuning](tunings: Mapping[int, Tuning], full_precision: Tuning, x: jax.Array) -> Tuning:
    """Returns a kernel's tuning for x's dtype and this device, from those by oldest GPU (80, 90) and that for fp32."""
    if x.dtype.itemsize == 4:
        return full_precision
    capability = dispatch.compute_capability()
    assert capability is not None, "obstacle() has refused this call"
    return tunings[90 if int(capability) == 9 else 80]


def launch(
    kernel: Any,
    operands: tuple[Any, ...],
    out_shape: tuple[jax.ShapeDtypeStruct, ...],
    grid: tuple[int, ...],
    constants: dict[str, Any],
    *,
    aliases: dict[int, int] | None = None,
    stages: int = 1,
    warps: int = 4,
) -> tuple[jax.Array, ...]:
    """Calls one Triton kernel, compiled for the GPU at hand or for the target of `dispatch.target`.

    Under `jax.vmap` it is called for one element after another.

    Args:
        kernel: made by `triton.jit`; its parameters are the operands, the outputs, then the constants.
        operands: arrays.
        out_shape: of each output.
        grid: number of programs in each direction.
        constants: compile-time arguments by name.
        aliases: the position of each operand that shares its memory with an output, and that of the output.
        stages: depth of software pipelining in loops over matrix products.
        warps: warps a program.
    """
    capability = dispatch.compute_capability()
    assert capability is not None, "obstacle() has refused this call"

    @jax.custom_batching.sequential_vmap
    def call(*operands: Any) -> tuple[jax.Array, ...]:
        return _jax_triton().triton_call(
            *operands,
            kernel=kernel,
            out_shape=out_shape,
            grid=grid,
            num_warps=warps,
            num_stages=stages,
            compute_capability=round(10 * capability),
            input_output_aliases=aliases,
            **constants,
        )

    return call(*operands)


def _jax_triton() -> Any:
    """Imports jax-triton, and puts back the cache directory that its import takes from every other user of Triton."""
    cache = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    if cache is None:
        os.environ.pop("TRITON_CACHE_DIR", None)
    else:
        os.environ["TRITON_CACHE_DIR"] = cache
    return jax_triton
