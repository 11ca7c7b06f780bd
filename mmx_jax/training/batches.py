"""From the global stream of rows to batches on devices."""

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Shaped

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
        self._places = own_rows(sharding, self._shape)
        self._loader = loader(rows, start_row=start_row, places=self._places)

    def next(self, micro_batches: int) -> Batch:
        """The next `micro_batches` micro-batches; the places up to A that a ramp does not use yet are zeros."""
        blocks = [self._loader.next_rows(self._shape[1]) for _ in range(micro_batches)]
        blocks += [jax.tree.map(np.zeros_like, blocks[0])] * (self._shape[0] - micro_batches)
        local = jax.tree.map(lambda *parts: np.stack(parts), *blocks)
        if jax.process_count() == 1:
            return jax.device_put(local, self._sharding)
        return jax.tree.map(self._distributed, local)

    def _distributed(self, local: Shaped[np.ndarray, "A b T"]) -> jax.Array:
        """The global array of which this process holds some rows, whole; each device gets its part of them."""

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[1].indices(self._shape[1])
            first = self._places.index(start)
            return local[index[0], first : first + stop - start, index[2]]

        return jax.make_array_from_callback(self._shape, self._sharding, part)

    def close(self) -> None:
        """Stops reading ahead."""
        self._loader.close()


def own_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> list[int]:
    """Which rows of a [A, B, T] batch this process's devices hold, ascending; a device's rows are neighbours."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    return sorted({row for index in indices if index for row in range(*index[1].indices(shape[1]))})
