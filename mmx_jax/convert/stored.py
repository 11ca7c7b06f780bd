"""The tensors of a stored step under their published names, whoever wrote it: an import, or a training run."""

import dataclasses
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmx_jax.checkpoint import CheckpointDamagedError, Problem, layout, reader
from mmx_jax.checkpoint.layout import ArrayRecord, Index
from mmx_jax.checkpoint.store import is_complete, step_folder_name, steps_on_disk
from mmx_jax.config import ModelConfig, RunConfig, from_dict
from mmx_jax.convert.errors import ConvertError
from mmx_jax.convert.files import open_regular
from mmx_jax.convert.names import tensor_map

CHECKPOINTS = "checkpoints"
CACHE_BYTES = 2**30
KEPT_KEYS = (
    "max_position_embeddings", "initializer_range", "router_jitter_noise", "output_router_logits", "bos_token_id",
    "pad_token_id",
)  # fmt: skip
"""Keys of a config.json that no model here has a field for: an import keeps them, for exports to give them back."""


def complete_steps(folder: Path) -> list[int]:
    """Numbers of the complete steps in a folder of checkpoints, ascending; uses no accelerator and no lock."""
    return [step for step in steps_on_disk(folder) if is_complete(folder / step_folder_name(step))]


def locate(folder: str | Path) -> tuple[Path, int | None] | None:
    """The folder of checkpoints that a path means, and the step when the path is a single one; None when it is neither.

    A workdir, its folder of checkpoints and a step are told apart by what they hold, for a workdir may well be called
    20260131.
    """
    path = layout.plain_path(folder)
    for candidate in (path, path / CHECKPOINTS):
        if complete_steps(candidate):
            return candidate, None
    parts = (layout.CHECKSUMS_FILE, layout.METADATA_FILE, layout.ARRAYS_FOLDER)
    is_name = re.fullmatch(r"\d{8,}", path.name) and step_folder_name(int(path.name)) == path.name
    if is_name and any((path / part).exists() for part in parts):
        return path.parent, int(path.name)
    return None


def find_step(folder: str | Path, step: int | None = None) -> tuple[Path, int]:
    """The folder of checkpoints and the step that a path means: a workdir, its folder of checkpoints, or one step.

    Raises: ConvertError when there is none.
    """
    advice = "name a workdir, its folder of checkpoints, or one step in it"
    found = locate(folder)
    if found is None:
        raise ConvertError(f"{folder}: holds no checkpoint; {advice}")
    path, only = found
    steps = complete_steps(path)
    wanted = only if only is not None else step if step is not None else steps[-1]
    if wanted not in steps:
        raise ConvertError(f"{folder}: holds no complete checkpoint of step {wanted}; {advice}")
    return path, wanted


def kept_values(data: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `KEPT_KEYS` in a config.json, MiniMax-VL-01's too, as far as they are plain."""
    text = data.get("text_config", data)
    return {key: text[key] for key in KEPT_KEYS if key in text and isinstance(text[key], int | float | None)}


def stored_model(metadata: dict[str, Any]) -> ModelConfig:
    """The model of a step as its stage trains it, from the configuration that was saved with it."""
    run: RunConfig = from_dict(metadata["config"])
    stage = next(stage for stage in run.stages if stage.name == metadata["progress"]["stage"])
    return run.model if stage.rope_base is None else dataclasses.replace(run.model, rope_base=stage.rope_base)


class StoredWeights:
    """Reads published tensors out of a step, verified, chunk by chunk, in bounded memory."""

    def __init__(self, folder: str | Path, step: int | None = None):
        """Opens a step as `find_step` finds it.

        Raises: ConvertError when the step holds no such model, or its weights are quantised; CheckpointDamagedError.
        """
        self.folder, self.step = find_step(folder, step)
        self._manifest = reader.read_manifest(self.folder / step_folder_name(self.step))
        self.metadata = self._manifest.metadata
        if self.metadata.get("quantization"):
            raise ConvertError(f"{folder}: its weights are quantised; convert the checkpoint that they were made from")
        self.config = stored_model(self.metadata)
        self.tensors = tensor_map(self.config)
        for tensor in self.tensors.values():
            record = self._manifest.records.get(f"params/{tensor.path}")
            if record is None or record.shape[len(tensor.index) :] != tensor.part:
                raise ConvertError(
                    f"{folder}: array params/{tensor.path} is missing or of another shape than its config"
                )
        self._cache: OrderedDict[tuple[str, Index], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def record(self, name: str) -> ArrayRecord:
        """The stored array that holds a tensor."""
        return self._manifest.records[f"params/{self.tensors[name].path}"]

    def dtype(self, name: str) -> np.dtype:
        """Stored dtype of a tensor."""
        return np.dtype(self.record(name).dtype)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor in its published layout.

        Raises: CheckpointDamagedError naming array, chunk and file.
        """
        tensor = self.tensors[name]
        unit = tensor.rows_per_unit
        low, high = start // unit, -(-stop // unit)
        box = [slice(i, i + 1) for i in tensor.index] + [slice(0, size) for size in tensor.part]
        box[len(tensor.index) + tensor.row_dim] = slice(low, high)
        values = self._box(self.record(name), tuple(box))
        rows = tensor.to_stored(values.reshape(tensor.with_units(high - low)))
        return rows[start - low * unit : stop - low * unit]

    def _box(self, record: ArrayRecord, box: tuple[slice, ...]) -> np.ndarray:
        indices = list(record.overlapping(box))
        if len(indices) == 1 and record.chunk_slices(indices[0]) == box:
            return self._read(record, indices[0])
        out = np.empty([part.stop - part.start for part in box], record.dtype)
        for index in indices:
            chunk = record.chunk_slices(index)
            common = [(max(b.start, c.start), min(b.stop, c.stop)) for b, c in zip(box, chunk)]
            source = tuple(slice(low - c.start, high - c.start) for (low, high), c in zip(common, chunk))
            target = tuple(slice(low - b.start, high - b.start) for (low, high), b in zip(common, box))
            out[target] = self._chunk(record, index)[source]
        return out

    def _chunk(self, record: ArrayRecord, index: Index) -> np.ndarray:
        """A chunk that holds more than one tensor's part: kept for the next one."""
        key = (record.name, index)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        values = self._read(record, index)
        with self._lock:
            self._cache[key] = values
            while sum(chunk.nbytes for chunk in self._cache.values()) > CACHE_BYTES and len(self._cache) > 1:
                self._cache.popitem(last=False)
        return values

    def _read(self, record: ArrayRecord, index: Index) -> np.ndarray:
        file = record.chunk_file(index)
        path = self._manifest.folder / layout.ARRAYS_FOLDER / record.folder / file
        try:
            with open_regular(path) as opened:
                data = np.fromfile(opened, np.uint8)
        except OSError as error:
            reason = str(error)
        else:
            found, saved = layout.crc32(data), self._manifest.checksums[record.name][file]
            if found == saved:
                return data.view(record.dtype).reshape(record.chunk)
            reason = f"CRC-32 of its bytes is {found}, saved as {saved}"
        raise CheckpointDamagedError(self.folder, self.step, [Problem(path, reason, record.name, index)])
