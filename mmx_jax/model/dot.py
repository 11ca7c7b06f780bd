"""Dot policies: in which precision weights meet activations. Layers never ask; they call `einsum`."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class DotPolicy:
    """Operands are cast to `dtype`; products accumulate in fp32 and come back in `dtype`."""

    dtype: str = "bfloat16"

    def einsum(self, spec: str, x: Float[Array, "..."], w: Float[Array, "..."]) -> Float[Array, "..."]:
        """Contracts activation `x` with weight `w`; fp32 operands are multiplied in full precision."""
        precision = jax.lax.Precision.HIGHEST if self.dtype == "float32" else None
        return jnp.einsum(spec, x.astype(self.dtype), w.astype(self.dtype), precision=precision)

    def cast(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The activation in this policy's dtype."""
        return x.astype(self.dtype)
