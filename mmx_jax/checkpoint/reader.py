"""The reading half: a step is checked byte for byte against its checksums while its arrays are put on any mesh.

Each process reads the chunks that its own devices need, each chunk once per array, and compares the CRC-32 of the bytes
it is about to use, so nothing unverified reaches a device and no process needs a whole sharded array.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from mmx_jax.checkpoint import layout
from mmx_jax.checkpoint.errors import CheckpointDamagedError, CheckpointMismatchError, Problem
from mmx_jax.checkpoint.layout import ArrayRecord, Checksums, Index

READERS = min(16, 2 * (os.cpu_count() or 1))
BYTES_IN_FLIGHT = 4 * 2**30
SHOWN_DIFFERENCES = 5


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a step holds, from its two verified JSON files."""

    folder: Path
    step: int
    metadata: dict[str, Any]
    permanent: bool
    records: dict[str, ArrayRecord]
    checksums: dict[str, Checksums]

    @property
    def nbytes(self) -> int:
        return sum(record.nbytes for record in self.records.values())


def _damaged(step_folder: Path, *problems: Problem) -> CheckpointDamagedError:
    name = step_folder.name
    return CheckpointDamagedError(step_folder.parent, int(name) if name.isdigit() else -1, list(problems))


def _read_json_file(step_folder: Path, name: str, parse: Callable[[bytes], Any]) -> tuple[bytes, Any]:
    path = step_folder / name
    try:
        data = path.read_bytes()
        return data, parse(data)
    except FileNotFoundError:
        reason = "is missing: the step was not written to its end, or the file was removed"
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {error}"
    raise _damaged(step_folder, Problem(path, reason))


def read_manifest(step_folder: Path) -> Manifest:
    """Reads and verifies `checksums.json` and `metadata.json` of a step.

    Raises: CheckpointDamagedError when either is missing or changed, or belongs to another step or format.
    """
    _, sums = _read_json_file(step_folder, layout.CHECKSUMS_FILE, layout.unseal)
    data, about = _read_json_file(step_folder, layout.METADATA_FILE, json.loads)
    path = step_folder / layout.METADATA_FILE
    if sums.get("format") != layout.FORMAT:
        reason = f"format {sums.get('format')!r}; this version reads format {layout.FORMAT}"
        raise _damaged(step_folder, Problem(step_folder / layout.CHECKSUMS_FILE, reason))
    if layout.crc32(data) != sums[layout.METADATA_FILE]:
        reason = f"CRC-32 is {layout.crc32(data)}, saved as {sums[layout.METADATA_FILE]}"
        raise _damaged(step_folder, Problem(path, reason))
    if step_folder.name.isdigit() and about["step"] != int(step_folder.name):
        raise _damaged(
            step_folder, Problem(path, f"holds step {about['step']}, but the folder says {step_folder.name}")
        )
    arrays = sums["arrays"]
    return Manifest(
        folder=step_folder,
        step=about["step"],
        metadata=about["metadata"],
        permanent=about["permanent"],
        records={n: ArrayRecord(n, tuple(a["shape"]), a["dtype"], tuple(a["chunk"])) for n, a in arrays.items()},
        checksums={name: a["files"] for name, a in arrays.items()},
    )


def missing_files(manifest: Manifest) -> list[Problem]:
    """Files of a step that are absent or of the wrong size, without reading them."""
    problems = []
    for name, record in manifest.records.items():
        folder = manifest.folder / layout.ARRAYS_FOLDER / record.folder
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)} if folder.is_dir() else {}
        if layout.ARRAY_FILE not in sizes:
            problems.append(Problem(folder / layout.ARRAY_FILE, "is missing", name))
        for index in record.chunks():
            file = record.chunk_file(index)
            if file not in sizes:
                problems.append(Problem(folder / file, "is missing", name, index))
            elif sizes[file] != record.chunk_nbytes:
                reason = f"has {sizes[file]} bytes instead of {record.chunk_nbytes}"
                problems.append(Problem(folder / file, reason, name, index))
    return problems


class _ArrayReader:
    """Reads verified chunks of one stored array."""

    def __init__(self, manifest: Manifest, record: ArrayRecord):
        self.record = record
        self._checksums = manifest.checksums[record.name]
        self._folder = manifest.folder / layout.ARRAYS_FOLDER / record.folder
        path = self._folder / layout.ARRAY_FILE
        try:
            found = layout.crc32(path.read_bytes())
            if found != self._checksums[layout.ARRAY_FILE]:
                raise ValueError(f"CRC-32 is {found}, saved as {self._checksums[layout.ARRAY_FILE]}")
            self._store = ts.open(record.spec(manifest.folder), open=True).result()
        except FileNotFoundError:
            raise _damaged(manifest.folder, Problem(path, "is missing", record.name)) from None
        except (OSError, ValueError) as error:
            raise _damaged(manifest.folder, Problem(path, str(error), record.name)) from error
        self._step_folder = manifest.folder

    def chunk(self, index: Index) -> np.ndarray:
        """The values of one chunk. Raises: CheckpointDamagedError unless they are exactly those that were saved."""
        file = self.record.chunk_file(index)
        try:
            values = self._store[self.record.chunk_slices(index)].read().result()
        except (OSError, ValueError) as error:
            reason = str(error)
        else:
            found = layout.crc32(values)
            if found == self._checksums[file]:
                return values
            reason = f"CRC-32 of its bytes is {found}, saved as {self._checksums[file]}"
        raise _damaged(self._step_folder, Problem(self._folder / file, reason, self.record.name, index))


def verify_files(manifest: Manifest) -> list[Problem]:
    """Reads every file of a step and returns all that is wrong with it."""

    def check(job: tuple[_ArrayReader, Index]) -> list[Problem]:
        try:
            job[0].chunk(job[1])
        except CheckpointDamagedError as error:
            return error.problems
        return []

    problems: list[Problem] = []
    with concurrent.futures.ThreadPoolExecutor(READERS, "checkpoint-verify") as pool:
        for record in manifest.records.values():
            try:
                reader = _ArrayReader(manifest, record)
            except CheckpointDamagedError as error:
                problems += error.problems
                continue
            problems += itertools.chain(*pool.map(check, ((reader, index) for index in record.chunks())))
    return problems


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """One leaf of the tree asked for: the form it is stored in, and how to make the leaf from it."""

    record: ArrayRecord
    dtype: np.dtype
    sharding: jax.sharding.Sharding | None
    finish: Callable[[Any], Any]


def _wanted(leaf: Any) -> tuple[tuple[int, ...], np.dtype, jax.sharding.Sharding | None, Callable[[Any], Any]]:
    """(shape, dtype, sharding, finish) of a leaf; sharding None means numpy."""
    if isinstance(leaf, bool | int | float | complex):
        return (), np.asarray(leaf).dtype, None, lambda value: type(leaf)(value[()])
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.shape, leaf.dtype, None, lambda value: value
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return tuple(leaf.shape), np.dtype(leaf.dtype), sharding, lambda value: value
    implementations: list[Any] = []

    def data(key: jax.Array) -> jax.Array:
        implementations.append(jax.random.key_impl(key))
        return jax.random.key_data(key)

    stored = jax.eval_shape(data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return stored.shape, stored.dtype, sharding, lambda v: jax.random.wrap_key_data(v, impl=implementations[0])


def _match(manifest: Manifest, tree: Any, cast: bool) -> list[_Wanted]:
    """Pairs the leaves asked for with the stored arrays; every difference is one line of the error."""
    differences, wanted = [], []
    named = layout.named_leaves(tree)
    for name, leaf in named:
        shape, dtype, sharding, finish = _wanted(leaf)
        record = manifest.records.get(name)
        if record is None:
            differences.append(f"{name}: asked for with shape {shape}, not stored")
        elif record.shape != shape:
            differences.append(f"{name}: stored with shape {record.shape}, asked for with {shape}")
        elif record.dtype != dtype.name and not (cast and jax.numpy.issubdtype(dtype, jax.numpy.floating)):
            differences.append(f"{name}: stored as {record.dtype}, asked for as {dtype.name}")
        else:
            wanted.append(_Wanted(record, dtype, sharding, finish))
    asked = {name for name, _ in named}
    roots = {name.split("/")[0] for name in asked}
    for name, record in manifest.records.items():
        if name.split("/")[0] in roots and name not in asked:
            differences.append(f"{name}: stored with shape {record.shape}, not asked for")
    if differences:
        shown = "".join(f"\n  {line}" for line in differences[:SHOWN_DIFFERENCES])
        more = "" if len(differences) <= SHOWN_DIFFERENCES else f"\n  and {len(differences) - SHOWN_DIFFERENCES} more"
        reason = f"holds another model or optimizer than the one asked for; arrays that differ:{shown}{more}"
        raise CheckpointMismatchError(manifest.folder.parent, reason, manifest.step)
    return wanted


Box = tuple[tuple[int, int], ...]


def _box(part: Any, shape: Index) -> Box:
    """A device's slices of an array as (start, stop) pairs."""
    return tuple((s.start or 0, size if s.stop is None else s.stop) for s, size in zip(part, shape))


class _PendingArray:
    """An array being read: host buffers of this process's shards, filled chunk by chunk in the pool."""

    def __init__(self, manifest: Manifest, wanted: _Wanted, pool: concurrent.futures.Executor):
        self._wanted = wanted
        shape = wanted.record.shape
        whole = tuple((0, size) for size in shape)
        boxes = {whole}
        if wanted.sharding is not None:
            boxes = {_box(part, shape) for part in wanted.sharding.addressable_devices_indices_map(shape).values()}
        self._buffers = {box: np.empty([stop - start for start, stop in box], wanted.dtype) for box in boxes}
        self.nbytes = sum(buffer.nbytes for buffer in self._buffers.values())
        consumers: dict[Index, list[Box]] = {}
        for box in boxes:
            for index in wanted.record.overlapping(tuple(slice(*bounds) for bounds in box)):
                consumers.setdefault(index, []).append(box)
        self._reader = _ArrayReader(manifest, wanted.record)
        self._futures = [pool.submit(self._fill, index, targets) for index, targets in consumers.items()]

    def _fill(self, index: Index, targets: list[Box]) -> None:
        values = self._reader.chunk(index)
        part = self._wanted.record.chunk_slices(index)
        for box in targets:
            common = [(max(p.start, start), min(p.stop, stop)) for p, (start, stop) in zip(part, box)]
            source = tuple(slice(low - p.start, high - p.start) for (low, high), p in zip(common, part))
            target = tuple(slice(low - start, high - start) for (low, high), (start, _) in zip(common, box))
            self._buffers[box][target] = values[source]

    def result(self) -> Any:
        """Waits for the chunks and returns the leaf."""
        for future in self._futures:
            future.result()
        shape, sharding = self._wanted.record.shape, self._wanted.sharding
        if sharding is None:
            (whole,) = self._buffers.values()
            return self._wanted.finish(whole)

        def shard(part: Any) -> np.ndarray:
            return self._buffers[_box(part, shape)]

        return self._wanted.finish(jax.make_array_from_callback(shape, sharding, shard, dtype=self._wanted.dtype))


def read_tree(manifest: Manifest, tree: Any, *, cast: bool = False) -> Any:
    """Reads the arrays of an abstract tree and verifies every chunk read.

    Args:
      manifest: the step.
      tree: pytree of jax.ShapeDtypeStruct (with a sharding, or for the first local device), jax arrays (their sharding
        is taken), numpy arrays or numbers (restored as such). It names whole top-level entries of what was saved.
      cast: convert stored arrays to the floating dtype asked for instead of refusing.

    Returns: the tree with values.
    Raises: CheckpointMismatchError naming the arrays that differ; CheckpointDamagedError naming array, chunk and file.
    """
    pending: collections.deque[_PendingArray] = collections.deque()
    leaves = []
    pool = concurrent.futures.ThreadPoolExecutor(READERS, "checkpoint-read")
    try:
        for wanted in _match(manifest, tree, cast):
            pending.append(_PendingArray(manifest, wanted, pool))
            while len(pending) > 1 and sum(array.nbytes for array in pending) > BYTES_IN_FLIGHT:
                leaves.append(pending.popleft().result())
        leaves += [array.result() for array in pending]
    finally:
        pool.shutdown(cancel_futures=True)
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(tree), leaves)
