"""safetensors straight into sharded arrays on any mesh: no second copy on disk, each process reads only its rows."""

import math
import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Array

from mmx_jax.config import ModelConfig, first_difference, to_dict
from mmx_jax.convert.importing import PIECE_BYTES, workers
from mmx_jax.convert.names import TensorSlice
from mmx_jax.convert.source import CONFIG_FILE, SourceFolder, check_finite, read_config
from mmx_jax.model import ParamSpec, parameter_spec

BYTES_IN_FLIGHT = 4 * 2**30
COMPUTED_FIELDS = (
    "layers", "rotary_dim", "rope_base", "experts_per_token", "norm", "norm_eps", "lightning_norm_eps",
    "lightning_beta", "softmax_beta", "ffn_beta",
)  # fmt: skip
"""Fields that change what is computed without changing a shape."""

Box = tuple[tuple[int, int], ...]


def differences_from_file(config: ModelConfig, folder: Path) -> list[str]:
    """Fields in which a configuration computes something else than the folder's own config.json says."""
    if not os.path.lexists(folder / CONFIG_FILE):
        return []
    theirs = read_config(folder)
    lines = []
    for field in COMPUTED_FIELDS:
        found = first_difference(to_dict(theirs)[field], to_dict(config)[field], field)
        if found:
            lines.append(f"{found[0]} is {found[2]!r}, {folder / CONFIG_FILE} says {found[1]!r}")
    for branch in ("lightning", "softmax", "ffn"):
        if not math.isclose(config.alpha(branch), theirs.alpha(branch), rel_tol=1e-9):
            lines.append(f"{branch}_alpha is {config.alpha(branch)}, the file says {theirs.alpha(branch)}")
    return lines


class _Pending:
    """One parameter being read: host buffers of this process's shards, filled tensor by tensor in the pool."""

    def __init__(self, source: SourceFolder, spec: ParamSpec, tensors: list[TensorSlice], sharding: Any, dtype: Any,
                 pool: ThreadPoolExecutor):  # fmt: skip
        self.spec, self.sharding, self.dtype = spec, sharding, np.dtype(dtype)
        parts = sharding.addressable_devices_indices_map(spec.shape).values()
        boxes = {self._box(part) for part in parts}
        self.buffers = {box: np.empty([stop - start for start, stop in box], self.dtype) for box in boxes}
        self.nbytes = sum(buffer.nbytes for buffer in self.buffers.values())
        self.futures: list[Future[None]] = []
        for tensor in tensors:
            stack = len(tensor.index)
            mine = [b for b in boxes if all(low <= i < high for i, (low, high) in zip(tensor.index, b))]
            if not mine:
                continue
            unit_ranges = [box[stack + tensor.row_dim] for box in mine]
            low, high = min(start for start, _ in unit_ranges), max(stop for _, stop in unit_ranges)
            step = tensor.units_per_piece(source.dtype(tensor.name).itemsize, PIECE_BYTES)
            for start in range(low, high, step):
                job = (source, tensor, start, min(start + step, high), mine)
                self.futures.append(pool.submit(self._fill, *job))

    def _box(self, part: Any) -> Box:
        return tuple((s.start or 0, n if s.stop is None else s.stop) for s, n in zip(part, self.spec.shape))

    def _fill(self, source: SourceFolder, tensor: TensorSlice, start: int, stop: int, boxes: list[Box]) -> None:
        """Reads units [start, stop) of a tensor and puts them into every buffer that holds some of them."""
        unit, stack = tensor.rows_per_unit, len(tensor.index)
        rows = source.read_rows(tensor.name, start * unit, stop * unit)
        check_finite(source.stored[tensor.name], rows, start * unit, self.dtype)
        values = tensor.from_stored(rows)
        for box in boxes:
            inner = list(box[stack:])
            low, high = inner[tensor.row_dim]
            first, last = max(low, start), min(high, stop)
            if first >= last:
                continue
            take = [slice(*bounds) for bounds in inner]
            put = [slice(None)] * len(inner)
            take[tensor.row_dim] = slice(first - start, last - start)
            put[tensor.row_dim] = slice(first - low, last - low)
            place = tuple(i - bounds[0] for i, bounds in zip(tensor.index, box))
            self.buffers[box][place + tuple(put)] = values[tuple(take)]

    def result(self) -> Array:
        for future in self.futures:
            future.result()
        return jax.make_array_from_callback(
            self.spec.shape, self.sharding, lambda part: self.buffers[self._box(part)], dtype=self.dtype
        )


def load_safetensors(
    folder: str | Path,
    model_config: ModelConfig,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    *,
    dtype: str | None = None,
) -> dict[str, Array]:
    """The parameters of a model from a folder of published safetensors.

    Args:
      folder: hub, transformers or MiniMax-VL-01 format.
      model_config: the model; differences from the folder's config.json that change the result are logged.
      shardings: sharding of every parameter by path; None puts all on the first local device.
      dtype: dtype of all parameters; None is the spec's fp32 master weights.

    Returns: arrays by path.
    Raises: WeightsFileError, WeightsMismatchError, each naming file and tensor.
    """
    source = SourceFolder(folder, model_config)
    for line in differences_from_file(model_config, source.path):
        logging.warning("initialising from %s: %s", source.path, line)
    if wide := [name for name in source.tensors if source.dtype(name) == np.float64]:
        logging.warning(
            "initialising from %s: %d F64 tensors are rounded to fp32 (%s)", source.path, len(wide), wide[0]
        )
    by_path: dict[str, list[TensorSlice]] = {}
    for tensor in source.tensors.values():
        by_path.setdefault(tensor.path, []).append(tensor)
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params: dict[str, Array] = {}
    pending: deque[_Pending] = deque()
    pool = ThreadPoolExecutor(workers(3 * PIECE_BYTES), "load")
    try:
        for path, spec in parameter_spec(model_config).items():
            sharding = alone if shardings is None else shardings[path]
            pending.append(_Pending(source, spec, by_path[path], sharding, dtype or spec.dtype, pool))
            while len(pending) > 1 and sum(item.nbytes for item in pending) > BYTES_IN_FLIGHT:
                done = pending.popleft()
                params[done.spec.path] = done.result()
        for item in pending:
            params[item.spec.path] = item.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return params
