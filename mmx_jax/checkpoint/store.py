"""CheckpointStore: saves behind the training loop, restores the newest good step, keeps the folder tidy."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import json
import operator
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from mmx_jax.checkpoint import layout, reader
from mmx_jax.checkpoint.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    Problem,
)
from mmx_jax.checkpoint.retention import Retention
from mmx_jax.checkpoint.writer import StepHandler, StepSave

TEMPORARY_SUFFIX = ".orbax-checkpoint-tmp"
DELETED_SUFFIX = ".deleted"
LOCK_FILE = "writer.lock"
SAVE_TIMEOUT_SECONDS = 3600
SLOW_WAIT_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored step: the tree with values, the metadata saved with it, its number."""

    tree: Any
    metadata: dict[str, Any]
    step: int


def step_folder_name(step: int) -> str:
    """Folder name of a step: the number with at least 8 digits."""
    return f"{step:08d}"


def steps_on_disk(folder: Path) -> list[int]:
    """Numbers of all step folders with a final name, complete or not, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(e.name) for e in os.scandir(folder) if e.is_dir() and re.fullmatch(r"\d{8,}", e.name))


def is_complete(step_folder: Path) -> bool:
    """Whether the step's own two JSON files are there; they are written last, before the final name."""
    return (step_folder / layout.CHECKSUMS_FILE).is_file() and (step_folder / layout.METADATA_FILE).is_file()


class CheckpointStore:
    """Steps of one run in one folder of a POSIX file system (see `mmx_jax.checkpoint` for the format).

    Opening is cheap, creates nothing, and removes what killed saves left behind unless another process is writing.
    Saving takes a lock on the folder until `close`; a program that ends without `close` (use `with`) may lose its last
    save, with an error in the log. In a multi-process run every process makes the same calls.

    Args:
      folder: where the steps are, or will be.
      keep_last: newest good steps that are kept, at least 1.
      keep_every_steps: steps divisible by this are kept for ever; None keeps no such steps.
      asynchronous: write in the background; False makes `save` wait for the disk.
      on_saved: called with the number of each step that is complete on the disk, from another thread.
      alone: this process reads for itself alone, whatever the others of its run do.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep_last: int = 3,
        keep_every_steps: int | None = None,
        asynchronous: bool = True,
        on_saved: Callable[[int], None] | None = None,
        alone: bool = False,
    ):
        if re.match(r"\w+://", os.fspath(folder)):
            reason = "object stores are not supported; mount the bucket and name the mounted folder"
            raise CheckpointError(Path(folder), reason)
        self.folder = layout.plain_path(folder)
        if not layout.is_utf8(self.folder):
            raise CheckpointError(self.folder, "its path is not UTF-8, which TensorStore needs; rename it")
        self._asynchronous = asynchronous
        self._on_saved = on_saved
        self._alone = alone or jax.process_count() == 1
        self._primary = jax.process_index() == 0
        self._retention = Retention(self.folder, keep_last, keep_every_steps)
        self._lock: int | None = None
        self._checkpointer: ocp.AsyncCheckpointer | None = None
        self._finisher = concurrent.futures.ThreadPoolExecutor(1, "checkpoint-finish")
        self._pending: concurrent.futures.Future[None] | None = None
        if self._primary:
            with contextlib.suppress(OSError):  # no folder yet, or a reader without write permission
                self._try_lock()
            self._release_lock()

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Writing

    def open_for_writing(self) -> None:
        """Creates the folder, takes its lock and removes leftovers; `save` does it when nobody did before.

        Call it at the start of a run: an unwritable folder or a second writer is found before hours of training.
        Raises: CheckpointWriteError.
        """
        if self._checkpointer is None:
            options = ocp.AsyncOptions(timeout_secs=SAVE_TIMEOUT_SECONDS, create_directories_asynchronously=False)
            self._checkpointer = ocp.AsyncCheckpointer(StepHandler(), async_options=options)
        if self._lock is not None or not self._primary:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            locked = self._try_lock()
        except OSError as error:
            raise CheckpointWriteError(self.folder, f"cannot be written: {error}") from error
        if not locked:
            with contextlib.suppress(OSError):
                holder = (self.folder / LOCK_FILE).read_text().strip()
            raise CheckpointWriteError(self.folder, f"another process is writing here: {holder or 'unknown'}")

    def save(self, step: int, tree: Any, metadata: dict[str, Any], *, permanent: bool = False) -> None:
        """Saves a step; returns when the arrays are copied to host memory (they may then be donated).

        Args:
          step: number of the step; a number already saved is refused unless that step is damaged.
          tree: pytree of jax arrays of any sharding, typed PRNG keys, numpy arrays and numbers; a dict at the top.
          metadata: anything JSON holds; comes back from `restore` and `metadata`.
          permanent: never delete this step.

        Raises: CheckpointWriteError, also for a failure of the save before this one, which was then not listed;
          CheckpointError for a number already saved or metadata that JSON cannot hold.
        """
        self.wait()
        step = operator.index(step)
        if step < 0:
            raise CheckpointError(self.folder, "the number of a step is 0 or more", step)
        try:
            metadata = json.loads(json.dumps(metadata))
        except (TypeError, ValueError) as error:
            raise CheckpointError(self.folder, f"metadata is not JSON: {error}", step) from error
        self.open_for_writing()
        assert self._checkpointer is not None
        target = self.folder / step_folder_name(step)
        try:
            if target.exists():
                if self._retention.is_good(step):
                    raise CheckpointError(self.folder, "is saved already; save another number", step)
                if self._primary:
                    self._remove(target)
            self._checkpointer.save(target, args=StepSave(tree, step, metadata, permanent))
        except CheckpointError:
            raise
        except Exception as error:
            raise self._write_error(step, error) from error
        self._pending = self._finisher.submit(self._finish, step)
        if not self._asynchronous:
            self.wait()

    def _finish(self, step: int) -> None:
        """Waits for the writer, makes sure that the step is really there, then deletes what is no longer kept."""
        assert self._checkpointer is not None
        try:
            self._checkpointer.wait_until_finished()
            if self._primary:
                if not is_complete(self.folder / step_folder_name(step)):
                    raise RuntimeError("the writer thread ended without finishing the step")
                _sync_folder(self.folder)
            self._retention.saved(step)
            if self._on_saved is not None:
                self._on_saved(step)
        except BaseException as error:
            failure = self._write_error(step, error)
            logging.error("%s", failure)
            raise failure from error
        if self._primary:
            try:
                for old in self._retention.superseded(steps_on_disk(self.folder)):
                    self._remove(self.folder / step_folder_name(old))
            except OSError as error:  # the step is saved; tidying up can wait for the next one
                logging.warning("old checkpoints in %s could not be looked at: %s", self.folder, error)

    def _write_error(self, step: int, error: BaseException) -> CheckpointWriteError:
        """The error to raise for a failed save, after giving back the space of what was half written."""
        reason = f"was NOT saved: {type(error).__name__}: {error}"
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(self.folder).free
                reason += f"; {free / 2**30:.2f} GiB are free: make room or lower keep_last"
        self._let_helpers_end()
        if self._primary:
            shutil.rmtree(self.folder / (step_folder_name(step) + TEMPORARY_SUFFIX), ignore_errors=True)
        return CheckpointWriteError(self.folder, reason, step)

    def _let_helpers_end(self) -> None:
        """Waits, after a failed save, for Orbax's own small writers; each call may raise the error of one of them."""
        for _ in range(8):
            with contextlib.suppress(Exception):
                if self._checkpointer is not None:
                    self._checkpointer.wait_until_finished()
                return

    def wait(self) -> None:
        """Returns when the last save is complete on disk. Raises: CheckpointWriteError when it failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        start = time.monotonic()
        pending.result()
        if self._asynchronous and time.monotonic() - start > SLOW_WAIT_SECONDS:
            logging.info("waited %.1f s for the previous checkpoint save", time.monotonic() - start)

    def check(self) -> None:
        """Raises the error of a save that has failed already, without waiting for one that is being written."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        """Waits, gives the folder's lock back and frees the threads. Raises: CheckpointWriteError as `wait`."""
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            if self._checkpointer is not None:
                self._checkpointer.close()
                self._checkpointer = None
            self._release_lock()

    # Reading

    def steps(self) -> list[int]:
        """Numbers of the complete steps, ascending; their bytes are verified by `restore` and `verify`."""
        return [s for s in steps_on_disk(self.folder) if is_complete(self.folder / step_folder_name(s))]

    def metadata(self, step: int) -> dict[str, Any]:
        """Metadata of a step. Raises: CheckpointNotFoundError, CheckpointDamagedError."""
        return self._manifest(step).metadata

    def verify(self, step: int) -> list[Problem]:
        """Reads every byte of a step and returns what is wrong, in words; an empty list is a good step.

        Raises: CheckpointNotFoundError.
        """
        try:
            return reader.verify_files(self._manifest(step))
        except CheckpointDamagedError as error:
            return error.problems

    def restore(self, abstract_tree: Any, step: int | None = None, *, cast: bool = False) -> Restored:
        """Restores a step onto any mesh, every chunk verified.

        Args:
          abstract_tree: as `reader.read_tree` takes it; may name only some top-level entries, e.g. {"params": ...}.
          step: number of the step, or None for the newest good one: damaged or half-written steps are named in an
            error log and passed over, on all processes alike.
          cast: convert stored arrays to the floating dtype asked for instead of refusing.

        Raises: CheckpointNotFoundError; CheckpointMismatchError for another configuration; CheckpointDamagedError when
          the step asked for, or every step there is, is damaged.
        """
        self.wait()
        candidates = [step] if step is not None else self._candidates()
        if not candidates:
            raise CheckpointNotFoundError(self.folder, "holds no checkpoint")
        damage: CheckpointDamagedError | None = None
        for number in candidates:
            damage, result = None, None
            try:
                manifest = self._manifest(number)
                result = Restored(reader.read_tree(manifest, abstract_tree, cast=cast), manifest.metadata, number)
            except CheckpointDamagedError as error:
                damage = error
            if not self._anywhere(damage is not None):
                assert result is not None
                return result
            self._retention.found_damaged(number)
            reason = Problem(self.folder / step_folder_name(number), "another process found damage; its log names it")
            damage = damage or CheckpointDamagedError(self.folder, number, [reason])
            if step is None:
                logging.error("%s; trying the step before it", damage)
        assert damage is not None
        raise damage

    def _candidates(self) -> list[int]:
        """All step folders, newest first, as process 0 sees them."""
        steps = np.array(steps_on_disk(self.folder)[::-1], np.int64)
        if not self._alone:
            count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
            if count:
                steps = np.asarray(multihost_utils.broadcast_one_to_all(np.resize(steps, count).astype(np.int32)))
        return [int(step) for step in steps]

    def _anywhere(self, flag: bool) -> bool:
        """Whether `flag` holds on any process that reads."""
        return flag if self._alone else bool(np.any(multihost_utils.process_allgather(np.array(flag))))

    def _manifest(self, step: int) -> reader.Manifest:
        folder = self.folder / step_folder_name(step)
        if not folder.is_dir():
            known = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointNotFoundError(self.folder, f"is not there; complete steps: {known}", step)
        return reader.read_manifest(folder)

    # The folder

    def _try_lock(self) -> bool:
        """Takes the folder's lock if it is free and then removes leftovers; a killed holder's lock is free at once."""
        handle = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        self._lock = handle
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        for entry in os.scandir(self.folder):
            if entry.is_dir() and re.fullmatch(rf"\d+({TEMPORARY_SUFFIX}|{DELETED_SUFFIX})", entry.name):
                logging.info("removing %s, left by an interrupted run", entry.path)
                shutil.rmtree(entry.path, ignore_errors=True)
        return True

    def _release_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _remove(self, target: Path) -> None:
        """Removes a step: first out of the list by a rename, so that a kill leaves no half-deleted step."""
        doomed = target.with_name(target.name + DELETED_SUFFIX)
        try:
            shutil.rmtree(doomed, ignore_errors=True)
            target.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            logging.warning("checkpoint %s could not be removed: %s", target, error)


def _sync_folder(folder: Path) -> None:
    """Makes the renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
