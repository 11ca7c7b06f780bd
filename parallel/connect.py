"""Connections between the CPUs of a run, opened before a program needs them.

On CPUs collectives travel through Gloo, which connects a group of devices when they first meet and waits 30 s for all
of them: less than processes may differ in compiling a step on a busy host. An open connection waits half an hour.
"""

from collections.abc import Iterator
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32

from parallel.distributed import barrier


def connect(mesh: Mesh) -> None:
    """Opens the connections of every group of devices that collectives of a run on `mesh` form; all processes call it.

    The groups are the devices along each set of axes of the mesh, and those along the processes. Nothing is done in a
    run of one process, or where the devices are no CPUs.
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    local = np.array(jax.devices()).reshape(jax.process_count(), -1)
    for grid in (mesh, Mesh(local, ("process", "device"))):
        _meet(grid)


def _meet(grid: Mesh) -> None:
    """Runs one small program in which every group of the grid sums something; it starts on all processes together."""
    axes = tuple(axis for axis, size in grid.shape.items() if size > 1)
    everywhere = NamedSharding(grid, PartitionSpec(axes))
    ones = jax.make_array_from_callback((grid.size,), everywhere, lambda index: np.ones(1, np.float32))

    def sums(x: Float32[Array, " one"]) -> Float32[Array, "groups one"]:
        return jnp.stack([jax.lax.psum(x, group) for group in _subsets(axes)])

    mapped = jax.shard_map(
        sums, mesh=grid, in_specs=PartitionSpec(axes), out_specs=PartitionSpec(None, axes), check_vma=False
    )
    program = jax.jit(mapped).lower(ones).compile()
    barrier("connect")
    jax.block_until_ready(program(ones))


def _subsets(axes: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every set of axes, none left out but the empty one."""
    for size in range(1, len(axes) + 1):
        yield from combinations(axes, size)
