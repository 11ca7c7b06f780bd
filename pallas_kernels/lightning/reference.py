"""Lightning attention written down as it is defined: the oracle, slow on purpose.

`RECURRENCE` goes token by token (model.md 4.4), `DENSE` holds the whole [T, T] mask. Both compute in fp32, in fp64 for
fp64 arguments, and leave the backward to autodiff.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lightning.decode import decode_step as _decode_step
from pallas_kernels.lightning.implementation import Heads, Operation, SegmentIds, Slopes, State, Token

Forward = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def recurrence(
    q: Heads, k: Heads, v: Heads, slopes: Slopes, segment_ids: SegmentIds, initial_state: State
) -> tuple[Heads, State]:
    """Returns output and last state by S_t = exp(-slope) S_{t-1} + k_t v_t^T, o_t = q_t^T S_t."""
    decay = jnp.exp(-slopes)[:, None, None]

    def step(
        carry: tuple[jax.Array, jax.Array], token: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        state, current = carry
        query, key, value, segment = token
        real = (segment > 0)[:, None, None, None]
        kept = jnp.where((segment == current)[:, None, None, None], decay * state, 0)
        state = jnp.where(real, kept + key[..., :, None] * value[..., None, :], state)
        output = jnp.where(real, query[..., None, :] @ state, 0)[..., 0, :]
        return (state, jnp.where(segment > 0, segment, current)), output

    tokens = tuple(x.swapaxes(0, 1) for x in (q, k, v, segment_ids))
    (state, _), o = lax.scan(step, (initial_state, jnp.ones_like(segment_ids[:, 0])), tokens)
    return o.swapaxes(0, 1), state


def dense(
    q: Heads, k: Heads, v: Heads, slopes: Slopes, segment_ids: SegmentIds, initial_state: State
) -> tuple[Heads, State]:
    """Returns output and last state by o = ((q k^T) * mask) v with mask [B, N, T, T]."""
    real = segment_ids > 0
    rank = jnp.cumsum(real, axis=1)
    age = rank[:, :, None] - rank[:, None, :]
    seen = (segment_ids[:, :, None] == segment_ids[:, None, :]) & real[:, None, :] & jnp.tri(rank.shape[1], dtype=bool)
    mask = jnp.where(seen[:, None], jnp.exp(-slopes[:, None, None] * jnp.where(seen, age, 0)[:, None]), 0)
    first = jnp.where((segment_ids == 1)[..., None], jnp.exp(-slopes * rank[..., None]), 0)
    o = jnp.einsum("btnh,bsnh,bnts,bsnv->btnv", q, k, mask, v)
    o = o + jnp.einsum("btnh,btn,bnhv->btnv", q, first, initial_state)
    last = jnp.maximum(jnp.max(segment_ids, axis=1, keepdims=True), 1)
    total = rank[:, -1:]
    weight = jnp.where((segment_ids == last)[..., None], jnp.exp(-slopes * (total - rank)[..., None]), 0)
    state = jnp.einsum("bsnh,bsn,bsnv->bnhv", k, weight, v)
    passed = jnp.where(last == 1, jnp.exp(-slopes * total), 0)
    return o, state + passed[..., None, None] * initial_state


@dataclasses.dataclass(frozen=True)
class Oracle:
    """An implementation made of one forward function; gradients are autodiff's."""

    function: Forward

    def supports(
        self, operation: Operation, shape: tuple[int, int, int, int], dtype: object, *, packed: bool
    ) -> str | None:
        """Every call can run here, given time."""
        return None

    def forward(
        self, q: Heads, k: Heads, v: Heads, slopes: Slopes, segment_ids: SegmentIds | None, initial_state: State | None
    ) -> tuple[Heads, State]:
        """Returns the output in q's dtype and the last state."""
        dtype = jnp.promote_types(q.dtype, jnp.float32)
        batch, length, heads, dim = q.shape
        if segment_ids is None:
            segment_ids = jnp.ones((batch, length), jnp.int32)
        if initial_state is None:
            initial_state = jnp.zeros((batch, heads, dim, dim), dtype)
        wide = (q.astype(dtype), k.astype(dtype), v.astype(dtype), slopes.astype(dtype))
        with jax.default_matmul_precision("highest"):
            o, state = self.function(*wide, segment_ids, initial_state.astype(dtype))
        return o.astype(q.dtype), state

    def backward(
        self,
        q: Heads,
        k: Heads,
        v: Heads,
        slopes: Slopes,
        segment_ids: SegmentIds | None,
        initial_state: State | None,
        do: Heads,
        dstate: State | None,
    ) -> tuple[Heads, Heads, Heads, State]:
        """Returns dq, dk, dv and the gradient of the initial state."""
        batch, _, heads, dim = q.shape
        zeros = jnp.zeros((batch, heads, dim, dim), jnp.promote_types(q.dtype, jnp.float32))
        initial_state = zeros if initial_state is None else initial_state
        _, pullback = jax.vjp(
            lambda q, k, v, state: self.forward(q, k, v, slopes, segment_ids, state), q, k, v, initial_state
        )
        return pullback((do, zeros if dstate is None else dstate))

    def chunk_state(self, k: Heads, v: Heads, slopes: Slopes, segment_ids: SegmentIds | None, reverse: bool) -> State:
        """Returns the last state of these tokens, or the gradient that their outputs send to the first."""
        zeros = jnp.zeros_like(k)
        if reverse:
            return self.backward(k, zeros, zeros, slopes, segment_ids, None, v, None)[3]
        return self.forward(zeros, k, v, slopes, segment_ids, None)[1]

    def decode_step(
        self, q: Token, k: Token, v: Token, state: jax.Array, slopes: Slopes, slots: jax.Array | None
    ) -> tuple[Token, jax.Array]:
        """Advances one token per row."""
        return _decode_step(q, k, v, state, slopes, slots)


RECURRENCE = Oracle(recurrence)
DENSE = Oracle(dense)
