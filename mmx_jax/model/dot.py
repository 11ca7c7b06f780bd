"""Dot policies: in which precision weights meet activations. Layers never ask; they call `einsum`."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmx_jax.model.quantize import QuantizedWeight

Weight = Float[Array, "..."] | QuantizedWeight


@dataclass(frozen=True)
class DotPolicy:
    """Operands are cast to `dtype`; products accumulate in fp32 and come back in `dtype`."""

    dtype: str = "bfloat16"

    def einsum(self, spec: str, x: Float[Array, "..."], w: Weight) -> Float[Array, "..."]:
        """Contracts activation `x` with weight `w`; fp32 operands are multiplied in full precision.

        Where `spec` says "BT...,...->BT..." (the trailing axes of x are the leading ones of w, in order) and no mesh
        axis splits the sequence, both are flattened to matrices: on CPUs XLA otherwise puts what follows, such as the
        backward pass of silu, into a strided copy, a tenth of a small model's step.
        """
        precision = jax.lax.Precision.HIGHEST if self.dtype == "float32" else None
        x, weight = x.astype(self.dtype), self.weight(w)
        if not spec.startswith("BT") or _sequence_is_split():
            return jnp.einsum(spec, x, weight, precision=precision)
        contracted = x.ndim - 2
        matrix = weight.reshape(math.prod(weight.shape[:contracted]), -1)
        out = jnp.dot(x.reshape(-1, matrix.shape[0]), matrix, precision=precision)
        return out.reshape(*x.shape[:2], *weight.shape[contracted:])

    def cast(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The activation in this policy's dtype."""
        return x.astype(self.dtype)

    def weight(self, w: Weight) -> Float[Array, "..."]:
        """The weight in this policy's dtype; quantised ones are widened."""
        return w.widened(self.dtype) if isinstance(w, QuantizedWeight) else w.astype(self.dtype)


def _sequence_is_split() -> bool:
    """Whether the mesh in use splits T: merging B and T would then move tokens."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape.get("sequence", 1) > 1
