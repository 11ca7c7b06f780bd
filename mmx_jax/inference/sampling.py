"""From logits to the next token: which ids may be sampled at all, and how one of them is chosen."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mmx_jax.config import ModelConfig
from mmx_jax.config.checks import at_least, fail
from mmx_jax.model.dot import Weight

LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-30, 1e30
SEEDS = 1 << 32


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen. The default is greedy.

    Filters apply to the distribution at `temperature`, in the order top-k, top-p, min-p; the likeliest id always stays.
    """

    temperature: float = 0.0
    """0 takes the likeliest id; 1 samples from the model's own distribution."""
    top_k: int | None = None
    """Only so many of the likeliest ids."""
    top_p: float = 1.0
    """Only the likeliest ids that together reach this probability."""
    min_p: float = 0.0
    """Only ids at least this share as likely as the likeliest one."""
    seed: int = 0
    """The tokens of a prompt depend on the seed and the prompt's place in the list, not on its neighbours."""

    def __post_init__(self) -> None:
        at_least(self, 0, "temperature", "seed")
        at_least(self, 1, "top_k")
        # Beyond these bounds fp32 makes 0 / 0 or inf / inf of a logit, and a barred id could be drawn (INV-41).
        if self.temperature and not LEAST_TEMPERATURE <= self.temperature <= MOST_TEMPERATURE:
            fail(self, "temperature", f"must be 0, or from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}")
        if self.seed >= SEEDS:
            fail(self, "seed", f"must be below 2^32 = {SEEDS}")
        if not 0 < self.top_p <= 1:
            fail(self, "top_p", "must be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            fail(self, "min_p", "must be in [0, 1]")


GREEDY = SamplingConfig()


def trained_ids(config: ModelConfig, params: Mapping[str, Weight]) -> Bool[Array, " V"]:
    """Ids that may be sampled: those with a trained row (INV-41).

    An id is barred from `trained_vocab_size` on, or when its row of the embedding or of the head is all zero: its logit
    of exactly 0 would win whenever every real logit is negative.

    Raises:
      ValueError: if no id is left.
    """
    embedding, head = (jnp.asarray(params[name]) for name in ("embedding", "head"))
    with_rows = head.any(axis=0) & embedding.any(axis=1)
    ids = jnp.arange(config.vocab_size)
    allowed = with_rows & (ids < (config.trained_vocab_size or config.vocab_size))
    if not bool(allowed.any()):
        raise ValueError(
            "no id can be sampled: every row of 'embedding' or 'head' below trained_vocab_size "
            f"= {config.trained_vocab_size or config.vocab_size} is zero; are the weights loaded?"
        )
    return allowed


def row_keys(seed: int, request: Int[Array, " B"], count: Int[Array, " B"]) -> Key[Array, " B"]:
    """One key for each row, from the seed, the request that the row serves and the tokens it has so far."""
    base = jax.random.key(seed)
    return jax.vmap(lambda r, c: jax.random.fold_in(jax.random.fold_in(base, r), c))(request, count)


def sample(
    logits: Float[Array, "B V"], allowed: Bool[Array, " V"], keys: Key[Array, " B"], config: SamplingConfig
) -> Int[Array, " B"]:
    """Chooses one allowed id for each row.

    Args:
      logits: fp32.
      allowed: ids that may be sampled (`trained_ids`).
      keys: one key for each row; unused when greedy.
      config: how to choose.
    """
    logits = jnp.where(allowed, logits, -jnp.inf)
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The largest logit is subtracted first: a tiny temperature then gives 0 and -inf, never inf - inf.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / config.temperature
    if config.top_k is None and config.top_p == 1:
        ids = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
    else:
        logits, ids = jax.lax.top_k(logits, min(config.top_k or logits.shape[-1], logits.shape[-1]))
        probs = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        logits = jnp.where((before < config.top_p) | (jnp.arange(logits.shape[-1]) == 0), logits, -jnp.inf)
    if config.min_p > 0:
        logits = jnp.where(logits >= jnp.log(config.min_p), logits, -jnp.inf)
    choice = jax.vmap(jax.random.categorical)(keys, logits)
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
