"""What an import has written so far: one line a piece, so that a stopped import goes on where it was."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import numpy as np

from mmx_jax.checkpoint import layout
from mmx_jax.checkpoint.layout import ArrayRecord, Index
from mmx_jax.convert.errors import ConvertError
from mmx_jax.convert.files import open_regular

JOURNAL = "import.journal"

Chunk = tuple[ArrayRecord, Index]


class Journal:
    """The file in an import's temporary folder that says which chunks are on the disk, with their checksums.

    The first line is the fingerprint of what is imported. The open file is the lock of the folder. A line is only a
    hint: what it says is taken over after the bytes have been read and their CRC-32 found equal (`unchanged`).
    """

    def __init__(self, folder: Path, fingerprint: str):
        """Creates the folder, or takes over what an earlier import of the same files has written there.

        Raises: ConvertError when another import is writing there, or the folder is not an import's; OSError.
        """
        self.folder = folder
        self.path = folder / JOURNAL
        if folder.is_dir() and not self.path.is_file() and any(folder.iterdir()):
            raise ConvertError(f"{folder}: holds files but no {JOURNAL}, so no import made it; move it away")
        folder.mkdir(parents=True, exist_ok=True)
        # Unbuffered, so that every line reaches the system in one piece.
        self._file: FileIO = open(self.path, "ab+", buffering=0)  # noqa: SIM115 (it is the lock: open until `close`)
        try:
            self._lock()
            self._file.seek(0)
            first, _, rest = self._file.readall().partition(b"\n")
            if first == fingerprint.encode():
                self._crcs = dict(_entries(rest))
                if rest and not rest.endswith(b"\n"):  # stopped in the middle of a line
                    self._file.write(b"\n")
            else:
                self._crcs = {}
                self._start_anew(fingerprint)
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConvertError(f"{self.folder}: another import is writing here") from None
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise ConvertError(f"{self.folder}: another import has just finished here")

    def _start_anew(self, fingerprint: str) -> None:
        for entry in self.folder.iterdir():
            if entry.name != JOURNAL:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        self._file.truncate(0)
        self._file.write(fingerprint.encode() + b"\n")

    def note(self, chunks: list[tuple[str, str, str]]) -> None:
        """Remembers (array, file, CRC-32) of chunks that are on the disk already. Raises: OSError."""
        line = json.dumps(chunks).encode() + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def knows(self, chunks: list[Chunk]) -> bool:
        """Whether the journal says that all of these are written."""
        return all((record.name, record.chunk_file(index)) in self._crcs for record, index in chunks)

    def unchanged(self, chunks: list[Chunk]) -> list[tuple[str, str, str]] | None:
        """(array, file, CRC-32) of chunks that the journal knows, every byte read; None when one is not as written."""
        found = []
        for record, index in chunks:
            file = record.chunk_file(index)
            saved = self._crcs[record.name, file]
            path = self.folder / layout.ARRAYS_FOLDER / record.folder / file
            try:
                with open_regular(path) as opened:
                    # The size first: a forged file must not decide how much memory is taken.
                    if os.fstat(opened.fileno()).st_size != record.chunk_nbytes:
                        return None
                    crc = layout.crc32(np.fromfile(opened, np.uint8))
            except OSError:
                return None
            if crc != saved:
                return None
            found.append((record.name, file, crc))
        return found

    def close(self) -> None:
        """Gives the folder free."""
        self._file.close()


def _entries(text: bytes) -> Iterator[tuple[tuple[str, str], str]]:
    """((array, file), CRC-32) of every line that can be read; a garbled one costs only its chunks."""
    for line in text.splitlines():
        try:
            entries = json.loads(line)
        except (ValueError, RecursionError):
            continue
        for entry in entries if isinstance(entries, list) else ():
            match entry:
                case [str(name), str(file), str(crc)]:
                    yield (name, file), crc


def kept_chunks(
    journal: Journal, pieces: list[list[Chunk]], workers: int
) -> Iterator[list[tuple[str, str, str]] | None]:
    """What `unchanged` says of every piece, in order, several read at once."""
    with ThreadPoolExecutor(workers, "verify") as pool:
        yield from pool.map(journal.unchanged, pieces)
