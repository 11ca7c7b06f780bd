"""Kills a process at a chosen moment of a checkpoint save, seen from outside: only the file system is watched.

The watcher stops the process (SIGSTOP) whenever a save is under way, looks at the temporary folder while nothing moves,
and either kills it there or lets it run on for a fraction of a millisecond. So even the moments that last only a few
system calls are met, and production code needs no hook.
"""

import enum
import json
import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil

SLICE_SECONDS = 0.0003
IDLE_SECONDS = 0.0005


class Moment(enum.Enum):
    """Where in a save a process dies."""

    FOLDER_APPEARED = "the temporary folder is there, arrays are still being written"
    ARRAYS_WRITTEN = "every chunk of every array is there, no checksums"
    BEFORE_CHECKSUMS = "the process has noted its checksums, the step's checksums file is not there"
    BEFORE_COMMIT = "the checksums file is there, the folder still has its temporary name"


def temporary_folder(folder: Path, from_step: int = 0) -> Path | None:
    """The temporary folder of a save of step `from_step` or later, if a save is under way."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return None
    for name in names:
        found = re.fullmatch(r"(\d+)\.orbax-checkpoint-tmp", name)
        if found and int(found[1]) >= from_step:
            return folder / name
    return None


def moment_of(temporary: Path) -> Moment | None:
    """The moment a save has reached, by the files of its temporary folder; None when the folder is gone."""
    try:
        names = os.listdir(temporary)
        if "checksums.json" in names:
            return Moment.BEFORE_COMMIT
        if any(name.startswith("checksums.part-") for name in names):
            return Moment.BEFORE_CHECKSUMS
        if "arrays" in names and _all_chunks_written(temporary / "arrays"):
            return Moment.ARRAYS_WRITTEN
    except FileNotFoundError:
        return None
    return Moment.FOLDER_APPEARED


def _all_chunks_written(arrays: Path) -> bool:
    found = False
    for array in arrays.iterdir():
        try:
            about = json.loads((array / "zarr.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return False
        chunk = about["chunk_grid"]["configuration"]["chunk_shape"]
        expected = math.prod(-(-size // part) for size, part in zip(about["shape"], chunk))
        written = [n for n in os.listdir(array) if n != "zarr.json" and not n.endswith(".__lock")]
        if len(written) < expected:
            return False
        found = found or expected > 0
    return found


def _stop(process: subprocess.Popen) -> bool:
    """Stops a process and waits until it stands still; False when it has ended instead."""
    process.send_signal(signal.SIGSTOP)
    while process.poll() is None:
        if psutil.Process(process.pid).status() == psutil.STATUS_STOPPED:
            return True
        time.sleep(0.0001)
    return False


def kill_at(
    process: subprocess.Popen, folder: Path, moment: Moment, *, from_step: int = 0, timeout: float = 60
) -> Moment | None:
    """Kills a process with SIGKILL at a moment of its next save of step `from_step` or later.

    Returns: the moment that the dead process left on the disk; None when that save was complete after all (its last
      system call was the commit). Waits for another save when one slipped by.
    Raises: RuntimeError when the process ended by itself; TimeoutError after `timeout` seconds, process killed.
    """
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the process ended with code {process.returncode} before {moment.name}")
        temporary = temporary_folder(folder, from_step)
        if temporary is None:
            time.sleep(IDLE_SECONDS)
            continue
        if not _stop(process):
            continue
        if moment_of(temporary) == moment:
            process.kill()
            process.wait()
            return moment_of(temporary)
        process.send_signal(signal.SIGCONT)
        time.sleep(SLICE_SECONDS)
    process.kill()
    process.wait()
    raise TimeoutError(f"no save reached {moment.name} within {timeout} s")


def kill_after(process: subprocess.Popen, seconds: float) -> None:
    """Kills a process with SIGKILL after some time, wherever it is. Raises: RuntimeError when it ended by itself."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return
    raise RuntimeError(f"the process ended with code {process.returncode} before it could be killed")
