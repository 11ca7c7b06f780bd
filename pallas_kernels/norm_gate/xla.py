"""The gated joint norm in plain XLA: runs on every platform, in every floating dtype."""

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import accumulator


def forward(x: jax.Array, gate_logits: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Returns the output [B, T, N, H] in x's dtype and 1 / rms(x) [B, T] in the accumulator's."""
    wide = x.astype(accumulator(x))
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=(2, 3)) + eps)
    gate = jax.nn.sigmoid(gate_logits.astype(wide.dtype))
    normed = (wide * inverse[:, :, None, None]).astype(x.dtype).astype(wide.dtype)
    return (normed * weight.astype(wide.dtype) * gate).astype(x.dtype), inverse


def backward(
    x: jax.Array, gate_logits: jax.Array, weight: jax.Array, inverse: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of x, gate_logits and weight, each in its argument's dtype."""
    inverse = inverse[:, :, None, None]
    normed = x.astype(inverse.dtype) * inverse
    gate = jax.nn.sigmoid(gate_logits.astype(inverse.dtype))
    weighted = dy.astype(inverse.dtype) * gate
    dnormed = weighted * weight.astype(inverse.dtype)
    dx = inverse * (dnormed - normed * jnp.mean(dnormed * normed, axis=(2, 3), keepdims=True))
    dgate = dnormed * normed * (1 - gate)
    dweight = jnp.sum(weighted * normed, axis=(0, 1))
    return dx.astype(x.dtype), dgate.astype(gate_logits.dtype), dweight.astype(weight.dtype)
