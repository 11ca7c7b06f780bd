"""The grouped matmul in plain XLA: each expert's rows are cut into blocks, and the blocks are one batched matmul.

At most one block of each expert is partly empty, so that the work is that of M + E * block rows at most, never E-fold.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import dot


class Blocks(NamedTuple):
    """Where rows go: expert [blocks]; rows [blocks, block], M where empty; place [M] in the flat blocks, or beyond."""

    expert: jax.Array
    rows: jax.Array
    place: jax.Array


def matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, transposed: bool) -> jax.Array:
    """Returns [M, F] from x [M, D] and w [E, D, F], or with `transposed` [M, D] from x [M, F]; accumulator's dtype."""
    blocks = _blocks(group_sizes, x.shape[0])
    spec = "bcf,bdf->bcd" if transposed else "bcd,bdf->bcf"
    y = dot(spec, _take(x, blocks.rows), w[blocks.expert])
    return _take(y.reshape(-1, y.shape[-1]), blocks.place)


def weight_gradient(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Returns [E, D, F], for each expert the sum over its rows of x^T dy, in the accumulator's dtype."""
    blocks = _blocks(group_sizes, x.shape[0])
    parts = dot("bcd,bcf->bdf", _take(x, blocks.rows), _take(dy, blocks.rows))
    return jax.ops.segment_sum(parts, blocks.expert, group_sizes.shape[0], indices_are_sorted=True)


def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Reads rows; those beyond the end are 0."""
    return x.at[rows].get(mode="fill", fill_value=0)


def _blocks(group_sizes: jax.Array, rows: int) -> Blocks:
    experts = group_sizes.shape[0]
    block = _block_length(rows, experts)
    count = rows // block + experts
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    blocks_of = (group_sizes + block - 1) // block
    last_block = jnp.cumsum(blocks_of)
    first_block = last_block - blocks_of

    index = jnp.arange(count)
    expert = jnp.minimum(jnp.searchsorted(last_block, index, side="right"), experts - 1)
    row = (starts[expert] + (index - first_block[expert]) * block)[:, None] + jnp.arange(block)
    held = jnp.where((row < ends[expert][:, None]) & (index < last_block[-1])[:, None], row, rows)

    row = jnp.arange(rows)
    owner = jnp.minimum(jnp.searchsorted(ends, row, side="right"), experts - 1)
    place = first_block[owner] * block + row - starts[owner]
    return Blocks(expert, held, jnp.where(row < ends[-1], place, count * block))


def _block_length(rows: int, experts: int) -> int:
    """Returns a power of two that gives an expert about eight blocks: little is empty, and weights are read rarely."""
    return max(8, 1 << max(0, (rows // (8 * experts)).bit_length() - 1))
