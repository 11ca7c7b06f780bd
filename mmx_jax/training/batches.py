"""From the global stream of rows to batches on devices."""

import jax
import numpy as np
from jax.sharding import NamedSharding

from mmx_jax.data import Batch, TrainingRows, loader


class BatchFeed:
    """Batches [A, B, T] of a stage, from any row on; each process reads only the rows of its own devices.

    Micro-batches are consecutive rows of the global stream, so what is in them does not depend on the mesh.
    """

    def __init__(self, rows: TrainingRows, abstract: Batch, start_row: int):
        sharding = abstract.tokens.sharding
        assert isinstance(sharding, NamedSharding)
        self._sharding = sharding
        self._shape = abstract.tokens.shape
        index, count = data_shard(sharding, self._shape)
        self._loader = loader(rows, start_row=start_row, process_index=index, process_count=count)

    def next(self, micro_batches: int) -> Batch:
        """The next `micro_batches` micro-batches; the places up to A that a ramp does not use yet are zeros."""
        blocks = [self._loader.next_rows(self._shape[1]) for _ in range(micro_batches)]
        blocks += [jax.tree.map(np.zeros_like, blocks[0])] * (self._shape[0] - micro_batches)
        local = jax.tree.map(lambda *parts: np.stack(parts), *blocks)
        if jax.process_count() == 1:
            return jax.device_put(local, self._sharding)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._sharding, x, self._shape), local)

    def close(self) -> None:
        """Stops reading ahead."""
        self._loader.close()


def data_shard(sharding: NamedSharding, shape: tuple[int, ...]) -> tuple[int, int]:
    """Which part of the rows of a [A, B, T] batch this process's devices hold: (index, number of such parts)."""
    slices = [index[1].indices(shape[1]) for index in sharding.addressable_devices_indices_map(shape).values() if index]
    start, stop = min(first for first, _, _ in slices), max(end for _, end, _ in slices)
    return start // (stop - start), shape[1] // (stop - start)
