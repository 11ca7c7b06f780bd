"""Lightning attention in plain XLA: chunks in parallel inside a block, blocks in sequence, so that memory is flat in T.

Within a chunk of C tokens (model.md 4.5, convention (a)), with S the state entering it:

    o = ((q k^T) * mask) v + query * (q S)        S' = transmission * S + (key * k)^T v

`Decay` holds the four factors. No exponential ever has a positive argument. Packed rows and padding change the factors
only: tokens age by the number of real tokens between them, and factors across a segment border are 0.
The backward (model.md 4.6) keeps q, k and v alone and computes every state again.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.arrays import accumulator, dot, varying_like
from pallas_kernels.lightning.decode import decode_step as decode_step
from pallas_kernels.lightning.implementation import Heads, Operation, SegmentIds, Slopes, State

BLOCK_BYTES = 256 << 20
"""The scores and states of one block of chunks take at most about this much memory."""


Walked = tuple[jax.Array, tuple[jax.Array, ...]]
"""The state after a block, and the outputs [B, M, C, N, H] of its tokens."""


class Decay(NamedTuple):
    """The decay factors of M chunks of C tokens, fp32; B or M is 1 where all rows or chunks agree.

    mask: [B, M, N, C, C], the weight of a key (last axis) for a query.
    query: [B, M, C, N], the weight of the entering state. key: [B, M, C, N], the weight of a key in the leaving state.
    transmission: [B, M, N], how much of the entering state leaves again.
    """

    mask: jax.Array
    query: jax.Array
    key: jax.Array
    transmission: jax.Array


class Tokens(NamedTuple):
    """Tokens cut into M chunks of C: `arrays` [B, M, C, N, H] and what their decay depends on.

    ids: [B, M, C] canonical segment ids, None when unpacked. before: [B, M], the segment that a chunk continues.
    real: [1, M], real tokens in each chunk of an unpacked row.
    """

    arrays: tuple[jax.Array, ...]
    ids: jax.Array | None
    before: jax.Array | None
    real: jax.Array


def supports(operation: Operation, shape: tuple[int, int, int, int], dtype: object, *, packed: bool) -> str | None:
    """Every call can run here."""
    return None


def chunk_length(length: int) -> int:
    """Returns the chunk length for T tokens: the fastest one of the platform, less for short rows."""
    fastest = {"cpu": 64, "tpu": 256}.get(dispatch.platform(), 128)
    return min(fastest, max(1, math.ceil(length / 8)) * 8)


def forward(
    q: Heads, k: Heads, v: Heads, slopes: Slopes, segment_ids: SegmentIds | None, initial_state: State | None
) -> tuple[Heads, State]:
    """Returns the output in q's dtype and the state after each row's last real token."""
    dtype = accumulator(q)

    def block(state: jax.Array, tokens: Tokens) -> Walked:
        query, key, value = tokens.arrays
        decay = _decay(slopes.astype(dtype), tokens)
        entering, leaving = _entering(_weighted_outer(key, value, decay.key), decay.transmission, state)
        carried = dot("bmcnh,bmnhv->bmcnv", query, entering.astype(q.dtype)) * decay.query[..., None]
        scores = (dot("bmcnh,bmdnh->bmncd", query, key) * decay.mask).astype(q.dtype)
        return leaving, ((carried + dot("bmncd,bmdnh->bmcnh", scores, value)).astype(q.dtype),)

    state, (o,) = _walk(block, _state(initial_state, q, k, v, slopes), (q, k, v), segment_ids)
    return o, state


def backward(
    q: Heads,
    k: Heads,
    v: Heads,
    slopes: Slopes,
    segment_ids: SegmentIds | None,
    initial_state: State | None,
    do: Heads,
    dstate: State | None,
) -> tuple[Heads, Heads, Heads, State]:
    """Returns dq, dk, dv and the gradient of the initial state.

    dq is the forward itself on (do, v, k), the state transposed; dk and dv walk backwards with the state's gradient.
    """
    dtype = accumulator(q)
    transposed = None if initial_state is None else initial_state.swapaxes(-1, -2)
    dq, _ = forward(do, v, k, slopes, segment_ids, transposed)

    def block(dleaving: jax.Array, tokens: Tokens) -> Walked:
        query, key, value, doutput = tokens.arrays
        decay = _decay(slopes.astype(dtype), tokens)
        arriving, dentering = _entering(
            _weighted_outer(query, doutput, decay.query), decay.transmission, dleaving, reverse=True
        )
        arriving = arriving.astype(q.dtype)
        dscores = (dot("bmcnh,bmdnh->bmncd", doutput, value) * decay.mask).astype(q.dtype)
        scores = (dot("bmcnh,bmdnh->bmncd", query, key) * decay.mask).astype(q.dtype)
        dk = dot("bmcnv,bmnhv->bmcnh", value, arriving) * decay.key[..., None]
        dv = dot("bmcnh,bmnhv->bmcnv", key, arriving) * decay.key[..., None]
        dk = dk + dot("bmncd,bmcnh->bmdnh", dscores, query)
        dv = dv + dot("bmncd,bmcnh->bmdnh", scores, doutput)
        return dentering, (dk.astype(q.dtype), dv.astype(q.dtype))

    dstate = _state(dstate, q, k, v, slopes)
    dinitial_state, (dk, dv) = _walk(block, dstate, (q, k, v, do), segment_ids, reverse=True)
    return dq, dk, dv, dinitial_state


def chunk_state(k: Heads, v: Heads, slopes: Slopes, segment_ids: SegmentIds | None, reverse: bool) -> State:
    """Returns the state that the tokens alone leave, or with `reverse` on (q, do) its gradient's mirror image."""
    length = k.shape[1]
    if segment_ids is None:
        rank = jnp.arange(1, length + 1)[None]
        member, total = jnp.ones_like(rank, bool), rank[:, -1:]
    else:
        rank = jnp.cumsum(segment_ids > 0, axis=1)
        border = 1 if reverse else jnp.max(segment_ids, axis=1, keepdims=True, initial=0)
        member, total = (segment_ids == border) & (segment_ids > 0), rank[:, -1:]
    age = jnp.where(member, rank if reverse else total - rank, 0)
    weight = jnp.where(member[..., None], jnp.exp(-slopes.astype(accumulator(k)) * age[..., None]), 0)
    return dot("btnh,btnv->bnhv", (k * weight[..., None]).astype(k.dtype), v)


def _weighted_outer(k: jax.Array, v: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns the state [B, M, N, H, H] that each chunk adds."""
    return dot("bmcnh,bmcnv->bmnhv", (k * weight[..., None]).astype(k.dtype), v)


def _entering(
    added: jax.Array, transmission: jax.Array, state: jax.Array, reverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Returns the state [B, M, N, H, H] entering each chunk and the one [B, N, H, H] leaving the last."""

    def step(state: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        factor, term = chunk
        return factor[..., None, None] * state + term, state

    chunks = (transmission.swapaxes(0, 1), added.swapaxes(0, 1))
    leaving, entering = lax.scan(step, state, chunks, reverse=reverse)
    return entering.swapaxes(0, 1), leaving


def _decay(slopes: jax.Array, tokens: Tokens) -> Decay:
    """Builds the factors of a block's chunks."""
    chunk = tokens.arrays[0].shape[2]
    index = jnp.arange(chunk)
    causal = index[:, None] >= index[None, :]
    if tokens.ids is None or tokens.before is None:
        rank, real = (index + 1)[None, None], tokens.real
        same, continues, survives = causal[None, None], jnp.ones((1, 1, chunk), bool), index < real[..., None]
        passes = jnp.ones_like(real, bool)
    else:
        ids, before = tokens.ids, tokens.before
        rank, real = jnp.cumsum(ids > 0, axis=-1), jnp.sum(ids > 0, axis=-1)
        last = jnp.maximum(before, jnp.max(ids, axis=-1))
        same = causal & (ids[..., :, None] == ids[..., None, :]) & (ids > 0)[..., None, :]
        continues, survives = ids == before[..., None], ids == last[..., None]
        passes = last == before
    rates = jnp.maximum(slopes, jnp.finfo(slopes.dtype).tiny)  # 0 times an infinite age would be NaN

    def exponent(age: jax.Array, where: jax.Array) -> jax.Array:
        # Behind the barrier XLA keeps the ages; else it computes them again for each head (3x the time on a CPU).
        return lax.optimization_barrier(jnp.where(where, -age.astype(rates.dtype), -jnp.inf))

    ages = exponent(rank[..., :, None] - rank[..., None, :], same)
    return Decay(
        mask=jnp.exp(rates[:, None, None] * ages[:, :, None]),
        query=jnp.exp(rates * exponent(rank, continues)[..., None]),
        key=jnp.exp(rates * exponent(real[..., None] - rank, survives)[..., None]),
        transmission=jnp.exp(rates * exponent(real, passes)[..., None]),
    )


def _state(state: jax.Array | None, q: jax.Array, *others: jax.Array) -> jax.Array:
    """Returns the state or zeros, varying over the same manual mesh axes as the tokens, as a scan's carry must."""
    batch, _, heads, dim = q.shape
    if state is None:
        state = jnp.zeros((batch, heads, dim, dim), accumulator(q))
    return varying_like(state.astype(accumulator(q)), q, *others)


def _walk(
    block: Callable[[jax.Array, Tokens], Walked],
    carry: jax.Array,
    arrays: tuple[jax.Array, ...],
    segment_ids: jax.Array | None,
    reverse: bool = False,
) -> Walked:
    """Cuts the tokens into chunks, walks over blocks of chunks, and joins the blocks' outputs to [B, T, N, H].

    A block gives one output walking forwards (o) and two walking backwards (dk, dv).
    """
    batch, length, heads, dim = arrays[0].shape
    chunk = chunk_length(length)
    chunks = max(1, math.ceil(length / chunk))
    bytes_per_chunk = max(1, 4 * batch * heads * (chunk * chunk + dim * dim))
    blocks = math.ceil(chunks / max(1, BLOCK_BYTES // bytes_per_chunk))
    per_block = math.ceil(chunks / blocks)
    tokens = _cut(arrays, segment_ids, chunk, blocks * per_block)
    if blocks == 1:
        carry, outputs = block(carry, tokens)
    else:
        # The outputs grow in place, in the arrays' own order: stacking would need a transposed copy of each.
        empty = varying_like(jnp.zeros_like(tokens.arrays[0]), carry)
        outputs = (empty,) * (2 if reverse else 1)

        def step(i: jax.Array, walked: Walked) -> Walked:
            carry, outputs = walked
            start = (blocks - 1 - i if reverse else i) * per_block
            carry, parts = block(carry, _slice(tokens, start, per_block))
            return carry, tuple(lax.dynamic_update_slice_in_dim(o, p, start, 1) for o, p in zip(outputs, parts))

        carry, outputs = lax.fori_loop(0, blocks, step, (carry, outputs))
    return carry, tuple(o.reshape(batch, blocks * per_block * chunk, heads, dim)[:, :length] for o in outputs)


def _cut(arrays: tuple[jax.Array, ...], segment_ids: jax.Array | None, chunk: int, chunks: int) -> Tokens:
    """Pads the tokens at the end to M chunks of C."""
    batch, length = arrays[0].shape[:2]
    padding = chunks * chunk - length

    def pad(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) if padding else x
        return x.reshape(batch, chunks, chunk, *x.shape[2:])

    real = jnp.clip(length - chunk * jnp.arange(chunks), 0, chunk)[None]
    if segment_ids is None:
        return Tokens(tuple(map(pad, arrays)), None, None, real)
    ids = pad(segment_ids)
    last = jnp.maximum(lax.cummax(jnp.max(ids, axis=2), axis=1), 1)
    before = jnp.concatenate([jnp.ones_like(last[:, :1]), last[:, :-1]], axis=1)
    return Tokens(tuple(map(pad, arrays)), ids, before, real)


def _slice(tokens: Tokens, start: jax.Array | int, size: int) -> Tokens:
    """Takes `size` chunks from `start` on."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, 1), tokens)
