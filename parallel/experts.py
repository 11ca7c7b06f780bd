"""Experts over a mesh: the global router's queue, transport within the expert axis, combination (recipe §4.7, §8.1).

Tokens are split as every activation is; expert weights have their own split (`experts`, `expert_embed`, `expert_ffn`
of the rules). A routed row travels to the device that holds its expert by an all-to-all of blocks of one size. The
width of the rows is split over the tensor axis while they travel: gathered before the experts' matmuls, summed and
split again after them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.arrays import varying_like
from pallas_kernels.grouped_matmul import grouped_matmul
from parallel.rows import (
    Keep,
    Queues,
    combine_slots,
    fill_blocks,
    forget,
    gather_rows,
    gather_slots,
    keep_for_backward,
    queues,
)
from parallel.sharding import DEFAULT_RULES, Rules, ShardingError
from parallel.stripes import gather_stripes, own_stripes, split


class Mixed(NamedTuple):
    """What the experts give back."""

    out: Float[Array, "B T D"]
    dropped: Float[Array, ""]
    """Share of routed slots over capacity."""
    lost: Float[Array, ""]
    """Share of routed slots that found no place in a transport block or in their expert's bucket."""


def expert_capacity(share: Fraction, tokens: int | Int[Array, ""]) -> int | Int[Array, ""]:
    """ceil(share * tokens) in exact integers, without leaving int32."""
    whole, rest = tokens // share.denominator, tokens % share.denominator
    return share.numerator * whole + -(-share.numerator * rest // share.denominator)


def mix_experts(
    x: Float[Array, "B T D"],
    expert: Int[Array, "B T k"],
    weight: Float[Array, "B T k"],
    weights: tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]],
    real: Int[Array, ""],
    *,
    share: Fraction | None,
    scope: str = "global",
    order: str = "contiguous",
    block_factor: float = 1.5,
    max_rounds: int | None = None,
    bucket_factor: float | None = None,
    token_groups: int = 1,
    rules: Rules = DEFAULT_RULES,
) -> Mixed:
    """Weighted sum of each token's SwiGLU experts on the mesh in use (`jax.set_mesh`).

    Args:
      x: tokens in the compute dtype, split as batch and sequence.
      expert: ids of each token's experts; E for padding.
      weight: router weights.
      weights: gate, up and down of all experts, in the compute dtype.
      real: number of tokens that are not padding. It is the same for all layers, so the caller knows it already.
      share: an expert's capacity as a share of the real tokens; None drops nothing. The slots that an expert keeps are
        the first ones in the order of the whole batch, on every mesh ("global"), or ("shard") of each device's tokens.
      scope: "global" or "shard".
      order: how rows are cut along the sequence axis (parallel/stripes.py).
      block_factor: rows of a transport block over the rows that it carries when the routing is balanced.
      max_rounds: all-to-alls per token group at most; rows that then still wait are lost and counted. None goes on
        until none waits.
      bucket_factor: with capacity and one round, rows that an expert multiplies over those that it gets when the
        routing is balanced: what arrives is laid together, and rows beyond are lost and counted. None multiplies
        whole blocks.
      token_groups: parts of a device's tokens that travel one after the other, so that the matmuls of one can hide
        the travel of another.
      rules: the mesh axes.

    Raises:
      ShardingError: a size does not divide by its mesh axes; names both.
      ValueError: a bucket factor where further rounds may follow.
    """
    if bucket_factor is not None and max_rounds != 1:
        raise ValueError(f"bucket_factor = {bucket_factor} loses rows for good, and needs max_rounds = 1")
    mesh = jax.sharding.get_abstract_mesh()
    _check_sizes(mesh, rules, x.shape, weights[0].shape)
    tokens, shards = x.shape[0] * x.shape[1], _ways(mesh, rules.experts)
    each = tokens // _ways(mesh, (*rules.batch, *rules.sequence))
    if each % token_groups:
        raise ShardingError(f"the {each} tokens of a device do not divide by token_groups = {token_groups}")
    most = each // token_groups if share is None else min(each // token_groups, int(expert_capacity(share, tokens)))
    plan = _Plan(rules, weights[0].shape[0], shards, expert.shape[2], share, scope == "global", order, block_factor,
                 max_rounds, bucket_factor, token_groups, most)  # fmt: skip
    cells = PartitionSpec(rules.batch, rules.sequence)
    into, outof = (rules.spec(("experts", *inner)) for inner in (_INTO, _INTO[::-1]))
    rows = PartitionSpec(rules.batch, rules.sequence, rules.expert_ffn)
    mapped = jax.shard_map(
        partial(_local, plan),
        mesh=mesh,
        in_specs=(rows, cells, cells, PartitionSpec(), into, into, outof),
        out_specs=(rows, PartitionSpec(), PartitionSpec()),
    )
    return Mixed(*mapped(x, expert, weight, real, *weights))


_INTO = ("expert_embed", "expert_ffn")


@dataclass(frozen=True)
class _Plan:
    """Everything static that one device needs to know."""

    rules: Rules
    num_experts: int
    shards: int
    """Devices of the expert axis."""
    experts_per_token: int
    share: Fraction | None
    global_capacity: bool
    order: str
    block_factor: float
    max_rounds: int | None
    bucket_factor: float | None
    groups: int
    most: int
    """Slots of one expert that can wait in a token group."""

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.shards

    @property
    def everywhere(self) -> tuple[str, ...]:
        """Mesh axes that split tokens."""
        return (*self.rules.batch, *self.rules.sequence)


def _ways(mesh: AbstractMesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _check_sizes(mesh: AbstractMesh, rules: Rules, x: tuple[int, ...], weights: tuple[int, ...]) -> None:
    for name, size, axes in (
        ("tokens: rows of the batch", x[0], rules.batch),
        ("tokens: sequence length", x[1], rules.sequence),
        ("tokens: model width", x[2], rules.expert_ffn),
        ("experts: number of experts", weights[0], rules.experts),
        ("experts: model width", weights[1], rules.expert_embed),
        ("experts: hidden width", weights[2], rules.expert_ffn),
    ):
        if size % _ways(mesh, axes):
            raise ShardingError(
                f"{name} is {size}, which does not divide by the {_ways(mesh, axes)} shards of mesh axes {axes}"
            )


def _local(
    plan: _Plan, x: Array, expert: Array, weight: Array, real: Array, *weights: Array
) -> tuple[Array, Array, Array]:
    """The work of one device: x [b, t, D / tensor], expert and weight [b, t, k], and its shards of the weights."""
    b, t, width = x.shape
    k, E = plan.experts_per_token, plan.num_experts
    routed = jnp.maximum(real * k, 1)
    with jax.named_scope("queue"):
        kept = _kept(plan, expert, real)
        expert = jnp.where(kept, expert, E).reshape(plan.groups, -1, k)
        journeys = [_journey(plan, expert[g]) for g in range(plan.groups)]
        buckets = _buckets(plan, journeys)
        lost = sum(part.lost for part in (*journeys, *buckets) if part is not None)
        kept_slots, lost = map(keep_for_backward, lax.psum((kept.sum(dtype=jnp.int32), lost), plan.everywhere))
        fullest = _fullest(plan, journeys)
    with jax.named_scope("gather_weights"):
        # Marked before they are gathered as used with other tokens on every device, so that their gradients are added
        # up over the axes that do not split them once, and after they were scattered.
        weights = tuple(varying_like(w, x) for w in weights)
        weights = tuple(_gathered(w, axis, plan.rules.expert_embed) for w, axis in zip(weights, (1, 1, 2)))
    # The few numbers above are added up before rows travel: later they would wait for the links behind them.
    x, kept_slots, lost, *_ = lax.optimization_barrier((x, kept_slots, lost, fullest, buckets))
    parts = (x.reshape(plan.groups, -1, width), weight.reshape(plan.groups, -1, k))
    mixed = [
        _group(plan, weights, journeys[g], buckets[g], fullest[g], *(part[g] for part in parts))
        for g in range(plan.groups)
    ]
    return jnp.concatenate(mixed).reshape(b, t, width), 1.0 - kept_slots / routed, lost / routed


def _kept(plan: _Plan, expert: Int[Array, "b t k"], real: Int[Array, ""]) -> Array:
    """Which slots are within their expert's capacity."""
    E = plan.num_experts
    chosen = expert < E
    if plan.share is None:
        return chosen
    waiting = queues(expert.reshape(-1, expert.shape[2]), E)
    rank = waiting.ranks(expert.reshape(-1, expert.shape[2])).reshape(expert.shape)
    if not plan.global_capacity:
        mine = chosen[..., 0].sum(dtype=jnp.int32)
        return chosen & (rank < expert_capacity(plan.share, mine))
    stripes = split(expert, plan.order)
    counts = (stripes[..., None] == jnp.arange(E)).sum(axis=(2, 3), dtype=jnp.int32)
    before = _slots_before(plan, counts)[:, :, None, None]
    before = jnp.take_along_axis(before, jnp.minimum(stripes, E - 1)[..., None], axis=-1)[..., 0]
    return chosen & (rank + before.reshape(rank.shape) < expert_capacity(plan.share, real))


def _slots_before(plan: _Plan, counts: Int[Array, "b s E"]) -> Int[Array, "b s E"]:
    """What to add to a slot's rank among this device's slots to get its rank in the order of the whole batch.

    The order runs along the natural order of the sequence, then along the rows. `counts` are this device's slots by
    row, stripe and expert.
    """
    b, s, E = counts.shape
    parts = gather_stripes(jnp.moveaxis(counts, 1, 0))
    earlier = jnp.arange(parts.shape[0]) < own_stripes(plan.order)[:, None]
    in_row = jnp.where(earlier[:, :, None, None], parts, 0).sum(axis=1)
    rows = parts.sum(axis=0)
    blocks = lax.all_gather(rows.sum(axis=0), plan.rules.batch)
    earlier = jnp.arange(blocks.shape[0]) < lax.axis_index(plan.rules.batch)
    in_blocks = jnp.where(earlier[:, None], blocks, 0).sum(axis=0)
    everywhere = jnp.moveaxis(in_row, 0, 1) + (jnp.cumsum(rows, axis=0) - rows)[:, None] + in_blocks
    own = counts.reshape(b * s, E)
    return everywhere - (jnp.cumsum(own, axis=0) - own).reshape(b, s, E)


def _gathered(w: Array, axis: int, mesh_axes: tuple[str, ...]) -> Array:
    return lax.all_gather(w, mesh_axes, axis=axis, tiled=True) if mesh_axes else w


class _Journey(NamedTuple):
    """Which slots of a group of tokens travel where, and in how many rounds.

    With capacity every expert has its block, and blocks, or the buckets of what they bring, are one batched matmul.
    Dropless routing is less even: a shard of experts has one block, whose rows are sorted by expert where they arrive.
    So it is where nothing travels, with or without capacity: one block then holds all that can wait.
    """

    waiting: Queues
    bins: Int[Array, "t k"]
    """Of each slot, the block that it goes into."""
    starts: Int[Array, " b"]
    """By block, the place of its first slot among those that wait."""
    counts: Int[Array, " b"]
    """By block, how many slots wait for it."""
    block: int
    """Rows of a block."""
    rounds: int
    """At most."""
    lost: Int[Array, ""]
    """Slots that still wait after the last round."""


def _by_expert(plan: _Plan) -> bool:
    """Whether each expert has a block of its own."""
    return plan.share is not None and plan.shards > 1


def _journey(plan: _Plan, expert: Int[Array, "t k"]) -> _Journey:
    waiting = queues(expert, plan.num_experts)
    if _by_expert(plan):
        bins, starts, counts, most = expert, waiting.starts, waiting.counts, plan.most
    else:
        each = plan.local_experts
        bins, starts = expert // each, waiting.starts[::each]
        counts = waiting.counts.reshape(-1, each).sum(axis=1)
        most = min(expert.shape[0] * min(each, plan.experts_per_token), each * plan.most)
    block = _block_rows(plan, expert.shape[0], counts.shape[0], most)
    rounds = min(math.ceil(most / block), plan.max_rounds or most)
    return _Journey(waiting, bins, starts, counts, block, rounds, jnp.maximum(counts - rounds * block, 0).sum())


class _Bucket(NamedTuple):
    """How the rows of the blocks that reach a device's experts are laid together: those of each, without gaps."""

    source: Int[Array, "e R"]
    """Of each row of the buckets, the one of the blocks that fills it; -1 for none."""
    place: Int[Array, "s e C"]
    """Of each row of the blocks, its place in the buckets; -1 for none."""
    lost: Int[Array, ""]
    """Rows of this device's experts beyond their buckets."""


def _buckets(plan: _Plan, journeys: Sequence[_Journey]) -> list[_Bucket | None]:
    """By group; None where whole blocks are multiplied."""
    block = journeys[0].block
    all_rows, experts = plan.shards * block, plan.local_experts
    rows = all_rows
    if plan.bucket_factor is not None and _by_expert(plan):
        tokens = journeys[0].bins.shape[0] * plan.shards
        rows = _balanced_rows(plan.bucket_factor, tokens * plan.experts_per_token, plan.num_experts)
    if rows >= all_rows:
        return [None] * plan.groups
    sent = jnp.stack([jnp.minimum(journey.counts, block).reshape(plan.shards, experts) for journey in journeys])
    arriving = keep_for_backward(lax.all_to_all(sent, plan.rules.experts, 1, 1, tiled=True))
    return [_bucket(counts, block, rows) for counts in arriving]


def _bucket(arriving: Int[Array, "s e"], block: int, rows: int) -> _Bucket:
    experts = arriving.shape[1]
    after = jnp.cumsum(arriving, axis=0)
    before, total = after - arriving, after[-1]
    row, wanted = jnp.arange(block, dtype=jnp.int32), jnp.arange(rows, dtype=jnp.int32)
    number = before[:, :, None] + row
    first = rows * jnp.arange(experts, dtype=jnp.int32)[:, None]
    place = jnp.where((row < arriving[:, :, None]) & (number < rows), first + number, -1)
    shard = (after[:, :, None] <= wanted).sum(axis=0, dtype=jnp.int32)
    shard = jnp.minimum(shard, arriving.shape[0] - 1)
    own = jnp.arange(experts, dtype=jnp.int32)[:, None]
    source = (shard * experts + own) * block + wanted - before[shard, own]
    return _Bucket(jnp.where(wanted < total[:, None], source, -1), place, jnp.maximum(total - rows, 0).sum())


def _fullest(plan: _Plan, journeys: Sequence[_Journey]) -> Int[Array, " g"]:
    """By group the highest count of any block of any device; zeros where one round is enough for all."""
    if all(journey.rounds == 1 for journey in journeys):
        return jnp.zeros(len(journeys), jnp.int32)
    counts = jnp.stack([journey.counts.max() for journey in journeys])
    return keep_for_backward(lax.pmax(counts, plan.everywhere))


def _group(
    plan: _Plan,
    weights: tuple[Array, ...],
    journey: _Journey,
    bucket: _Bucket | None,
    fullest: Array,
    x: Array,
    weight: Array,
) -> Array:
    """Sends one group of tokens to its experts and back, in as many rounds as it takes.

    `fullest` is the highest count of any block of any device.
    """
    block = journey.block

    def one(number: Array, keep: Keep = forget) -> Array:
        first = number * block
        blocks = fill_blocks(journey.waiting, journey.starts, journey.counts, journey.bins, block, first)
        rows = gather_slots(x, blocks)
        if _by_expert(plan):
            rows = _bucket_round(plan, weights, rows, bucket, block, keep)
        else:
            rows = _sorted_round(plan, weights, rows, journey.waiting, first, block, keep)
        return combine_slots(rows, blocks, weight, keep)

    # Further rounds would keep theirs whether they are needed or not.
    out = one(jnp.int32(0), keep_for_backward)
    return out + _further_rounds(one, out, journey.rounds, -(-fullest // block)) if journey.rounds > 1 else out


def _block_rows(plan: _Plan, tokens: int, bins: int, most: int) -> int:
    """Rows of a block: the balanced load times the block factor, a multiple of 8, at most what can wait."""
    return min(_balanced_rows(plan.block_factor, tokens * plan.experts_per_token, bins), most)


def _balanced_rows(factor: float, slots: int, bins: int) -> int:
    """A factor times what each of some bins gets when slots are spread evenly, a multiple of 8."""
    return -(-math.ceil(Fraction(str(factor)) * slots / bins) // 8) * 8


def _further_rounds(one: Callable[[Array], Array], like: Array, rounds: int, needed: Int[Array, ""]) -> Array:
    """Sum of the rounds 1, 2, ... that are needed; all devices need the same ones.

    A round that is not needed costs nothing, and none keeps anything for the backward pass but its number.
    """
    zeros = jnp.zeros_like(like)

    @jax.checkpoint
    def step(total: Array, number: Array) -> tuple[Array, None]:
        return total + lax.cond(number < needed, one, lambda _: zeros, number), None

    numbers = jnp.arange(1, rounds, dtype=jnp.int32)
    return lax.cond(needed > 1, lambda: lax.scan(step, zeros, numbers)[0], lambda: zeros)


def _bucket_round(
    plan: _Plan,
    weights: tuple[Array, ...],
    rows: Float[Array, "R w"],
    bucket: _Bucket | None,
    block: int,
    keep: Keep,
) -> Float[Array, "R w"]:
    """Sends a block for each expert, multiplies, and sends back."""
    width, experts = rows.shape[1], plan.local_experts
    arrived = _exchange(plan, rows.reshape(plan.shards, experts, block, width))
    if bucket is None:
        buckets = arrived.transpose(1, 0, 2, 3).reshape(experts, plan.shards * block, width)
    else:
        source, place = bucket.source.reshape(-1), bucket.place.reshape(-1)
        buckets = gather_rows(arrived.reshape(-1, width), source, place[:, None]).reshape(experts, -1, width)
    buckets = _widen(plan, keep(buckets))
    with jax.named_scope("expert_matmul"):
        dot = partial(jnp.einsum, precision=lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None)
        *inner, down = weights
        gate, up = (keep(dot("ECD,EDF->ECF", buckets, w)) for w in inner)
        out = dot("ECF,EFD->ECD", jax.nn.silu(gate) * up, down)
    out = _narrow(plan, out)
    if bucket is None:
        out = out.reshape(experts, plan.shards, block, width).transpose(1, 0, 2, 3)
    else:
        out = gather_rows(out.reshape(-1, width), place, source[:, None]).reshape(arrived.shape)
    return _exchange(plan, out).reshape(rows.shape)


def _sorted_round(
    plan: _Plan,
    weights: tuple[Array, ...],
    rows: Float[Array, "R w"],
    waiting: Queues,
    first: Array,
    block: int,
    keep: Keep,
) -> Float[Array, "R w"]:
    """Sends a block for each shard of experts, sorts what arrives by expert, multiplies, and sends back."""
    each = plan.local_experts
    counts = waiting.counts.reshape(-1, each)
    ends = jnp.clip(jnp.cumsum(counts, axis=1) - first, 0, block)
    ends = keep(_exchange(plan, ends))
    arrived = _exchange(plan, rows.reshape(plan.shards, block, -1)).reshape(plan.shards * block, -1)
    local = (jnp.arange(block, dtype=jnp.int32)[None, :, None] >= ends[:, None, :]).sum(axis=2, dtype=jnp.int32)
    here = queues(local.reshape(-1, 1), each)
    filled = jnp.arange(here.order.size) < here.counts.sum()
    to_sorted = jnp.where(filled, here.order, -1)
    from_sorted = jnp.where(local.reshape(-1) < each, here.place, -1)
    grouped = _widen(plan, keep(gather_rows(arrived, to_sorted, from_sorted[:, None])))
    with jax.named_scope("expert_matmul"):
        *inner, down = weights
        gate, up = (keep(grouped_matmul(grouped, w, here.counts)) for w in inner)
        out = _narrow(plan, grouped_matmul(jax.nn.silu(gate) * up, down, here.counts))
    out = gather_rows(out, from_sorted, to_sorted[:, None])
    return _exchange(plan, out.reshape(plan.shards, block, -1)).reshape(rows.shape)


def _exchange(plan: _Plan, blocks: Array) -> Array:
    """Block i of the first dimension goes to shard i of the experts, and comes from there."""
    if plan.shards == 1:
        return blocks
    with jax.named_scope("all_to_all"):
        return lax.all_to_all(blocks, plan.rules.experts, 0, 0, tiled=True)


def _widen(plan: _Plan, rows: Array) -> Array:
    """Rows of whole width, from the parts on the tensor axis."""
    return lax.all_gather(rows, plan.rules.expert_ffn, axis=rows.ndim - 1, tiled=True)


def _narrow(plan: _Plan, rows: Array) -> Array:
    """This device's part of the width of the sum over the tensor axis."""
    return lax.psum_scatter(rows, plan.rules.expert_ffn, scatter_dimension=rows.ndim - 1, tiled=True)
