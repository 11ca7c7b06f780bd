"""Gathers of rows, and the order in which routed slots wait for their experts."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

EXPERT_RESULTS = "experts"
"""Checkpoint name of the rows that experts take, of what they make of them, and of the rows that tokens get back."""


def keep_for_backward(x: Array) -> Array:
    """Gives an array the name by which a policy of rematerialisation may keep it."""
    return checkpoint_name(x, EXPERT_RESULTS)


def forget(x: Array) -> Array:
    """Leaves an array without a name."""
    return x


Keep = Callable[[Array], Array]
"""`keep_for_backward` or `forget`."""


@jax.custom_vjp
def gather_rows(x: Float[Array, "P D"], index: Int[Array, " Q"], inverse: Int[Array, "P J"]) -> Float[Array, "Q D"]:
    """Rows `x[index]`, zero where the index is -1.

    `inverse[p]` lists the places of the result that row p went to (-1 for none), so that the backward pass gathers
    as well: scatter-adds are slow and their order is not fixed.
    """
    del inverse
    return jnp.where(index[:, None] >= 0, x[jnp.maximum(index, 0)], 0)


def _gather_rows_fwd(x: Array, index: Array, inverse: Array) -> tuple[Array, Array]:
    return gather_rows(x, index, inverse), inverse


def _gather_rows_bwd(inverse: Array, g: Array) -> tuple[Array, None, None]:
    picked = jnp.where(inverse[..., None] >= 0, g[jnp.maximum(inverse, 0)], 0)
    return picked.astype(jnp.float32).sum(axis=1).astype(g.dtype), None, None


gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)


class Queues(NamedTuple):
    """Routed slots in the order of their experts; slots of one expert stay in the order of their tokens."""

    order: Int[Array, " Mk"]
    """Slot at each place of the order; slots without an expert come last."""
    place: Int[Array, " Mk"]
    """Place of each slot."""
    counts: Int[Array, " E"]
    """Slots of each expert."""

    @property
    def starts(self) -> Int[Array, " E"]:
        """First place of each expert."""
        return jnp.cumsum(self.counts) - self.counts

    def ranks(self, expert: Int[Array, "M k"]) -> Int[Array, "M k"]:
        """How many slots of the same expert come before each slot; means nothing for slots without an expert."""
        last = self.counts.shape[0] - 1
        return (self.place - self.starts[jnp.minimum(expert.reshape(-1), last)]).reshape(expert.shape)


def queues(expert: Int[Array, "M k"], num_experts: int) -> Queues:
    """Sorts slots by expert id; id `num_experts` stands for none."""
    flat = expert.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    counts = (flat[:, None] == jnp.arange(num_experts, dtype=flat.dtype)).sum(axis=0, dtype=jnp.int32)
    return Queues(order, place, counts)


class Blocks(NamedTuple):
    """Which slot fills which row of blocks [bins, block], and where each slot went; -1 for none."""

    slot: Int[Array, " R"]
    row: Int[Array, "M k"]


def fill_blocks(
    waiting: Queues,
    starts: Int[Array, " bins"],
    counts: Int[Array, " bins"],
    bin_of_slot: Int[Array, "M k"],
    block: int,
    first: int | Int[Array, ""] = 0,
) -> Blocks:
    """Takes `block` slots of each bin, from its slot number `first` on.

    A bin is a stretch of the sorted order: the slots of one expert, or those of all experts of one shard.

    Args:
      waiting: the sorted slots.
      starts: first place of each bin.
      counts: slots of each bin; later ones of the stretch are left out.
      bin_of_slot: the bin of each slot, the number of bins for none.
      block: rows of a block.
      first: how many slots of each bin are passed over.
    """
    bins = starts.shape[0]
    flat = bin_of_slot.reshape(-1)
    known = jnp.minimum(flat, bins - 1)
    number = waiting.place - starts[known]
    taken: Bool[Array, " Mk"] = (flat < bins) & (number >= first) & (number < first + block) & (number < counts[known])
    row = jnp.where(taken, known * block + number - first, -1)
    wanted = first + jnp.arange(block, dtype=jnp.int32)
    source = jnp.minimum(starts[:, None] + wanted, waiting.order.size - 1)
    slot = jnp.where(wanted < counts[:, None], waiting.order[source], -1)
    return Blocks(slot.reshape(-1), row.reshape(bin_of_slot.shape))


def gather_slots(x: Float[Array, "M D"], blocks: Blocks) -> Float[Array, "R D"]:
    """The token of each filled row of the blocks, zeros in the others."""
    token = jnp.where(blocks.slot >= 0, blocks.slot // blocks.row.shape[1], -1)
    return gather_rows(x, token, blocks.row)


def combine_slots(
    out: Float[Array, "R D"],
    blocks: Blocks,
    weight: Float[Array, "M k"],
    keep: Keep = keep_for_backward,
) -> Float[Array, "M D"]:
    """Sums the rows of each token's slots with their weights; a slot that is in no block adds nothing."""
    picked = keep(gather_rows(out, blocks.row.reshape(-1), blocks.slot[:, None])).reshape(*blocks.row.shape, -1)
    return jnp.einsum("MkD,Mk->MD", picked, weight.astype(picked.dtype))
