"""A checkpoint as a folder of safetensors that other people's code loads, in the hub or the transformers format."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from mmx_jax.checkpoint.store import step_folder_name
from mmx_jax.config import ModelConfig
from mmx_jax.convert.errors import ConfigSchemaError, ConvertError
from mmx_jax.convert.files import new_output
from mmx_jax.convert.hf_config import FORMATS, NATIVE_BLOCK, config_json, end_of_text_ids, parse_json
from mmx_jax.convert.importing import DTYPES, PIECE_BYTES, workers
from mmx_jax.convert.names import decay_buffers
from mmx_jax.convert.progress import ByteProgress
from mmx_jax.convert.safetensors import INDEX_FILE, NAMES, SINGLE_FILE, PlannedTensor, StoredTensor, create_file
from mmx_jax.convert.source import CONFIG_FILE, GENERATION_FILE, check_finite, read_companions, read_tokenizer
from mmx_jax.convert.stored import StoredWeights
from mmx_jax.data.tokenizer import FILE_NAMES

MAX_SHARD = 5 * 10**9
PATCH_FILE = "minimax_partial_rope.py"
REMOTE_CODE_NOTE = (
    "The hub format is run by MiniMax's remote code: copy configuration_minimax_text_01.py and "
    "modeling_minimax_text_01.py from the released repository beside it and load with trust_remote_code=True."
)


@dataclass(frozen=True)
class _Shard:
    """One file to be written."""

    name: str
    tensors: list[tuple[str, np.dtype, tuple[int, ...]]]


def _nbytes(entry: tuple[str, np.dtype, tuple[int, ...]]) -> int:
    return math.prod(entry[2]) * entry[1].itemsize


def _plan(tensors: list[tuple[str, np.dtype, tuple[int, ...]]], max_shard: int) -> list[_Shard]:
    """Tensors in order, a new file whenever the next one would make it larger than `max_shard`."""
    groups: list[list[tuple[str, np.dtype, tuple[int, ...]]]] = [[]]
    size = 0
    for entry in tensors:
        nbytes = _nbytes(entry)
        if groups[-1] and size + nbytes > max_shard:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += nbytes
    if len(groups) == 1:
        return [_Shard(SINGLE_FILE, groups[0])]
    return [_Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


class _Export:
    def __init__(self, weights: StoredWeights, form: str, dtype: str | None, max_shard: int):
        self.weights = weights
        self.buffers: dict[str, np.ndarray] = {}
        tensors = []
        for name, tensor in weights.tensors.items():
            kind = DTYPES[dtype] if dtype else weights.dtype(name)
            tensors.append((name, kind, tensor.shape))
        if form == "transformers":
            self.buffers = dict(decay_buffers(weights.config, NATIVE_BLOCK))
            tensors += [(name, value.dtype, value.shape) for name, value in self.buffers.items()]
        self.shards = _plan(tensors, max_shard)
        sizes = [_nbytes(entry) for shard in self.shards for entry in shard.tensors]
        self.nbytes = sum(sizes)
        self.workers = workers(3 * max(self._piece_bytes(entry) for shard in self.shards for entry in shard.tensors))

    def _piece_rows(self, name: str, dtype: np.dtype) -> int:
        tensor = self.weights.tensors[name]
        itemsize = max(dtype.itemsize, self.weights.dtype(name).itemsize)
        return tensor.units_per_piece(itemsize, PIECE_BYTES) * tensor.rows_per_unit

    def _piece_bytes(self, entry: tuple[str, np.dtype, tuple[int, ...]]) -> int:
        name, dtype, shape = entry
        rows = shape[0] if name in self.buffers else self._piece_rows(name, dtype)
        return _nbytes(entry) // shape[0] * rows

    def pieces(self, planned: PlannedTensor) -> Iterator[tuple[int, int]]:
        """Row ranges of a tensor that fit in `PIECE_BYTES` and meet the unit of its parameter."""
        if planned.name in self.buffers:
            yield 0, planned.shape[0]
            return
        rows = self._piece_rows(planned.name, planned.dtype)
        for start in range(0, planned.shape[0], rows):
            yield start, start + rows

    def write(self, folder: Path, bar: ByteProgress) -> None:
        """Writes all shards and, when there is more than one, the index."""
        weight_map: dict[str, str] = {}
        with ThreadPoolExecutor(self.workers, "export") as pool, ThreadPoolExecutor(1, "export-sync") as syncer:
            synced = []
            for shard in self.shards:
                planned = create_file(folder / shard.name, shard.tensors)
                handle = os.open(folder / shard.name, os.O_WRONLY)
                try:
                    jobs = [(handle, tensor, *rows) for tensor in planned for rows in self.pieces(tensor)]
                    for nbytes in pool.map(lambda job: self._piece(*job), jobs):
                        bar.add(nbytes)
                finally:
                    # The next file is computed while this one goes to the disk.
                    synced.append(syncer.submit(_sync_and_close, handle))
                weight_map |= {tensor.name: shard.name for tensor in planned}
            for done in synced:
                done.result()
        if len(self.shards) > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")

    def _stored(self, planned: PlannedTensor) -> StoredTensor:
        """A tensor by the names that an error needs."""
        step = self.weights.folder / step_folder_name(self.weights.step)
        return StoredTensor(planned.name, step, NAMES[self.weights.dtype(planned.name)], planned.shape, 0)

    def _piece(self, handle: int, planned: PlannedTensor, start: int, stop: int) -> int:
        if planned.name in self.buffers:
            rows = self.buffers[planned.name][start:stop]
        else:
            rows = self.weights.read_rows(planned.name, start, stop)
            check_finite(self._stored(planned), rows, start, planned.dtype)
            rows = rows.astype(planned.dtype, copy=False)
        data = memoryview(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
        position = planned.offset + start * (planned.nbytes // planned.shape[0])
        done = 0
        while done < len(data):
            done += os.pwrite(handle, data[done:], position + done)
        return len(data)


def _sync_and_close(handle: int) -> None:
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def notes(config: ModelConfig, form: str) -> list[str]:
    """What a user of an exported folder must know."""
    if form == "hub":
        return [REMOTE_CODE_NOTE]
    if config.rotary_dim == config.head_dim:
        return []
    return [
        f"Stock transformers rotates all {config.head_dim} dims of a head; this model rotates {config.rotary_dim}. Its "
        f"logits are right only after `import {PATCH_FILE.removesuffix('.py')}; "
        f"{PATCH_FILE.removesuffix('.py')}.apply()` with the file that is in the folder."
    ]


def export_weights(
    checkpoint: str | Path,
    output: str | Path,
    form: str,
    *,
    step: int | None = None,
    dtype: str | None = None,
    max_shard: int = MAX_SHARD,
    tokenizer: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Writes a step as safetensors with config.json, generation_config.json, tokenizer files and an index.

    Args:
      checkpoint: workdir, folder of checkpoints, or one step.
      output: folder to be made; it appears under this name when it is whole.
      form: "hub" or "transformers".
      step: which step; None takes the newest.
      dtype: "bf16", "fp32", or None for the stored dtypes.
      max_shard: bytes of a file at most (one tensor may be more).
      tokenizer: folder with a tokenizer that fits the model; None takes the workdir's files.
      progress: draws a progress bar on a terminal.

    Returns: `output`.
    Raises: ConvertError and its kinds; CheckpointDamagedError for a chunk that is not what was saved.
    """
    if form not in FORMATS:
        raise ConvertError(f"format {form!r}; known are {', '.join(FORMATS)}")
    output, partial = new_output(output)
    weights = StoredWeights(checkpoint, step)
    own = weights.folder.parent
    place = own if tokenizer is None else Path(tokenizer)
    files = _companions(weights.config, place, needed=tokenizer is not None)
    # Where generation ends came with the weights; another tokenizer folder is asked only when they brought nothing.
    known, where = files.pop(GENERATION_FILE, None), place / GENERATION_FILE
    if (own / GENERATION_FILE).exists():
        known, where = read_companions(own)[GENERATION_FILE], own / GENERATION_FILE
    generation = _generation_config(known, where, weights.config)
    job = _Export(weights, form, dtype, max_shard)
    kinds = {str(kind) for shard in job.shards for name, kind, _ in shard.tensors if name in weights.tensors}
    config = config_json(weights.config, form, kinds.pop() if len(kinds) == 1 else "float32")
    config |= weights.metadata.get("source", {}).get("config", {})
    config["eos_token_id"] = generation.get("eos_token_id")
    files[CONFIG_FILE] = _json_bytes(config)
    files[GENERATION_FILE] = _json_bytes(generation)
    if form == "transformers" and weights.config.rotary_dim != weights.config.head_dim:
        files[PATCH_FILE] = resources.files("mmx_jax.convert").joinpath("transformers_patch.py").read_bytes()
    created = False
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        created = True
        with ByteProgress("export", job.nbytes, progress) as bar:
            job.write(partial, bar)
        for name, content in files.items():
            (partial / name).write_bytes(content)
        partial.rename(output)
    except OSError as error:
        raise ConvertError(f"{output}: the export was not written: {error}") from error
    finally:
        if created:  # gone already when all went well; anything of this name is ours
            shutil.rmtree(partial, ignore_errors=True)
    logging.info("exported %.2f GB in %.1f s", job.nbytes / 1e9, bar.seconds)
    return output


def _json_bytes(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def _companions(config: ModelConfig, place: Path, *, needed: bool) -> dict[str, bytes]:
    """The tokenizer's files and the generation config of a folder.

    Raises: ConvertError when the tokenizer cannot be used, has more ids than the model, or is needed and not there.
    """
    if not place.is_dir():
        raise ConvertError(f"{place}: no such folder; name one with tokenizer files")
    tokenizer = read_tokenizer(place)
    if tokenizer is None:
        if needed:
            raise ConvertError(f"{place}: holds neither {' nor '.join(FILE_NAMES)}")
        logging.warning("%s has no tokenizer, so the export has none; --tokenizer names a folder with one", place)
    elif tokenizer.vocab_size > config.vocab_size:
        sizes = f"{tokenizer.vocab_size} ids, the model's vocab_size is {config.vocab_size}"
        raise ConvertError(f"{tokenizer.file}: has {sizes}; it is not this model's tokenizer")
    return read_companions(place)


def _suppressed(data: dict[str, Any], where: Path) -> list[int]:
    """The ids that the model's own generation config forbids. Raises: ConfigSchemaError for what is no list of ids."""
    found = data.get("suppress_tokens")
    ids = [] if found is None else found
    if not isinstance(ids, list) or any(type(token) is not int or token < 0 for token in ids):
        raise ConfigSchemaError(where, "suppress_tokens", f"is {str(found)[:80]}; it must be a list of ids")
    return ids


def _generation_config(known: bytes | None, where: Path, config: ModelConfig) -> dict[str, Any]:
    """Where generation ends (INV-42) and which ids it must not choose (INV-41); keys that came with the model stay.

    The model's own end-of-text id comes first; further ids stay when the known ones include it.
    """
    data = {} if known is None else parse_json(known, where)
    ids = end_of_text_ids(data, where)
    end = config.end_of_text_id
    if end is not None:
        others = [token for token in ids if token != end] if end in ids else []
        data["eos_token_id"] = [end, *others] if others else end
        if end not in ids and ids:
            logging.warning("%s: generation ends at %s; the model's own id, %d, is exported", where, list(ids), end)
    if config.trained_vocab_size is not None and config.trained_vocab_size < config.vocab_size:
        untrained = range(config.trained_vocab_size, config.vocab_size)
        data["suppress_tokens"] = sorted({*_suppressed(data, where), *untrained})
    return {"use_cache": True} | data
