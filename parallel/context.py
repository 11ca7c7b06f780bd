"""Softmax attention over a split sequence: keys and values travel, by one all-gather or around a ring (INV-39).

"gather" brings all keys and values to every rank once forward and once backward, where their gradients are summed and
scattered. "ring" passes the ranks' blocks around, P - 1 hops forward and P backward, so that no rank ever holds a
whole row. Both see the ranges of keys that each query may see, in positions of the whole row; pairs of stripes that
see nothing of each other cost nothing in the ring, which makes it variable-length (recipe §8.2).

The backward computes the scores again from the log-sum-exp over all keys, saved by the forward under the checkpoint
name of `pallas_kernels.softmax.RESULTS`. Nothing is differentiated through the merging of parts.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.arrays import accumulator
from pallas_kernels.softmax import named, softmax_backward
from pallas_kernels.softmax import softmax_attention as local_attention
from pallas_kernels.softmax.chunked import Ranges
from parallel.key_heads import key_head_index, own_key_head
from parallel.sharding import Rules, ShardingError
from parallel.stripes import AXIS, STRIPES, gather_tokens, on_ranks, partition, scatter_tokens, split, stripes_of

EXCHANGES = ("gather", "ring")

_ROWS = ("batch", "sequence")
_HEADS = ("batch", "sequence", "heads", None)


class _Plan(NamedTuple):
    """What is known before the arrays are."""

    order: str
    exchange: str
    scale: float


def softmax_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    k_start: Int[Array, "B T"],
    k_end: Int[Array, "B T"],
    *,
    scale: float,
    order: str,
    exchange: str,
) -> Float[Array, "B T N H"]:
    """Computes `pallas_kernels.softmax.softmax_attention` with T split over the sequence axis of the mesh in use.

    Batch and heads stay split as `Rules` says; where the tensor axis is a multiple of K, each of its ranks reads the
    one key head of its query heads.

    Args:
      q, k, v, scale: as there; the tokens of all three lie on the ranks as `order` says.
      k_start, k_end: the range of keys that each query sees, in positions of the whole row in natural order.
      order: a key of `stripes.STRIPES`.
      exchange: one of `EXCHANGES`.

    Raises:
      ShardingError: neither K nor the size of the tensor axis divides the other.
    """
    return _attention(_Plan(order, exchange, scale), q, k, v, k_start, k_end)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: _Plan, q: Array, k: Array, v: Array, k_start: Array, k_end: Array) -> Array:
    return _forward(plan, q, k, v, k_start, k_end)[0]


def _forward(plan: _Plan, q: Array, k: Array, v: Array, k_start: Array, k_end: Array) -> tuple[Array, tuple]:
    function = {"gather": _gather_forward, "ring": _ring_forward}[plan.exchange]
    kv, heads, rows = _key_partition(k), partition(*_HEADS), partition(*_ROWS)

    def local(q: Array, k: Array, v: Array, k_start: Array, k_end: Array) -> tuple[Array, Array]:
        return function(plan, q, _own_heads(k, kv), _own_heads(v, kv), k_start, k_end)

    mix = on_ranks(local, in_specs=(heads, kv, kv, rows, rows), out_specs=(heads, partition(*_HEADS[:3])))
    o, lse = named(*mix(q, k, v, k_start, k_end))
    return o, (q, k, v, k_start, k_end, o, lse)


def _backward(plan: _Plan, saved: tuple, do: Array) -> tuple:
    function = {"gather": _gather_backward, "ring": _ring_backward}[plan.exchange]
    kv, heads, rows = _key_partition(saved[1]), partition(*_HEADS), partition(*_ROWS)

    def local(q: Array, k: Array, v: Array, k_start: Array, k_end: Array, *results: Array) -> tuple[Array, ...]:
        dq, dk, dv = function(plan, q, _own_heads(k, kv), _own_heads(v, kv), k_start, k_end, *results)
        return dq, _all_heads(dk, k, kv), _all_heads(dv, v, kv)

    specs = (heads, kv, kv, rows, rows, heads, partition(*_HEADS[:3]), heads)
    dq, dk, dv = on_ranks(local, in_specs=specs, out_specs=(heads, kv, kv))(*saved, do)
    return dq, dk, dv, None, None


_attention.defvjp(_forward, _backward)


def _key_partition(k: Array) -> PartitionSpec:
    """Splits keys over the tensor axis, or replicates them where it has more ranks than there are key heads."""
    mesh = jax.sharding.get_abstract_mesh()
    heads, ways = k.shape[2], math.prod(mesh.shape[axis] for axis in Rules().kv_heads)
    if heads % ways and ways % heads:
        raise ShardingError(f"{heads} key heads and {ways} ranks of mesh axes {Rules().kv_heads}: neither divides")
    return partition("batch", "sequence", None if heads % ways else "kv_heads", None)


def _own_heads(keys: Array, partition: PartitionSpec) -> Array:
    """Of replicated key heads takes the one that this rank's query heads read."""
    return keys if partition[2] else own_key_head(keys)


def _all_heads(gradient: Array, keys: Array, partition: PartitionSpec) -> Array:
    """Sums the ranks' gradients of replicated key heads: the transpose of `_own_heads`."""
    if partition[2]:
        return gradient
    zeros = jnp.zeros(keys.shape, accumulator(keys))
    placed = lax.dynamic_update_slice_in_dim(zeros, gradient.astype(zeros.dtype), key_head_index(keys), axis=2)
    return lax.psum(placed, Rules().kv_heads).astype(keys.dtype)


def _gather_forward(plan: _Plan, q: Array, k: Array, v: Array, start: Array, end: Array) -> tuple[Array, Array]:
    keys, values = (gather_tokens(x, plan.order) for x in (k, v))
    return local_attention(q, keys, values, scale=plan.scale, k_start=start, k_end=end, return_lse=True)


def _gather_backward(
    plan: _Plan, q: Array, k: Array, v: Array, start: Array, end: Array, o: Array, lse: Array, do: Array
) -> tuple[Array, ...]:
    keys, values = (gather_tokens(x, plan.order) for x in (k, v))
    dq, *down = softmax_backward(q, keys, values, start, end, o, lse, do, scale=plan.scale)
    # P parts of each gradient are added in the accumulator's dtype.
    dk, dv = (scatter_tokens(x.astype(accumulator(x)), plan.order).astype(x.dtype) for x in down)
    return dq, dk, dv


def _ring_forward(plan: _Plan, q: Array, k: Array, v: Array, start: Array, end: Array) -> tuple[Array, Array]:
    ring = _Ring(plan.order, q.shape[1])
    q, k, v, start, end = map(ring.stripes, (q, k, v, start, end))
    zeros = jnp.zeros(q.shape, accumulator(q))

    def visit(a: Array, b: Array, seen: Ranges, kv: tuple[Array, Array], carry: _Part) -> _Part:
        keys, values = (_take(x, b) for x in kv)
        part = local_attention(
            _take(q, a), keys, values, scale=plan.scale, k_start=seen.start, k_end=seen.end, return_lse=True
        )
        merged = _merge(_Part(*(_take(x, a) for x in carry)), _Part(*part))
        return _Part(*(lax.dynamic_update_index_in_dim(x, new, a, 0) for x, new in zip(carry, merged)))

    def hop(i: Array, carry: tuple[tuple[Array, Array], _Part]) -> tuple[tuple[Array, Array], _Part]:
        kv, total = carry
        return ring.pass_on(kv), ring.attend(i, start, end, partial(visit, kv=kv), total)

    total = _Part(zeros, jnp.full_like(zeros[..., 0], -jnp.inf))
    last = ring.ranks - 1
    kv, total = lax.fori_loop(0, last, hop, ((k, v), total))
    total = ring.attend(last, start, end, partial(visit, kv=kv), total)
    return ring.joined(total.o).astype(q.dtype), ring.joined(total.lse)


def _ring_backward(
    plan: _Plan, q: Array, k: Array, v: Array, start: Array, end: Array, o: Array, lse: Array, do: Array
) -> tuple[Array, ...]:
    ring = _Ring(plan.order, q.shape[1])
    q, k, v, start, end, o, lse, do = map(ring.stripes, (q, k, v, start, end, o, lse, do))
    dq, dk, dv = (jnp.zeros(x.shape, accumulator(x)) for x in (q, k, v))

    def visit(a: Array, b: Array, seen: Ranges, kv: tuple[Array, Array], carry: tuple[Array, ...]) -> tuple[Array, ...]:
        keys, values = (_take(x, b) for x in kv)
        results = (_take(o, a), _take(lse, a), _take(do, a))
        parts = softmax_backward(_take(q, a), keys, values, *seen, *results, scale=plan.scale)
        return tuple(_add(x, part, i) for x, part, i in zip(carry, parts, (a, b, b)))

    def hop(i: Array, carry: tuple) -> tuple:
        kv, dq, down = carry
        dq, *down = ring.attend(i, start, end, partial(visit, kv=kv), (dq, *down))
        return ring.pass_on(kv), dq, ring.pass_on(tuple(down))

    _, dq, (dk, dv) = lax.fori_loop(0, ring.ranks, hop, ((k, v), dq, (dk, dv)))
    return tuple(ring.joined(gradient).astype(x.dtype) for gradient, x in ((dq, q), (dk, k), (dv, v)))


class _Part(NamedTuple):
    """Attention over some of the keys: output in the accumulator's dtype, and log-sum-exp."""

    o: Array
    lse: Array


def _merge(a: _Part, b: _Part) -> _Part:
    """Attention over the keys of both parts."""
    lse = jnp.logaddexp(a.lse, b.lse)
    finite = jnp.where(jnp.isfinite(lse), lse, 0)
    weight_a, weight_b = (jnp.exp(part.lse - finite)[..., None] for part in (a, b))
    return _Part(weight_a * a.o + weight_b * b.o, lse)


class _Ring:
    """The ranks of the sequence axis in a circle; after hop i rank r holds the keys of rank r - i."""

    def __init__(self, order: str, tokens: int):
        self.order, self.ranks = order, lax.axis_size(AXIS)
        self.length = tokens // STRIPES[order]

    def stripes(self, x: Array) -> Array:
        """[B, T, ...] -> [s, B, T / s, ...]."""
        return split(x, self.order).swapaxes(0, 1)

    def joined(self, x: Array) -> Array:
        """The inverse of `stripes`."""
        return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])

    def pass_on[X](self, x: X) -> X:
        """Sends a pytree to the next rank and receives that of the one before."""
        return lax.ppermute(x, AXIS, [(i, (i + 1) % self.ranks) for i in range(self.ranks)])

    def attend[X](self, hop: Array | int, start: Array, end: Array, visit: Callable[..., X], carry: X) -> X:
        """Calls `visit(a, b, seen, carry)` for each query stripe a and each key stripe b here of which it sees some."""
        count, length = STRIPES[self.order], self.length
        first_keys = stripes_of((lax.axis_index(AXIS) - hop) % self.ranks, self.order) * length

        def pair(i: Array, carry: X) -> X:
            a, b = i // count, i % count
            seen = Ranges(*(jnp.clip(_take(x, a) - _take(first_keys, b), 0, length) for x in (start, end)))
            some = jnp.any(seen.start < seen.end)
            return lax.cond(some, lambda carry: visit(a, b, seen, carry=carry), lambda carry: carry, carry)

        return lax.fori_loop(0, count * count, pair, carry)


def _take(x: Array, index: Array) -> Array:
    return lax.dynamic_index_in_dim(x, index, keepdims=False)


def _add(x: Array, part: Array, index: Array) -> Array:
    return lax.dynamic_update_index_in_dim(x, _take(x, index) + part, index, 0)
