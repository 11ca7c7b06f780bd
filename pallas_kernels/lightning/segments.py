"""What rows of segment ids say: which tokens are real, where segments begin, which pieces of a row continue another.

Id 0 (or less) is padding. A real token whose id differs from that of the row's previous real token starts a segment.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


def canonical_segment_ids(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Numbers each row's segments 1, 2, 3 .. in order of appearance; padding stays 0 (implementation.py says why)."""
    previous = _latest(segment_ids, axis=1)
    starts = (segment_ids > 0) & (segment_ids != previous)
    return jnp.where(segment_ids > 0, jnp.cumsum(starts, axis=1), 0).astype(jnp.int32)


def border_ids(segment_ids: Int[Array, "B T"]) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Returns the ids of each row's first and last real token, 0 and 0 for a row that is all padding."""
    real = segment_ids > 0
    first = jnp.argmax(real, axis=1)
    last = real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    # A row of padding gives index 0 for both, where its id is 0.
    take = functools.partial(jnp.take_along_axis, segment_ids, axis=1)
    return take(first[:, None])[:, 0], take(last[:, None])[:, 0]


def continuations(first: Int[Array, "W B"], last: Int[Array, "W B"]) -> Bool[Array, "W B"]:
    """Says which of W consecutive pieces of a row continue the segment in which the pieces before them ended.

    `first` and `last` are the pieces' `border_ids`. A piece of padding alone continues (and transmits everything), and
    so does a row's first piece with real tokens. For LASP+ (INV-38) the state entering piece w is

        S(w) = c(w) * sum over j < w of state(j) * product over j < i < w of c(i) * transmission(i)

    with c the result here and (state, transmission) from `chunk_state`.
    """
    arriving = _latest(last, axis=0)
    return (first <= 0) | (arriving <= 0) | (first == arriving)


def _latest(ids: jax.Array, axis: int) -> jax.Array:
    """Returns for each position the last positive id before it, 0 where there is none."""
    latest = lax.associative_scan(lambda old, new: jnp.where(new > 0, new, old), ids, axis=axis)
    shifted = jnp.roll(jnp.maximum(latest, 0), 1, axis=axis)
    return jnp.where(lax.broadcasted_iota(jnp.int32, ids.shape, axis) > 0, shifted, 0)
