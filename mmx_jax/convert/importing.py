"""Released weights into a checkpoint that the trainer restores and verifies, tensor by tensor.

The scanned stacks of the released model are 36 GB each, so none is ever whole in memory: every source tensor (or a
range of its rows, when it is large) is one chunk of the stored array. A killed import goes on where it stopped.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging

from mmx_jax.checkpoint import layout
from mmx_jax.checkpoint.layout import ArrayRecord, Index
from mmx_jax.checkpoint.store import step_folder_name
from mmx_jax.config import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    SchedulePhase,
    SourceConfig,
    StageConfig,
    to_dict,
)
from mmx_jax.convert.errors import ConvertError, WeightsFileError
from mmx_jax.convert.files import size_text
from mmx_jax.convert.hf_config import read_json
from mmx_jax.convert.journal import JOURNAL, Chunk, Journal, kept_chunks
from mmx_jax.convert.names import TensorSlice
from mmx_jax.convert.progress import ByteProgress
from mmx_jax.convert.safetensors import fingerprint
from mmx_jax.convert.source import CONFIG_FILE, SourceFolder, check_finite
from mmx_jax.convert.stored import CHECKPOINTS, kept_values
from mmx_jax.convert.workdir import STEP, TEMPORARY, companions, refuse_used, write_companions
from mmx_jax.model import parameter_spec
from mmx_jax.model.quantize import is_quantizable, quantize_rows, scale_shape

PIECE_BYTES = 128 * 2**20
BYTES_IN_FLIGHT = 3 * 2**29
MOST_WORKERS = 16
STAGE = "imported"
FULL = ("No space left", "Disk quota exceeded")
PROGRESS = {"stage": STAGE, "round": 1} | dict.fromkeys(
    ("step", "tokens", "row", "update", "skipped", "skipped_in_a_row"), 0
)
"""Where a run stands that has done nothing yet, in the form in which training stores it."""
DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp32": np.dtype(np.float32)}


@dataclass(frozen=True)
class Piece:
    """A range of rows of one source tensor: one chunk of one array (two, when it is quantised)."""

    tensor: TensorSlice
    units: int
    number: int
    dtype: np.dtype
    quantized: bool

    @property
    def rows(self) -> tuple[int, int]:
        """First row and the row after the last."""
        size = self.units * self.tensor.rows_per_unit
        return self.number * size, (self.number + 1) * size

    @property
    def chunk(self) -> Index:
        """Index of the chunk in its array."""
        place = [0] * len(self.tensor.part)
        place[self.tensor.row_dim] = self.number
        return (*self.tensor.index, *place)

    @property
    def elements(self) -> int:
        """Values that it has."""
        return math.prod(self.tensor.with_units(self.units))

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the checkpoint, scales not counted."""
        return self.elements * (1 if self.quantized else self.dtype.itemsize)

    def working_bytes(self, read: np.dtype) -> int:
        """Memory that it takes on its way: as read, and cast and transposed, or as three fp32 arrays and int8."""
        return self.elements * (read.itemsize + (14 if self.quantized else 2 * self.dtype.itemsize))


def workers(working_bytes: int) -> int:
    """How many pieces to work on at once: many small ones, to hide the disk's delays; few large ones, for memory."""
    return max(1, min(MOST_WORKERS, BYTES_IN_FLIGHT // max(working_bytes, 1)))


def imported_run(model: ModelConfig, name: str) -> RunConfig:
    """The configuration that imported weights are stored with: the model, and a stage that trains on nothing."""
    data = DataConfig(sources=(SourceConfig(name="none", store="none"),))
    batch = BatchConfig(micro_batch=1, ramp=((0, 1),))
    schedule = ScheduleConfig(phases=(SchedulePhase(until_tokens=1, learning_rate=0.0),), warmup_steps=0)
    stage = StageConfig(name=STAGE, sequence_length=8192, data=data, batch=batch, schedule=schedule)
    return RunConfig(name=name, model=model, stages=(stage,))


class _Import:
    """One import: what is to be written, and what a journal says is there already."""

    def __init__(self, source: SourceFolder, workdir: Path, dtype: str | None, quantize: str | None):
        self.source = source
        self.final = workdir / CHECKPOINTS / step_folder_name(STEP)
        self.folder = workdir / CHECKPOINTS / TEMPORARY
        self.specs = parameter_spec(source.config)
        self.records: dict[str, ArrayRecord] = {}
        self.pieces: list[Piece] = []
        dtypes = self._dtypes(dtype)
        for tensor in source.tensors.values():
            quantized = quantize is not None and is_quantizable(self.specs[tensor.path])
            target = dtypes[tensor.path]
            read_as = source.stored[tensor.name].dtype
            units = tensor.units_per_piece(max(target.itemsize, read_as.itemsize), PIECE_BYTES)
            for number in range(tensor.row_units // units):
                self.pieces.append(Piece(tensor, units, number, target, quantized))
            self._record(tensor, units, target, quantized)
        self.checksums: dict[str, layout.Checksums] = {name: {} for name in self.records}
        self.workers = workers(max(p.working_bytes(source.stored[p.tensor.name].dtype) for p in self.pieces))
        about = [(t.name, t.file.name, t.code, t.shape, t.offset) for t in source.stored.values()]
        shards = sorted({tensor.file for tensor in source.stored.values()})
        files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns, fingerprint(f)) for f in shards]
        arrays = [(path, spec.shape) for path, spec in self.specs.items()]
        plan = [layout.FORMAT, PIECE_BYTES, dtype, quantize, sorted(about), files, repr(source.config), arrays]
        self.fingerprint = hashlib.sha256(json.dumps(plan).encode()).hexdigest()

    def _dtypes(self, wanted: str | None) -> dict[str, np.dtype]:
        """Stored dtype of each parameter: the one asked for, or the widest one that its tensors have."""
        if wanted is not None:
            return dict.fromkeys(self.specs, DTYPES[wanted])
        found: dict[str, np.dtype] = {}
        for tensor in self.source.tensors.values():
            stored = self.source.stored[tensor.name]
            read = stored.dtype
            if read.itemsize > DTYPES["fp32"].itemsize:
                reason = (
                    f"tensor {stored.name!r} is {stored.code}; checkpoints hold fp32 at most: --dtype fp32 rounds it"
                )
                raise WeightsFileError(stored.file, reason)
            known = found.setdefault(tensor.path, read)
            if known != read:
                found[tensor.path] = DTYPES["fp32"]
        return found

    def _record(self, tensor: TensorSlice, units: int, dtype: np.dtype, quantized: bool) -> None:
        spec = self.specs[tensor.path]
        chunk = (1,) * len(tensor.index) + tensor.with_units(units)
        name = f"params/{tensor.path}"
        if not quantized:
            self.records[name] = ArrayRecord(name, spec.shape, dtype.name, chunk)
            return
        scales = scale_shape(spec)
        self.records[f"{name}/values"] = ArrayRecord(f"{name}/values", spec.shape, "int8", chunk)
        scale_chunk = tuple(min(c, s) for c, s in zip(chunk, scales))
        self.records[f"{name}/scale"] = ArrayRecord(f"{name}/scale", scales, "float32", scale_chunk)

    def arrays(self, piece: Piece, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """(name of the array, values of its chunk) of a piece, from the source's rows."""
        tensor, name = piece.tensor, f"params/{piece.tensor.path}"
        stack = (1,) * len(tensor.index)
        if not piece.quantized:
            values = tensor.from_stored(rows.astype(piece.dtype, copy=False))
            yield name, values.reshape(stack + values.shape)
            return
        values, scale = quantize_rows(rows)
        int8 = tensor.from_stored(values)
        yield f"{name}/values", int8.reshape(stack + int8.shape)
        record = self.records[f"{name}/scale"]
        yield record.name, scale.reshape(record.chunk)

    def chunks(self, piece: Piece) -> list[Chunk]:
        """The chunks that a piece becomes."""
        name = f"params/{piece.tensor.path}"
        names = (f"{name}/values", f"{name}/scale") if piece.quantized else (name,)
        return [(self.records[name], piece.chunk) for name in names]

    def take_over(self, journal: Journal, progress: bool) -> list[Piece]:
        """Reads again what an earlier import has written, and returns the pieces that are still to be written."""
        known = [piece for piece in self.pieces if journal.knows(self.chunks(piece))]
        pending = [piece for piece in self.pieces if not journal.knows(self.chunks(piece))]
        damaged = 0
        with ByteProgress("verify what is there", sum(piece.nbytes for piece in known), progress) as bar:
            results = kept_chunks(journal, [self.chunks(piece) for piece in known], self.workers)
            for piece, entries in zip(known, results):
                bar.add(piece.nbytes)
                if entries is None:
                    damaged += 1
                    pending.append(piece)
                    continue
                for name, file, crc in entries:
                    self.checksums[name][file] = crc
        if damaged:
            logging.warning(
                "%s: %d of %d pieces are not as they were written: redone", self.folder, damaged, len(known)
            )
        return pending

    def create_arrays(self) -> None:
        """Makes the description of every array anew: it is small, and its checksum is then known."""
        for name, record in self.records.items():
            (self.folder / layout.ARRAYS_FOLDER / record.folder / layout.ARRAY_FILE).unlink(missing_ok=True)
            self.checksums[name][layout.ARRAY_FILE] = layout.create_array(self.folder, record)

    def run(self, journal: Journal, pending: list[Piece], progress: ByteProgress) -> None:
        """Writes pieces, and notes each in the journal when its chunks are on the disk."""
        stores = {name: layout.open_for_chunks(self.folder, record) for name, record in self.records.items()}
        lock = threading.Lock()

        def write(piece: Piece) -> None:
            stored = self.source.stored[piece.tensor.name]
            rows = stored.read_rows(*piece.rows)
            check_finite(stored, rows, piece.rows[0], piece.dtype)
            entries = []
            for name, values in self.arrays(piece, rows):
                record = self.records[name]
                crc = layout.write_chunk(stores[name], record, piece.chunk, values)
                entries.append((name, record.chunk_file(piece.chunk), crc))
            with lock:
                journal.note(entries)
                for name, file, crc in entries:
                    self.checksums[name][file] = crc
            progress.add(piece.nbytes)

        pool = ThreadPoolExecutor(self.workers, "import")
        try:
            for future in [pool.submit(write, piece) for piece in pending]:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def commit(self, metadata: dict[str, Any]) -> None:
        """Gives the step its checksums and its name; only then the journal goes, so that no moment loses the work."""
        layout.write_metadata(self.folder, STEP, metadata, True)
        layout.write_checksums(self.folder, list(self.records.values()), self.checksums)
        self.folder.rename(self.final)
        (self.final / JOURNAL).unlink()
        handle = os.open(self.final.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def import_weights(
    source: str | Path,
    checkpoint: str | Path,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    progress: bool = True,
) -> Path:
    """Imports a folder of safetensors as step 0 of a workdir; a killed import goes on when it is called again.

    Args:
      source: folder with config.json and weights in the hub, the transformers or MiniMax-VL-01's format.
      checkpoint: workdir; the step goes to its folder `checkpoints`, tokenizer files beside that.
      dtype: "bf16", "fp32", or None for the dtypes of the source.
      quantize: "int8" stores matmul weights in 8 bits with a scale for each output channel (recipe §9.3).
      progress: draws a progress bar on a terminal.

    Returns: the folder of the step.
    Raises: ConvertError and its kinds, each naming file and tensor; nothing that looks like a step is left then.
    """
    workdir = layout.plain_path(checkpoint)
    for path in (Path(source).absolute(), workdir):
        if not layout.is_utf8(path):
            raise ConvertError(f"{path}: its path is not UTF-8, which checkpoints need; rename it")
    refuse_used(workdir)
    folder = SourceFolder(source)
    files = companions(folder.path)
    write_companions(files, workdir, check_only=True)
    job = _Import(folder, workdir, dtype, quantize)
    try:
        with contextlib.closing(Journal(job.folder, job.fingerprint)) as journal:
            pending = job.take_over(journal, progress)
            left = sum(piece.nbytes for piece in pending)
            free = shutil.disk_usage(job.folder).free
            if left > free:
                raise ConvertError(f"{workdir}: needs {size_text(left)}, but {size_text(free)} are free")
            job.create_arrays()
            with ByteProgress("import", left, progress) as bar:
                job.run(journal, pending, bar)
            write_companions(files, workdir)
            metadata = {
                "config": to_dict(imported_run(folder.config, workdir.name)),
                "progress": PROGRESS,
                "source": {
                    "files": folder.path.name,
                    "tensors": len(folder.tensors),
                    "config": kept_values(read_json(folder.path / CONFIG_FILE)),
                },
                "quantization": quantize,
            }
            job.commit(metadata)
    except ConvertError:
        raise
    except Exception as error:  # tensorstore reports errors of the system as ValueError or its own kinds
        if isinstance(error, OSError) or any(mark in str(error) for mark in ("os_error", *FULL)):
            raise ConvertError(f"{job.folder}: import stopped: {error}. {_advice(error)}") from error
        raise
    logging.info("imported %.2f GB in %.1f s (%.2f GB/s)", left / 1e9, bar.seconds, left / 1e9 / bar.seconds)
    return job.final


def _advice(error: Exception) -> str:
    """What to do about an error of the system."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(mark in str(error) for mark in FULL)
    first = "Make room" if full else "Mend this"
    return f"{first} and give the same command again: it goes on from there"
