"""How rows of tokens are cut along the mesh axis `sequence`: into equal stripes, one or two for each rank.

The order "contiguous" gives rank r of P stripe r of P. The order "zigzag" gives it the stripes r and 2P - 1 - r of 2P,
so that under a causal mask every rank has the same work (recipe §8.2, INV-39). Functions that say so run inside
`jax.shard_map`, where an array holds a rank's own tokens [B, T / P, ...], stripe after stripe.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, Shaped

from parallel.sharding import Rules, ShardingError

AXIS = "sequence"
STRIPES = {"contiguous": 1, "zigzag": 2}
"""Stripes of each rank, by order."""


def sequence_ranks() -> int:
    """Ranks that share a row on the mesh in use (`jax.set_mesh`); 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[AXIS]


def partition(*axes: str | None) -> PartitionSpec:
    """How `Rules` splits an array with these logical axes."""
    return Rules().spec(axes)


on_ranks = functools.partial(jax.shard_map, check_vma=False)
"""`jax.shard_map` for functions that call kernels, which do not say how their results vary over the mesh.

Such a function is not differentiated by JAX, and every sum over ranks stands in it.
"""


def arrange(batch: Any, order: str) -> Any:
    """Moves the tokens of rows in natural order to the ranks that `order` gives them to.

    Each rank sends its tokens once, and nothing is gathered. Without a sequence axis the rows stay as they are.

    Args:
      batch: a pytree of arrays [B, T], T split over the sequence axis.
      order: a key of `STRIPES`.

    Raises:
      ShardingError: when T does not divide into the stripes.
    """
    if sequence_ranks() == 1 or order == "contiguous":
        return batch
    jax.tree.map(lambda x: check_length(x.shape[1], order), batch)
    tokens = partition("batch", "sequence")
    return jax.shard_map(lambda batch: jax.tree.map(_zigzag, batch), in_specs=(tokens,), out_specs=tokens)(batch)


def check_length(length: int, order: str) -> None:
    """Raises `ShardingError` unless rows of `length` tokens divide into the stripes of the mesh in use."""
    stripes = sequence_ranks() * STRIPES[order]
    if length % stripes:
        raise ShardingError(
            f"rows of {length} tokens do not divide into {stripes} stripes: mesh axis {AXIS!r} has {sequence_ranks()} "
            f"ranks and order {order!r} gives each {STRIPES[order]}"
        )


def on_whole_rows(
    function: Callable[[Int[Array, "B S"]], Any], rows: Int[Array, "B S"], order: str
) -> tuple[Array, ...]:
    """Applies a function of whole rows, in natural order, to rows that are split over the sequence axis.

    Every rank gathers the rows (integers: 4 bytes a token) and keeps its own tokens of the function's results, a pytree
    of arrays [B, S, ...].
    """

    def local(rows: Array) -> Any:
        return jax.tree.map(lambda x: own_tokens(x, order), function(gather_tokens(rows, order)))

    tokens = partition("batch", "sequence")
    return jax.shard_map(local, in_specs=(tokens,), out_specs=tokens)(rows)


def own_stripes(order: str) -> Int[Array, " s"]:
    """Numbers of this rank's stripes, in the order in which it holds them. Inside `jax.shard_map`."""
    return stripes_of(lax.axis_index(AXIS), order)


def stripes_of(rank: Int[Array, ""], order: str) -> Int[Array, " s"]:
    """Numbers of a rank's stripes. Inside `jax.shard_map`."""
    if order == "contiguous":
        return rank[None]
    return jnp.stack([rank, 2 * lax.axis_size(AXIS) - 1 - rank])


def gather_stripes(x: Shaped[Array, "s ..."]) -> Shaped[Array, "W ..."]:
    """Gathers what each stripe has one of, in natural order: one all-gather. Inside `jax.shard_map`."""
    ranks = lax.all_gather(x, AXIS)
    if x.shape[0] == 1:
        return ranks[:, 0]
    return jnp.concatenate([ranks[:, 0], ranks[::-1, 1]])


def gather_tokens(x: Shaped[Array, "B T ..."], order: str) -> Shaped[Array, "B S ..."]:
    """Gathers whole rows in natural order: one all-gather. Inside `jax.shard_map`."""
    stripes = jnp.moveaxis(gather_stripes(jnp.moveaxis(split(x, order), 1, 0)), 0, 1)
    return stripes.reshape(x.shape[0], -1, *x.shape[2:])


def scatter_tokens(x: Shaped[Array, "B S ..."], order: str) -> Shaped[Array, "B T ..."]:
    """Sums whole rows over the ranks, each keeping its own tokens: the transpose of `gather_tokens`."""
    count, batch = STRIPES[order], x.shape[0]
    ranks = lax.axis_size(AXIS)
    stripes = jnp.moveaxis(x.reshape(batch, ranks * count, -1, *x.shape[2:]), 1, 0)
    pairs = stripes[:, None] if count == 1 else jnp.stack([stripes[:ranks], stripes[ranks:][::-1]], axis=1)
    own = lax.psum_scatter(pairs, AXIS, scatter_dimension=0)
    return jnp.moveaxis(own, 0, 1).reshape(batch, -1, *x.shape[2:])


def own_tokens(x: Shaped[Array, "B S ..."], order: str) -> Shaped[Array, "B T ..."]:
    """Takes this rank's tokens of whole rows. Inside `jax.shard_map`."""
    stripes = x.reshape(x.shape[0], lax.axis_size(AXIS) * STRIPES[order], -1, *x.shape[2:])
    return jnp.take(stripes, own_stripes(order), axis=1).reshape(x.shape[0], -1, *x.shape[2:])


def split(x: Shaped[Array, "B T ..."], order: str) -> Shaped[Array, "B s C ..."]:
    """Cuts a rank's tokens into its stripes."""
    return x.reshape(x.shape[0], STRIPES[order], -1, *x.shape[2:])


def _zigzag(x: Shaped[Array, "B T"]) -> Shaped[Array, "B T"]:
    """Takes the two stripes 2r and 2r + 1 that rank r has in natural order to their zigzag ranks.

    Stripe w belongs to rank w or 2P - 1 - w. The even stripes go to P different ranks, and so do the odd ones: two
    permutations. What arrives from an even stripe is the first of an even rank and the second of an odd one.
    """
    ranks = lax.axis_size(AXIS)
    halves = split(x, "zigzag")

    def deliver(parity: int) -> Array:
        target = [min(w, 2 * ranks - 1 - w) for w in range(parity, 2 * ranks, 2)]
        return lax.ppermute(halves[:, parity], AXIS, list(enumerate(target)))

    even, odd = deliver(0), deliver(1)
    on_even_rank = lax.axis_index(AXIS) % 2 == 0
    first, second = jnp.where(on_even_rank, even, odd), jnp.where(on_even_rank, odd, even)
    return jnp.concatenate([first, second], axis=1)
