"""Dot policies: in which precision weights meet activations. Layers never ask; they call `einsum`."""

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
        """Contracts activation `x` with weight `w`; fp32 operands are multiplied in full precision."""
        precision = jax.lax.Precision.HIGHEST if self.dtype == "float32" else None
        return jnp.einsum(spec, x.astype(self.dtype), self.weight(w), precision=precision)

    def cast(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The activation in this policy's dtype."""
        return x.astype(self.dtype)

    def weight(self, w: Weight) -> Float[Array, "..."]:
        """The weight in this policy's dtype; quantised ones are widened."""
        return w.widened(self.dtype) if isinstance(w, QuantizedWeight) else w.astype(self.dtype)
