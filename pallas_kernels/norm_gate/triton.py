"""The gated joint norm in Triton through jax-triton, for NVIDIA GPUs: one pass forward, one pass backward.

`triton` and `jax_triton` are imported at the first call, so that this module can be asked `supports` anywhere.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from pallas_kernels import triton_launch
from pallas_kernels.triton_launch import launch as _launch

MOST_CHANNELS = 8192
FORWARD_WARPS, BACKWARD_WARPS = 8, 16
BACKWARD_PROGRAMS = 132
"""Of these, each adds up the weight's gradient over its tokens: one for each multiprocessor of a Hopper card."""


def supports(channels: int, *dtypes: DTypeLike) -> str | None:
    """Says why a call cannot run on the current device, or None when it can.

    Args:
        channels: of a token, N * H.
        dtypes: of x, and of the weight.
    """
    if reason := triton_launch.obstacle((jnp.bfloat16, jnp.float32), *dtypes):
        return reason
    if channels > MOST_CHANNELS:
        return f"a token of {channels} channels does not fit in registers, {MOST_CHANNELS} do"
    return None


def forward(x: jax.Array, gate_logits: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Returns the output [B, T, N, H] in x's dtype and the fp32 1 / rms(x) [B, T] (model.md 4.7; INV-13)."""
    from pallas_kernels.norm_gate import triton_kernels

    y, inverse = _launch(
        triton_kernels.forward_kernel,
        (x, gate_logits, weight),
        (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(x.shape[:2], jnp.float32)),
        (math.prod(x.shape[:2]),),
        {**_channels(weight), "EPS": eps},
        warps=_fitting(FORWARD_WARPS, x),
    )
    return y, inverse


def backward(
    x: jax.Array, gate_logits: jax.Array, weight: jax.Array, inverse: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of x, gate_logits and weight, each in its argument's dtype."""
    from pallas_kernels.norm_gate import triton_kernels

    tokens = math.prod(x.shape[:2])
    programs = min(BACKWARD_PROGRAMS, tokens)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    dx, dgate, dweight = _launch(
        triton_kernels.backward_kernel,
        (x, gate_logits, weight, inverse, dy),
        (like, like, jax.ShapeDtypeStruct((programs, *weight.shape), jnp.float32)),
        (programs,),
        {**_channels(weight), "TOKENS": tokens, "PROGRAMS": programs, "STEPS": -(-tokens // programs)},
        warps=_fitting(BACKWARD_WARPS, x),
    )
    return dx, dgate, dweight.sum(axis=0).astype(weight.dtype)


def _channels(weight: jax.Array) -> dict[str, int]:
    """A token's channels, and the power of two that holds them."""
    return {"CHANNELS": weight.size, "BLOCK": 1 << (weight.size - 1).bit_length()}


def _fitting(warps: int, x: jax.Array) -> int:
    """Lowers a number of warps until no thread is without a 16-byte vector of a token."""
    vectors = x.shape[2] * x.shape[3] * x.dtype.itemsize // 16
    while warps > 1 and 32 * warps > vectors:
        warps //= 2
    return warps
