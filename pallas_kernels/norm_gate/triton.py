"""The gated joint norm in Triton through jax-triton, for NVIDIA GPUs: one pass forward, one pass backward.

`triton` and `jax_triton` are imported at the first call, so that this module can be asked `supports` anywhere.
"""

import importlib.util
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from pallas_kernels import dispatch
from pallas_kernels.triton_launch import launch as _launch

MOST_CHANNELS = 8192
# KiB of shared memory that a block may have, by compute capability: sm_86, sm_89 and sm_120 have the least.
SHARED_KIB = {8.0: 163, 8.7: 163, 9.0: 227, 10.0: 227, 10.3: 227}
LEAST_SHARED_KIB = 99
RESERVED = 2048
"""Bytes of shared memory left to sums over a block's warps."""


class Tuning(NamedTuple):
    """How the tokens are shared out.

    Attributes:
        programs: how many programs, at most; each takes every programs-th token.
        warps: of a program.
        fetches: pipeline stages of a program's loads; 1: the next token is fetched when this one is done.
    """

    programs: int
    warps: int
    fetches: int


FORWARD = Tuning(programs=264, warps=16, fetches=3)
BACKWARD = Tuning(programs=132, warps=16, fetches=3)


def supports(channels: int, *dtypes: DTypeLike) -> str | None:
    """Says why a call cannot run on the current device, or None when it can.

    Args:
        channels: of a token, N * H.
        dtypes: of x, and of the weight.
    """
    capability = dispatch.compute_capability()
    if capability is None or capability < 8:
        found = "no NVIDIA GPU" if capability is None else f"sm_{round(10 * capability)}"
        return f"it needs an NVIDIA GPU of compute capability 8.0 or newer, found {found}"
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed"
    for dtype in dtypes:
        if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
            return f"it is written for bfloat16 and float32, not {jnp.dtype(dtype).name}"
    if channels > MOST_CHANNELS:
        return f"a token of {channels} channels does not fit in registers, {MOST_CHANNELS} do"
    return None


def forward(x: jax.Array, gate_logits: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Returns the output [B, T, N, H] in x's dtype and the fp32 1 / rms(x) [B, T] (model.md 4.7; INV-13)."""
    from pallas_kernels.norm_gate import triton_kernels

    tuning = _fitting(FORWARD, x, tensors=2)
    y, inverse = _launch(
        triton_kernels.forward_kernel,
        (x, gate_logits, weight),
        (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(x.shape[:2], jnp.float32)),
        (tuning.programs,),
        {**_constants(x, tuning), "EPS": eps},
        warps=tuning.warps,
    )
    return y, inverse


def backward(
    x: jax.Array, gate_logits: jax.Array, weight: jax.Array, inverse: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of x, gate_logits and weight, each in its argument's dtype."""
    from pallas_kernels.norm_gate import triton_kernels

    tuning = _fitting(BACKWARD, x, tensors=3)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    dx, dgate, dweight = _launch(
        triton_kernels.backward_kernel,
        (x, gate_logits, weight, inverse, dy),
        (like, like, jax.ShapeDtypeStruct((tuning.programs, *weight.shape), jnp.float32)),
        (tuning.programs,),
        _constants(x, tuning),
        warps=tuning.warps,
    )
    return dx, dgate, dweight.sum(axis=0).astype(weight.dtype)


def _fitting(tuning: Tuning, x: jax.Array, tensors: int) -> Tuning:
    """Lowers a tuning to what a call needs and a GPU holds.

    No program without a token, no thread without a 16-byte vector, and the tokens being fetched fit in shared memory.
    """
    batch, length, heads, width = x.shape
    vectors = heads * width * x.dtype.itemsize // 16
    warps = tuning.warps
    while warps > 1 and 32 * warps > vectors:
        warps //= 2
    room = 1024 * SHARED_KIB.get(dispatch.compute_capability() or 0, LEAST_SHARED_KIB) - RESERVED
    waiting = room // (tensors * _block(x) * x.dtype.itemsize)
    return Tuning(min(tuning.programs, batch * length), warps, max(1, min(tuning.fetches, 1 + waiting)))


def _block(x: jax.Array) -> int:
    """Channels of a token, up to the next power of two."""
    return 1 << (x.shape[2] * x.shape[3] - 1).bit_length()


def _constants(x: jax.Array, tuning: Tuning) -> dict[str, int]:
    batch, length, heads, width = x.shape
    channels = heads * width
    return {
        "TOKENS": batch * length,
        "CHANNELS": channels,
        "BLOCK": _block(x),
        "PROGRAMS": tuning.programs,
        "STEPS": -(-batch * length // tuning.programs),
        "FETCHES": tuning.fetches,
    }
