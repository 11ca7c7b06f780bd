"""LASP+: lightning attention over a split sequence (report §3.2.2; model.md 4.9; INV-37, INV-38).

Every rank computes the state that each of its stripes leaves behind, one all-gather of [stripes, B, N, H, H] fp32
brings all of them to all ranks, each sums the earlier ones with their decay, and the kernel runs on the rank's own
tokens with that state at the entrance. The backward is the mirror image: one all-gather of what each stripe's outputs
say about the state entering it, summed over the later stripes. Bytes do not depend on the length.

The state at the entrance carries a checkpoint name that every policy of rematerialisation keeps, so that the backward
does not gather it again.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.arrays import dot
from pallas_kernels.lightning import (
    border_ids,
    canonical_segment_ids,
    chunk_state,
    continuations,
    lightning_backward,
)
from pallas_kernels.lightning import lightning_attention as local_attention
from parallel.stripes import STRIPES, gather_stripes, gather_tokens, on_ranks, own_stripes, partition, split

ENTERING_STATE = "entering_state"
"""Checkpoint name of the states [B, W, N, H, H] fp32 that enter the stripes; every remat policy must keep it."""

_ROWS = ("batch", "sequence")
_HEADS = ("batch", "sequence", "heads", None)
_STATES = ("batch", "sequence", "heads", None, None)
_AGES = ("batch", "sequence", None)


class Passage(NamedTuple):
    """Which states reach which stripes; the same for all layers, computed once from the segment ids.

    W stripes, of which every rank holds the rows of its own. An entry counts the real tokens between two stripes, by
    which the state decays on its way; -1 where a document's border or the order of time keeps it out.
    """

    entering: Int[Array, "B W W"]
    """[b, w, j]: from the end of stripe j to the beginning of stripe w."""
    leaving: Int[Array, "B W W"]
    """[b, w, j]: from the end of stripe w to the beginning of stripe j."""


def passage(segment_ids: Int[Array, "B T"], order: str) -> Passage:
    """Returns the passage of rows whose tokens lie on the ranks as `order` says (`stripes.arrange`)."""

    def local(ids: Array) -> tuple[Array, Array]:
        tokens = split(ids, order).shape[2]
        ages = stripe_ages(gather_tokens(ids, order).reshape(ids.shape[0], -1, tokens))
        mine = own_stripes(order)
        return jnp.take(ages, mine, axis=1), jnp.take(ages, mine, axis=2).swapaxes(1, 2)

    ages = partition(*_AGES)
    return Passage(*jax.shard_map(local, in_specs=(partition(*_ROWS),), out_specs=(ages, ages))(segment_ids))


def stripe_ages(segment_ids: Int[Array, "B W C"]) -> Int[Array, "B W W"]:
    """Counts for stripes w and j the real tokens between the end of j and the beginning of w, -1 if no state passes.

    A state passes when stripe w continues the segment in which j ended and no segment starts in the stripes between
    (`pallas_kernels.lightning.continuations`).
    """
    batch, stripes, tokens = segment_ids.shape
    rows = segment_ids.reshape(-1, tokens)
    borders = (x.reshape(batch, stripes).T for x in border_ids(rows))
    continues = continuations(*borders).T
    one_segment = canonical_segment_ids(rows).max(axis=1).reshape(batch, stripes) <= 1
    obstacles = jnp.cumsum(~(continues & one_segment), axis=1, dtype=jnp.int32)
    real = jnp.cumsum((segment_ids > 0).sum(axis=2), axis=1, dtype=jnp.int32)

    def between(total: Array) -> Array:
        """Sums over the stripes after j and before w, from inclusive running sums."""
        before = jnp.pad(total[:, :-1], ((0, 0), (1, 0)))
        return before[:, :, None] - total[:, None, :]

    index = jnp.arange(stripes, dtype=jnp.int32)
    passes = (index[:, None] > index[None, :]) & continues[:, :, None] & (between(obstacles) == 0)
    return jnp.where(passes, between(real), -1)


def lightning_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    slopes: Float[Array, " N"],
    segment_ids: Int[Array, "B T"],
    passage: Passage,
    *,
    order: str,
) -> Float[Array, "B T N H"]:
    """Computes `pallas_kernels.lightning.lightning_attention` with T split over the sequence axis of the mesh in use.

    Batch and heads stay split as `Rules` says, also where the sequence axis has size 1.

    Args:
      q, k, v, slopes: as there.
      segment_ids: int32, 0 is padding; in the order of the tokens.
      passage: that of the segment ids and the order.
      order: how the tokens lie on the ranks, a key of `stripes.STRIPES`.
    """
    return _attention(order, q, k, v, slopes, segment_ids, passage)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(order: str, q: Array, k: Array, v: Array, slopes: Array, segment_ids: Array, passage: Passage) -> Array:
    return _forward(order, q, k, v, slopes, segment_ids, passage)[0]


def _forward(
    order: str, q: Array, k: Array, v: Array, slopes: Array, segment_ids: Array, passage: Passage
) -> tuple[Array, tuple]:
    def local(q: Array, k: Array, v: Array, slopes: Array, ids: Array, entering: Array) -> Array:
        rows = partial(_as_rows, order=order)
        o = local_attention(rows(q), rows(k), rows(v), slopes, segment_ids=rows(ids), initial_state=_of_rows(entering))
        return o.reshape(q.shape)

    entering = _exchange(k, v, slopes, segment_ids, passage.entering, order=order, reverse=False)
    entering = checkpoint_name(entering, ENTERING_STATE)
    tokens, rates, rows, states = partition(*_HEADS), partition("heads"), partition(*_ROWS), partition(*_STATES)
    mix = on_ranks(local, in_specs=(tokens, tokens, tokens, rates, rows, states), out_specs=tokens)
    o = mix(q, k, v, slopes, segment_ids, entering)
    return o, (q, k, v, slopes, segment_ids, passage, entering)


def _backward(order: str, saved: tuple, do: Array) -> tuple:
    q, k, v, slopes, segment_ids, passage, entering = saved

    def local(
        q: Array, k: Array, v: Array, slopes: Array, ids: Array, do: Array, entering: Array, dleaving: Array
    ) -> tuple[Array, ...]:
        rows = partial(_as_rows, order=order)
        gradients = lightning_backward(
            rows(q), rows(k), rows(v), slopes, rows(do), _of_rows(dleaving),
            segment_ids=rows(ids), initial_state=_of_rows(entering),
        )  # fmt: skip
        return tuple(gradient.reshape(q.shape) for gradient in gradients[:3])

    dleaving = _exchange(q, do, slopes, segment_ids, passage.leaving, order=order, reverse=True)
    tokens, rates, rows, states = partition(*_HEADS), partition("heads"), partition(*_ROWS), partition(*_STATES)
    specs = (tokens, tokens, tokens, rates, rows, tokens, states, states)
    mix = on_ranks(local, in_specs=specs, out_specs=(tokens,) * 3)
    return *mix(q, k, v, slopes, segment_ids, do, entering, dleaving), None, None, None


_attention.defvjp(_forward, _backward)


def _exchange(
    k: Array, v: Array, slopes: Array, segment_ids: Array, ages: Array, *, order: str, reverse: bool
) -> Float[Array, "B W N H H"]:
    """Sums for every stripe the states of `chunk_state` that reach it, `ages` saying how old they are by then."""

    def local(k: Array, v: Array, slopes: Array, ids: Array, ages: Array) -> Array:
        rows = partial(_as_rows, order=order)
        own, _ = chunk_state(rows(k), rows(v), slopes, segment_ids=rows(ids), reverse=reverse)
        own = own.reshape(k.shape[0], STRIPES[order], *own.shape[1:])
        states = gather_stripes(own.swapaxes(0, 1))
        age = ages[:, :, None, :].astype(states.dtype)
        weights = jnp.where(age >= 0, jnp.exp(-slopes.astype(states.dtype)[:, None] * age), 0)
        return dot("bwnj,jbnkv->bwnkv", weights, states)

    tokens, states = partition(*_HEADS), partition(*_STATES)
    specs = (tokens, tokens, partition("heads"), partition(*_ROWS), partition(*_AGES))
    return on_ranks(local, in_specs=specs, out_specs=states)(k, v, slopes, segment_ids, ages)


def _as_rows(x: Array, order: str) -> Array:
    """[B, T, ...] -> [B s, T / s, ...]: a rank's stripes as rows of their own."""
    return x.reshape(x.shape[0] * STRIPES[order], -1, *x.shape[2:])


def _of_rows(states: Array) -> Array:
    """[B, s, N, H, H] -> [B s, N, H, H]."""
    return states.reshape(-1, *states.shape[2:])
