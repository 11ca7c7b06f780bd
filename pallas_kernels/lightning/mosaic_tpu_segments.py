"""Segment ids as the TPU kernels read them: what each chunk needs to know about boundaries and padding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

PLAIN, FRESH, MIXED = 0, 1, 2
PADDING = -1.0


class ChunkRuns(NamedTuple):
    """Boundaries of every chunk, relative to the state that enters it.

    - `modes` [B*chunks]: PLAIN, all tokens are real and continue the incoming segment (constant-decay fast path);
      FRESH, all tokens are real and of one new segment (the fast path after forgetting the state); MIXED, the rest.
    - `runs` [B, 2, chunks*C]: per token, its segment id minus that of the incoming state (PADDING for padding and for
      places past the end), and its age: the number of real tokens of its chunk up to and including it.
    """

    modes: Int[Array, " chunks"]
    runs: Float[Array, "B 2 padded"]


def chunk_runs(segment_ids: Int[Array, "B T"], chunk: int) -> ChunkRuns:
    """Describes canonical segment ids (implementation.py) chunk by chunk; a ragged last chunk ends in padding."""
    batch, length = segment_ids.shape
    count = -(-length // chunk)
    ids = jnp.pad(segment_ids, ((0, 0), (0, count * chunk - length))).reshape(batch, count, chunk)
    real = ids > 0
    # Ids never decrease, so the newest segment is the largest one; before any real token it is the first.
    newest = jax.lax.cummax(jnp.maximum(ids.max(axis=2), 1), axis=1)
    incoming = jnp.concatenate([jnp.ones((batch, 1), ids.dtype), newest[:, :-1]], axis=1)[:, :, None]
    uniform = (ids == ids[:, :, :1]).all(axis=2) & real[:, :, 0]
    same = ids[:, :, 0] == incoming[:, :, 0]
    modes = jnp.where(uniform, jnp.where(same, PLAIN, FRESH), MIXED)
    run = jnp.where(real, (ids - incoming).astype(jnp.float32), PADDING)
    # A product with a triangle, exact in bf16: the TPU compiler takes half a minute over a cumsum of a million tokens.
    triangle = jnp.triu(jnp.ones((chunk, chunk), jnp.bfloat16))
    age = jnp.einsum("bcj,ji->bci", real.astype(jnp.bfloat16), triangle, preferred_element_type=jnp.float32)
    runs = jnp.stack([run, age], axis=1).reshape(batch, 2, count * chunk)
    return ChunkRuns(modes.reshape(-1).astype(jnp.int32), runs)
