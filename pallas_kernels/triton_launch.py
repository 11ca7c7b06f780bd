"""How a Triton kernel becomes a call in a jitted function, for every operation that has one."""

import os
from typing import Any

import jax

from pallas_kernels import dispatch


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
    assert capability is not None, "supports() has refused this call"
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


def _jax_triton() -> Any:
    """Imports jax-triton, and puts back the cache directory that its import takes from every other user of Triton."""
    cache = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    if cache is None:
        os.environ.pop("TRITON_CACHE_DIR", None)
    else:
        os.environ["TRITON_CACHE_DIR"] = cache
    return jax_triton
