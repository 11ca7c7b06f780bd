"""Log-probabilities of given tokens, without the logits of a whole vocabulary."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmx_jax.model.likelihood import SeenLogits

LOGITS_AT_ONCE = 1 << 26
"""At most about so many fp32 logits exist at a time (256 MiB)."""


def vocabulary_chunk(tokens: int, vocab_size: int) -> int:
    """Vocabulary entries that are scored at once for so many tokens."""
    return min(max(LOGITS_AT_ONCE // tokens, 128), vocab_size)


def token_log_probs(
    hidden: Float[Array, "B T D"], weight: Float[Array, "D V"], targets: Int[Array, "B T"], chunk: int
) -> Float[Array, "B T"]:
    """log softmax(hidden weight)[target] of every token, all in fp32 (INV-40), `chunk` vocabulary entries at a time.

    The last chunk is moved back to end with the vocabulary; entries that it shares with the one before count once.
    """
    V = weight.shape[1]
    rows, weight = hidden.astype(jnp.float32), weight.astype(jnp.float32)

    def step(index: Array, seen: SeenLogits) -> SeenLogits:
        start = jnp.minimum(index * chunk, V - chunk)
        part = jax.lax.dynamic_slice_in_dim(weight, start, chunk, axis=1)
        logits = jnp.einsum("BTD,DC->BTC", rows, part, precision=jax.lax.Precision.HIGHEST)
        logits = jnp.where(start + jnp.arange(chunk) >= index * chunk, logits, -jnp.inf)
        here = (targets >= index * chunk) & (targets < start + chunk)
        return seen.with_part(logits, jnp.where(here, targets - start, -1))

    seen = jax.lax.fori_loop(0, -(-V // chunk), step, SeenLogits.none(targets.shape))
    return seen.chosen - seen.log_sum
