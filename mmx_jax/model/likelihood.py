"""log softmax of a token over a vocabulary that is seen a part at a time."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int


class SeenLogits(NamedTuple):
    """What the logits seen so far come to, for tokens [B, T]; all fp32."""

    highest: Float32[Array, "B T"]
    total: Float32[Array, "B T"]
    """Sum of exp(logit - highest)."""
    chosen: Float32[Array, "B T"]
    """The target's logit; 0 as long as it was not seen."""

    @classmethod
    def none(cls, shape: tuple[int, ...]) -> "SeenLogits":
        """Before the first part."""
        zeros = jnp.zeros(shape, jnp.float32)
        return cls(jnp.full_like(zeros, -jnp.inf), zeros, zeros)

    def with_part(self, logits: Float32[Array, "B T C"], place: Int[Array, "B T"]) -> "SeenLogits":
        """After one more part.

        Args:
          logits: of C entries of the vocabulary; -inf for those that do not count.
          place: where among them the target is; -1 for a target that is not.
        """
        highest = jnp.maximum(self.highest, logits.max(axis=-1))
        total = self.total * jnp.exp(self.highest - highest) + jnp.exp(logits - highest[..., None]).sum(axis=-1)
        found = jnp.take_along_axis(logits, jnp.maximum(place, 0)[..., None], axis=-1)[..., 0]
        return SeenLogits(highest, total, self.chosen + jnp.where(place >= 0, found, 0.0))

    @property
    def log_sum(self) -> Float32[Array, "B T"]:
        """log of the sum of exp(logit)."""
        return self.highest + jnp.log(self.total)
