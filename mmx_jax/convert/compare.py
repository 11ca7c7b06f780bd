"""Two sets of weights compared tensor by tensor, whatever format each is in."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmx_jax.convert.errors import ConvertError
from mmx_jax.convert.names import tensor_map, text_names
from mmx_jax.convert.safetensors import StoredTensor, read_folder
from mmx_jax.convert.source import CONFIG_FILE
from mmx_jax.convert.stored import StoredWeights

ROWS_BYTES = 32 * 2**20


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs between two sets."""

    name: str
    problem: str
    """"equal", "values", "dtype" (equal values), "shape", "only in the first" or "only in the second"."""
    largest: float = 0.0
    """Largest absolute difference."""
    relative: float = 0.0
    """Largest absolute difference over the largest magnitude of the first."""


class _Folder:
    """Published tensors without a configuration: any names and shapes."""

    def __init__(self, path: Path):
        stored = read_folder(path)
        self._stored: dict[str, StoredTensor] = {ours: stored[name] for ours, name in text_names(stored).items()}
        self.shapes = {name: tensor.shape for name, tensor in self._stored.items()}

    def dtype(self, name: str) -> np.dtype:
        return self._stored[name].dtype

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._stored[name].read_rows(start, stop)


class _Checkpoint(StoredWeights):
    def __init__(self, path: Path):
        super().__init__(path)
        self.shapes = {name: tensor.shape for name, tensor in tensor_map(self.config).items()}


def _open(path: str | Path) -> _Folder | _Checkpoint:
    path = Path(path)
    if not path.is_dir():
        raise ConvertError(f"{path}: no such folder")
    published = (path / CONFIG_FILE).is_file() or any(path.glob("*.safetensors"))
    return _Folder(path) if published else _Checkpoint(path)


def compare_weights(first: str | Path, second: str | Path) -> Iterator[TensorDifference]:
    """Yields the comparison of every tensor of either set, in the order of the first.

    Args:
      first: a folder of safetensors (hub, transformers, VL) or a checkpoint.
      second: likewise.

    Raises: ConvertError and CheckpointError for sets that cannot be read.
    """
    a, b = _open(first), _open(second)
    for name, shape in a.shapes.items():
        if name not in b.shapes:
            yield TensorDifference(name, "only in the first")
        elif b.shapes[name] != shape:
            yield TensorDifference(name, "shape")
        else:
            yield _values(a, b, name, shape)
    for name in b.shapes:
        if name not in a.shapes:
            yield TensorDifference(name, "only in the second")


def _values(a: _Folder | _Checkpoint, b: _Folder | _Checkpoint, name: str, shape: tuple[int, ...]) -> TensorDifference:
    largest = magnitude = 0.0
    equal = True
    row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * 8
    step = max(1, ROWS_BYTES // row_bytes)
    for start in range(0, shape[0], step):
        left, right = (source.read_rows(name, start, min(start + step, shape[0])) for source in (a, b))
        same = left.dtype == right.dtype and np.array_equal(left.view(np.uint8), right.view(np.uint8))
        if same:
            continue
        left, right = left.astype(np.float64), right.astype(np.float64)
        gap = np.abs(left - right)
        equal = equal and bool(np.array_equal(left, right))
        largest = max(largest, float(gap.max()))
        magnitude = max(magnitude, float(np.abs(left).max()))
    if not equal:
        return TensorDifference(name, "values", largest, largest / max(magnitude, 1e-300))
    return TensorDifference(name, "equal" if a.dtype(name) == b.dtype(name) else "dtype")
