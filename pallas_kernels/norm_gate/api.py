"""The joint RMSNorm over all heads times the sigmoid of a gate."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.arrays import accumulator, alike


def norm_gate(
    x: Float[Array, "B T N H"],
    gate_logits: Float[Array, "B T N H"],
    weight: Float[Array, "N H"],
    eps: float,
) -> Float[Array, "B T N H"]:
    """Computes cast(x / rms(x)) * weight * sigmoid(gate_logits), rms over all N * H channels of a token.

    The statistic is fp32 and the normalised value is cast to x's dtype before it meets the weight (model.md 4.7,
    INV-13). Differentiable in x, gate_logits and weight; the backward keeps the arguments and one number a token.

    Args:
        x: the mixed heads, bf16 or fp32.
        gate_logits: the gate before its sigmoid, in x's dtype.
        weight: the norm's weight for each channel.
        eps: added to the mean square; MiniMax-01 uses 1e-6.

    Raises:
        ValueError: shapes disagree.
    """
    if gate_logits.shape != x.shape or weight.shape != x.shape[2:]:
        raise ValueError(
            f"norm_gate: gate_logits must be {list(x.shape)} and weight {list(x.shape[2:])} for x {list(x.shape)}, "
            f"got {list(gate_logits.shape)} and {list(weight.shape)}"
        )
    return _norm_gate(eps, *alike(x, gate_logits, weight))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_gate(eps: float, x: jax.Array, gate_logits: jax.Array, weight: jax.Array) -> jax.Array:
    return _forward(eps, x, gate_logits, weight)[0]


def _forward(eps: float, x: jax.Array, gate_logits: jax.Array, weight: jax.Array) -> tuple[jax.Array, Any]:
    wide = x.astype(accumulator(x))
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=(2, 3), keepdims=True) + eps)
    gate = jax.nn.sigmoid(gate_logits.astype(wide.dtype))
    normed = (wide * inverse).astype(x.dtype).astype(wide.dtype)
    return (normed * weight.astype(wide.dtype) * gate).astype(x.dtype), (x, gate_logits, weight, inverse)


def _backward(eps: float, residuals: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, gate_logits, weight, inverse = residuals
    normed = x.astype(inverse.dtype) * inverse
    gate = jax.nn.sigmoid(gate_logits.astype(inverse.dtype))
    weighted = dy.astype(inverse.dtype) * gate
    dnormed = weighted * weight.astype(inverse.dtype)
    dx = inverse * (dnormed - normed * jnp.mean(dnormed * normed, axis=(2, 3), keepdims=True))
    dgate = dnormed * normed * (1 - gate)
    dweight = jnp.sum(weighted * normed, axis=(0, 1))
    return dx.astype(x.dtype), dgate.astype(gate_logits.dtype), dweight.astype(weight.dtype)


_norm_gate.defvjp(_forward, _backward)
