"""Files that come from others are opened without trusting them; files of ours never take the place of another."""

import errno
import os
import stat
import uuid
from io import FileIO
from pathlib import Path

from mmx_jax.checkpoint import layout
from mmx_jax.checkpoint.store import is_complete, step_folder_name, steps_on_disk
from mmx_jax.convert.errors import ConvertError

NAME_BYTES = 255
"""Longest name of a file on the usual file systems."""


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def open_regular(path: Path) -> FileIO:
    """Opens a file for unbuffered reading; a pipe or a device is refused, for reading it could wait for ever.

    Raises: OSError.
    """
    file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115 (the caller closes it)
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "is no regular file", str(path))


def read_bounded(path: Path, limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes. Raises: OSError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"has {size} bytes, more than the {limit} that such a file can have", str(path))
        # A raw read may return less than asked for.
        parts = []
        while part := file.read(limit + 1):
            parts.append(part)
        return b"".join(parts)


def is_plain_name(name: object) -> bool:
    """Whether a text names a file inside a folder, and nothing else."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
        return False
    try:
        return len(name.encode()) <= NAME_BYTES
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _holds_steps(folder: Path) -> bool:
    try:
        return any(is_complete(folder / step_folder_name(step)) for step in steps_on_disk(folder))
    except OSError:  # above our own folders there may be some that we cannot list
        return False


def size_text(nbytes: int) -> str:
    """Bytes in words, three digits or more: "912 GB", "1.50 MB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= 0.9995 * scale:
            return f"{nbytes / scale:.{2 if nbytes < 9.995 * scale else 1 if nbytes < 99.95 * scale else 0}f} {unit}"
    return f"{nbytes} bytes"


def new_output(path: str | Path) -> tuple[Path, Path]:
    """Where a result will be, and a name beside it that nobody has, where it is written first.

    Raises: ConvertError when there is something already, even a link to nothing, or when a parent holds checkpoints.
    """
    output = Path(path).absolute()
    if os.path.lexists(output):
        raise ConvertError(f"{output} is there already; choose another name, or remove it")
    place = layout.plain_path(output.parent)
    for folder in (place, *place.parents):
        if _holds_steps(folder):
            raise ConvertError(f"{output}: {folder} holds checkpoints, and nothing else belongs there")
    return output, output.with_name(f"{output.name}.{uuid.uuid4().hex[:12]}.partial")
