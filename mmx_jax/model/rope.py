"""Partial rotary position embedding, NeoX pairing (INV-18, INV-19)."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Rotation(NamedTuple):
    """Cosines and sines of the rotation angles, fp32 [B, T, 1, rotary_dim / 2]."""

    cos: Float[Array, "B T 1 R"]
    sin: Float[Array, "B T 1 R"]


def inverse_frequencies(rotary_dim: int, base: float) -> np.ndarray:
    """Angle per position of each rotated pair: base^(-2i / rotary_dim), float32 [rotary_dim / 2]."""
    return (base ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / max(rotary_dim, 1))).astype(np.float32)


def rotation(positions: Int[Array, "B T"], rotary_dim: int, base: float) -> Rotation:
    """Angles for absolute positions; scores depend on differences only (INV-20)."""
    angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies(rotary_dim, base)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Rotates the first rotary_dim dims of every head in pairs (i, i + rotary_dim / 2); the rest passes through."""
    half = by.cos.shape[-1]
    first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    rotated = jnp.concatenate([first * by.cos - second * by.sin, second * by.cos + first * by.sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., 2 * half :]], axis=-1)
