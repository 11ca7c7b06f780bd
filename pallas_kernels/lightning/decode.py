"""One token of lightning attention per row, in plain XLA."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.lightning.implementation import Slopes, Token


def decode_step(
    q: Token, k: Token, v: Token, state: jax.Array, slopes: Slopes, slots: Int[Array, " B"] | None
) -> tuple[Token, jax.Array]:
    """Returns the output [B, N, H] and the state with the rows of these tokens advanced.

    Products and sums are elementwise, so that XLA reads and writes a state once, in place where the caller donates it.
    """
    pool = state.shape[0]
    rows = state if slots is None else state[jnp.clip(slots, 0, pool - 1)]
    query, key, value = (x.astype(state.dtype) for x in (q, k, v))
    decay = jnp.exp(-slopes.astype(state.dtype))[:, None, None]
    rows = decay * rows + key[..., :, None] * value[..., None, :]
    o = jnp.sum(query[..., :, None] * rows, axis=-2)
    if slots is None:
        return o.astype(q.dtype), rows
    held = (slots >= 0) & (slots < pool)
    o = jnp.where(held[:, None, None], o, 0).astype(q.dtype)
    return o, state.at[jnp.where(held, slots, pool)].set(rows, mode="drop")
