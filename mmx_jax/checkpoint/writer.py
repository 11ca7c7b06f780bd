"""The saving half: an Orbax handler that copies arrays to the host, then writes chunks and checksums behind the scenes.

Orbax's AsyncCheckpointer owns the temporary folder, the background thread, the barriers between processes and the
atomic rename; the handler owns what is inside the folder.
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mmx_jax.checkpoint import layout, reader
from mmx_jax.checkpoint.layout import ArrayRecord, Index

WRITERS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass
class HostArray:
    """One array of a save: its record, and this process's share as (origin, values) blocks in host memory."""

    record: ArrayRecord
    blocks: list[tuple[Index, np.ndarray]]

    def chunks(self) -> Iterator[tuple[Index, np.ndarray]]:
        """(chunk index, values) of every chunk this process writes."""
        for origin, values in self.blocks:
            local = ArrayRecord(self.record.name, values.shape, self.record.dtype, self.record.chunk)
            for index in local.chunks():
                where = tuple(o // c + i for o, c, i in zip(origin, self.record.chunk, index))
                yield where, np.asarray(values[local.chunk_slices(index)])


@functools.lru_cache(maxsize=8192)
def _shard_writers(sharding: jax.sharding.Sharding, shape: Index, name: str) -> dict[jax.Device, Index]:
    """The device that writes each distinct shard, with the shard's origin; every process computes the same.

    Replicas share the work: copy number (shard ordinal + a number from the name) writes.
    """
    holders: dict[Index, list[jax.Device]] = {}
    for device, box in sharding.devices_indices_map(shape).items():
        holders.setdefault(tuple(part.start or 0 for part in box), []).append(device)
    offset = int(layout.crc32(name.encode()), 16)
    writers = {}
    for ordinal, (origin, devices) in enumerate(sorted(holders.items())):
        devices.sort(key=lambda device: device.id)
        writers[devices[(ordinal + offset) % len(devices)]] = origin
    return writers


def _share(name: str, leaf: jax.Array | np.ndarray) -> tuple[Index, list[tuple[Index, Any]]]:
    """(shape of a shard, this process's (origin, values) blocks) of a leaf; copies to the host are under way."""
    if isinstance(leaf, np.ndarray) or (leaf.is_fully_addressable and jax.process_count() > 1):
        # Every process holds the whole value: the first one writes it.
        return leaf.shape, [((0,) * leaf.ndim, leaf)] if jax.process_index() == 0 else []
    writers = _shard_writers(leaf.sharding, leaf.shape, name)
    mine = [part for part in leaf.addressable_shards if part.device in writers]
    for part in mine:
        part.data.copy_to_host_async()
    return leaf.sharding.shard_shape(leaf.shape), [(writers[part.device], part.data) for part in mine]


def copy_to_host(tree: Any) -> list[HostArray]:
    """Copies this process's share of every leaf to host memory; the arrays may be donated once it returns.

    Leaves may be jax arrays of any sharding, typed PRNG keys (stored as their key data), numpy arrays and numbers.
    Arrays that are in host memory already are not copied: jax keeps a buffer that numpy looks at, and a step that
    donates it takes another one.
    Raises: ValueError for names that clash; TypeError for a leaf that is no array.
    """
    pending = []
    for name, leaf in layout.named_leaves(tree):
        if not isinstance(leaf, jax.Array):
            leaf = np.array(leaf)
            if leaf.dtype.hasobject or leaf.dtype.kind in "USMm":
                raise TypeError(f"array {name!r}: a leaf of dtype {leaf.dtype} is no array of numbers")
        elif jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        shard, blocks = _share(name, leaf)
        dtype = np.dtype(leaf.dtype)
        record = ArrayRecord(name, leaf.shape, dtype.name, layout.chunk_shape(shard, dtype.itemsize))
        pending.append((record, blocks))
    return [HostArray(record, [(origin, np.asarray(data)) for origin, data in blocks]) for record, blocks in pending]


def write_share(step_folder: Path, arrays: list[HostArray], process: int) -> None:
    """Writes this process's chunks and the file with their checksums; process 0 also creates the arrays."""
    checksums: dict[str, layout.Checksums] = {array.record.name: {} for array in arrays}

    def write(job: tuple[HostArray, Any, Index, np.ndarray]) -> None:
        array, store, index, values = job
        crc = layout.write_chunk(store, array.record, index, values)
        checksums[array.record.name][array.record.chunk_file(index)] = crc

    def jobs() -> Iterator[tuple[HostArray, Any, Index, np.ndarray]]:
        for array in arrays:
            store = layout.open_for_chunks(step_folder, array.record)
            for index, values in array.chunks():
                yield array, store, index, values

    with concurrent.futures.ThreadPoolExecutor(WRITERS, "checkpoint-chunks") as pool:
        if process == 0:
            created = pool.map(lambda array: layout.create_array(step_folder, array.record), arrays)
            for array, crc in zip(arrays, created):
                checksums[array.record.name][layout.ARRAY_FILE] = crc
        list(pool.map(write, jobs()))
    layout.write_bytes(step_folder / layout.part_file(process), layout.seal({"arrays": checksums}))


def merge_parts(step_folder: Path, records: list[ArrayRecord], processes: int) -> None:
    """Joins the checksums of all processes into `checksums.json`; fails when any file of any array was not written."""
    merged: dict[str, layout.Checksums] = {record.name: {} for record in records}
    parts = [step_folder / layout.part_file(process) for process in range(processes)]
    for part in parts:
        for name, files in layout.unseal(part.read_bytes())["arrays"].items():
            merged[name].update(files)
    layout.write_checksums(step_folder, records, merged)
    for part in parts:
        part.unlink()


class StepHandler(ocp.AsyncCheckpointHandler):
    """Orbax handler of one whole step; see `mmx_jax.checkpoint` for what it writes."""

    def __init__(self) -> None:
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint-writer")
        self._records: list[ArrayRecord] = []

    async def async_save(self, directory: Any, args: "StepSave") -> list[concurrent.futures.Future]:
        """Copies to the host, then returns the future of the writing."""
        arrays = copy_to_host(args.tree)
        self._records = [array.record for array in arrays]
        return [self._background.submit(self._write, Path(directory), arrays, args)]

    def _write(self, step_folder: Path, arrays: list[HostArray], args: "StepSave") -> None:
        if jax.process_index() == 0:
            layout.write_metadata(step_folder, args.step, args.metadata, args.permanent)
        write_share(step_folder, arrays, jax.process_index())

    def finalize(self, directory: Any) -> None:
        """Runs on process 0 after all processes have written and before the folder gets its final name."""
        merge_parts(Path(directory), self._records, jax.process_count())

    def save(self, directory: Any, args: "StepSave") -> None:
        """Blocking form of `async_save`, for Orbax's synchronous Checkpointer."""
        arrays = copy_to_host(args.tree)
        self._records = [array.record for array in arrays]
        self._write(Path(directory), arrays, args)

    def restore(self, directory: Any, args: "StepRestore") -> Any:
        """Reads and verifies the arrays of `args.tree`, for Orbax's own restore."""
        return reader.read_tree(reader.read_manifest(Path(directory)), args.tree)

    def close(self) -> None:
        self._background.shutdown()


@ocp.args.register_with_handler(StepHandler, for_save=True)
@dataclasses.dataclass
class StepSave(ocp.args.CheckpointArgs):
    """What one save holds."""

    tree: Any
    step: int = 0
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    permanent: bool = False


@ocp.args.register_with_handler(StepHandler, for_restore=True)
@dataclasses.dataclass
class StepRestore(ocp.args.CheckpointArgs):
    """What one restore asks for: a pytree of `jax.ShapeDtypeStruct`s."""

    tree: Any
