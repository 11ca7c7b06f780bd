"""Released weights into a checkpoint that the trainer restores and verifies, tensor by tensor.

The scanned stacks of the released model are 36 GB each, so none is ever whole in memory: every source tensor (or a
range of its rows, when it is large) is one chunk of the stored array. A killed import goes on where it stopped.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
from absl import logging

from mmx_jax.checkpoint import layout
from mmx_jax.checkpoint.layout import ArrayRecord, Index
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
from mmx_jax.convert.errors import ConvertError
from mmx_jax.convert.names import TensorSlice
from mmx_jax.convert.progress import ByteProgress
from mmx_jax.convert.source import SourceFolder, check_finite, copy_tokenizer
from mmx_jax.convert.stored import CHECKPOINTS
from mmx_jax.model import parameter_spec
from mmx_jax.model.quantize import is_quantizable, quantize_rows, scale_shape

PIECE_BYTES = 128 * 2**20
BYTES_IN_FLIGHT = 3 * 2**29
MOST_WORKERS = 16
STEP = 0
STAGE = "imported"
TEMPORARY = "00000000.importing"
JOURNAL = "import.journal"
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
        self.final = workdir / CHECKPOINTS / f"{STEP:08d}"
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
        about = [(t.name, t.file.name, t.code, t.shape, t.offset) for t in source.stored.values()]
        files = sorted(
            {(t.file.name, t.file.stat().st_size, t.file.stat().st_mtime_ns) for t in source.stored.values()}
        )
        arrays = [(path, spec.shape) for path, spec in self.specs.items()]
        plan = [layout.FORMAT, PIECE_BYTES, dtype, quantize, sorted(about), files, repr(source.config), arrays]
        self.fingerprint = hashlib.sha256(json.dumps(plan).encode()).hexdigest()

    def _dtypes(self, wanted: str | None) -> dict[str, np.dtype]:
        """Stored dtype of each parameter: the one asked for, or the widest one that its tensors have."""
        if wanted is not None:
            return dict.fromkeys(self.specs, DTYPES[wanted])
        found: dict[str, np.dtype] = {}
        for tensor in self.source.tensors.values():
            read = self.source.stored[tensor.name].dtype
            read = DTYPES["fp32"] if read.itemsize > 2 else read
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

    def run(self, progress: ByteProgress) -> None:
        """Writes every piece that the journal does not have."""
        stores = {name: layout.open_for_chunks(self.folder, record) for name, record in self.records.items()}

        def write(piece: Piece) -> None:
            stored = self.source.stored[piece.tensor.name]
            rows = stored.read_rows(*piece.rows)
            check_finite(stored, rows, piece.rows[0], piece.dtype)
            lines = []
            for name, values in self.arrays(piece, rows):
                record = self.records[name]
                crc = layout.write_chunk(stores[name], record, piece.chunk, values)
                lines.append([name, record.chunk_file(piece.chunk), crc])
            self._note(lines)
            progress.add(piece.nbytes)

        pending = [piece for piece in self.pieces if not self._known(piece)]
        progress.add(sum(piece.nbytes for piece in self.pieces) - sum(piece.nbytes for piece in pending))
        stored = self.source.stored
        largest = max(piece.working_bytes(stored[piece.tensor.name].dtype) for piece in self.pieces)
        pool = ThreadPoolExecutor(workers(largest), "import")
        try:
            for future in [pool.submit(write, piece) for piece in pending]:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _known(self, piece: Piece) -> bool:
        names = [n for n in (f"params/{piece.tensor.path}",) if n in self.records]
        names = names or [f"params/{piece.tensor.path}/{part}" for part in ("values", "scale")]
        return all(self.records[name].chunk_file(piece.chunk) in self.checksums[name] for name in names)

    # The journal

    def open_journal(self) -> IO[str]:
        """Creates the temporary folder, or takes over what an earlier import of the same files has written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = open(self.folder / JOURNAL, "a+")  # noqa: SIM115 (kept open: it is the lock)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise ConvertError(f"{self.folder}: another import is writing here") from None
        handle.seek(0)
        first, *lines = handle.read().split("\n") or [""]
        if first == self.fingerprint:
            self._take_over(lines)
        else:
            for entry in self.folder.iterdir():
                if entry.name != JOURNAL:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            handle.truncate(0)
            handle.write(self.fingerprint + "\n")
            handle.flush()
        self._journal = handle
        for name, record in self.records.items():
            # Created anew on every run: it is small, and its checksum is then known.
            self.checksums[name][layout.ARRAY_FILE] = _create(self.folder, record)
        return handle

    def _take_over(self, lines: list[str]) -> None:
        for line in lines:
            try:
                entries = json.loads(line)
            except ValueError:  # the line that was being written when the import ended
                continue
            for name, file, crc in entries:
                record = self.records[name]
                path = self.folder / layout.ARRAYS_FOLDER / record.folder / file
                if path.is_file() and path.stat().st_size == record.chunk_nbytes:
                    self.checksums[name][file] = crc

    def _note(self, entries: list[list[str]]) -> None:
        """Remembers written chunks; the chunks are on the disk already, so that a line never promises too much."""
        self._journal.write(json.dumps(entries) + "\n")
        self._journal.flush()
        for name, file, crc in entries:
            self.checksums[name][file] = crc

    def commit(self, metadata: dict[str, Any]) -> None:
        """Gives the step its checksums and its name."""
        (self.folder / JOURNAL).unlink()
        layout.write_metadata(self.folder, STEP, metadata, True)
        layout.write_checksums(self.folder, list(self.records.values()), self.checksums)
        self.folder.rename(self.final)
        handle = os.open(self.final.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _create(folder: Path, record: ArrayRecord) -> str:
    path = folder / layout.ARRAYS_FOLDER / record.folder / layout.ARRAY_FILE
    return layout.crc32(path.read_bytes()) if path.is_file() else layout.create_array(folder, record)


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
    folder = SourceFolder(source)
    workdir = Path(checkpoint).absolute()
    job = _Import(folder, workdir, dtype, quantize)
    if job.final.exists():
        raise ConvertError(f"{job.final} is there already; choose another folder, or remove it")
    total = sum(piece.nbytes for piece in job.pieces)
    try:
        with job.open_journal():
            left = sum(piece.nbytes for piece in job.pieces if not job._known(piece))
            free = shutil.disk_usage(job.folder).free
            if left > free:
                raise ConvertError(f"{workdir}: needs {left / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free")
            with ByteProgress("import", total, progress) as bar:
                job.run(bar)
            copy_tokenizer(folder.path, workdir)
            metadata = {
                "config": to_dict(imported_run(folder.config, workdir.name)),
                "progress": PROGRESS,
                "source": {"files": str(folder.path.name), "tensors": len(folder.tensors)},
                "quantization": quantize,
            }
            job.commit(metadata)
    except ConvertError:
        raise
    except Exception as error:  # tensorstore reports a full disk as ValueError or its own kinds
        if isinstance(error, OSError) or "No space left" in str(error) or "os_error" in str(error):
            reason = f"import stopped: {error}. Make room and give the same command again: it goes on from there"
            raise ConvertError(f"{job.folder}: {reason}") from error
        raise
    logging.info("imported %.2f GB in %.1f s (%.2f GB/s)", total / 1e9, bar.seconds, total / 1e9 / bar.seconds)
    return job.final
