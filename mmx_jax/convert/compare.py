"""Two sets of weights compared tensor by tensor, whatever format each is in."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmx_jax.convert.errors import ConvertError
from mmx_jax.convert.names import tensor_map, text_names
from mmx_jax.convert.safetensors import StoredTensor, read_folder
from mmx_jax.convert.source import CONFIG_FILE
from mmx_jax.convert.stored import StoredWeights, locate

ROWS_BYTES = 32 * 2**20
TINY = 1e-300


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs between two sets."""

    name: str
    problem: str
    """"equal", "values", "bits" (equal values: the sign of a zero, a kind of NaN), "dtype" (equal values), "shape",
    "only in the first" or "only in the second"."""
    largest: float = 0.0
    """Largest absolute difference; infinite where NaN or infinity meets anything else."""
    relative: float = 0.0
    """Largest absolute difference over the largest finite magnitude of the first."""


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
    # Steps first: the workdir of a training run has a config.json of its own.
    published = (path / CONFIG_FILE).is_file() or any(path.glob("*.safetensors"))
    return _Folder(path) if published and locate(path) is None else _Checkpoint(path)


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
    same_bits = True
    count = shape[0] if shape else 1  # a scalar is read as one row
    row_bytes = max(1, math.prod(shape[1:])) * np.dtype(np.float64).itemsize
    step = max(1, ROWS_BYTES // row_bytes)
    for start in range(0, count, step):
        left, right = (source.read_rows(name, start, min(start + step, count)) for source in (a, b))
        if left.dtype == right.dtype and np.array_equal(_bits(left), _bits(right)):
            continue
        same_bits = False
        gap, size = _gap(left.astype(np.float64), right.astype(np.float64))
        largest, magnitude = max(largest, gap), max(magnitude, size)
    if largest > 0:
        return TensorDifference(name, "values", largest, largest / max(magnitude, TINY))
    if a.dtype(name) != b.dtype(name):
        return TensorDifference(name, "dtype")
    return TensorDifference(name, "equal" if same_bits else "bits")


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _gap(left: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Largest absolute difference and largest finite magnitude of the first.

    NaN equals NaN and an infinity equals itself; anything else that is not finite is infinitely far away.
    """
    if not left.size:
        return 0.0, 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(left - right)
    gap[(left == right) | (np.isnan(left) & np.isnan(right))] = 0.0
    gap[np.isnan(gap)] = np.inf
    return float(gap.max()), float(np.abs(left, where=np.isfinite(left), out=np.zeros_like(left)).max())
