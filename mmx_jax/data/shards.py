"""Writing one shard of a token store; every file appears whole or not at all."""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import UInt32

from mmx_jax.data.errors import DataError

SPLITS = ("train", "held_out")


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest dtype that holds every id; little-endian on disk."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turns what the operating system says about a full or read-only disk into a `DataError` that says what to do.

    Raises:
      DataError: a write failed.
    """
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EFBIG: "the file size limit is reached",
            errno.EROFS: "the disk is read-only",
            errno.EACCES: "the folder is not writable",
            errno.EPERM: "the folder is not writable",
        }
        reason = reasons.get(error.errno or 0, "writing failed")
        raise DataError(
            f"{folder}: {reason} ({error}). The store is not complete; make room or choose another output and run the "
            "same command again: finished shards are kept"
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file that appears under its name only when all of it is on disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically. Bytes of file names that are no UTF-8 are written as JSON escapes, which read back."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


class SplitWriter:
    """Documents of one split of one shard.

    Files: `.tokens` (all tokens), `.index` (int64 [documents, 3]: end of the document in tokens, its UTF-8 bytes, end
    of its spans), `.spans` (int64 [spans, 2]: end of the span in tokens of the document, role), `.names` (one JSON
    string a line).
    """

    def __init__(self, folder: Path, stem: str, dtype: np.dtype) -> None:
        self._folder = folder
        self._stem = stem
        self._dtype = dtype
        self._tokens: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self._index: list[tuple[int, int, int]] = []
        self._spans: list[tuple[int, int]] = []
        self._names: list[str] = []
        self._roles: dict[str, int] = {}
        self._end = 0

    def _path(self, kind: str) -> Path:
        return self._folder / f"{self._stem}.{kind}"

    def add(
        self, name: str, spans: Iterable[tuple[str | None, Iterable[tuple[UInt32[np.ndarray, "n"], int]]]], end: int
    ) -> tuple[int, int]:
        """Appends one document.

        Args:
          name: its name.
          spans: (role, (ids, UTF-8 bytes) of its chunks); plain text is one span of role None
            and stores no spans.
          end: id of end of text, appended if there is any token; it belongs to the last span.

        Returns:
          Tokens (end of text included) and UTF-8 bytes; (0, 0) and nothing written if the document has no text.
        """
        if self._tokens is None:
            self._tokens = open(self._path("tokens.tmp"), "wb")  # noqa: SIM115
        tokens = text_bytes = 0
        stored: list[tuple[int, int]] = []
        for role, chunks in spans:
            for ids, size in chunks:
                self._write(ids)
                tokens, text_bytes = tokens + len(ids), text_bytes + size
            if role is not None:
                stored.append((tokens, self._roles.setdefault(role, len(self._roles))))
        if not tokens:
            return 0, 0
        self._write(np.array([end], np.uint32))
        tokens += 1
        self._end += tokens
        if stored:
            stored[-1] = (tokens, stored[-1][1])
            self._spans += stored
        self._index.append((self._end, text_bytes, len(self._spans)))
        self._names.append(name)
        return tokens, text_bytes

    def _write(self, ids: UInt32[np.ndarray, "n"]) -> None:
        data = ids.astype(self._dtype).tobytes()
        self._digest.update(data)
        assert self._tokens is not None
        self._tokens.write(data)

    def finish(self) -> dict[str, Any] | None:
        """Makes the files durable and returns the shard's entry in the manifest; None if it has no documents."""
        if self._tokens is not None:
            self._tokens.flush()
            os.fsync(self._tokens.fileno())
            self._tokens.close()
        if not self._index:
            self._path("tokens.tmp").unlink(missing_ok=True)
            return None
        os.replace(self._path("tokens.tmp"), self._path("tokens"))
        side = {
            "index": np.array(self._index, "<i8").tobytes(),
            "names": "".join(json.dumps(name) + "\n" for name in self._names).encode(),
        }
        if self._spans:
            side["spans"] = np.array(self._spans, "<i8").tobytes()
        files = {"tokens": {"bytes": self._end * self._dtype.itemsize, "sha256": self._digest.hexdigest()}}
        for kind, data in side.items():
            write_atomically(self._path(kind), data)
            files[kind] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return {
            "stem": self._stem,
            "documents": len(self._index),
            "tokens": self._end,
            "bytes": sum(size for _, size, _ in self._index),
            "roles": list(self._roles),
            "files": files,
        }

    def abandon(self) -> None:
        """Removes what was written so far."""
        if self._tokens is not None:
            with suppress(OSError):  # closing writes what is buffered, which fails again on a full disk
                self._tokens.close()
        for kind in ("tokens.tmp", "tokens", "index", "names", "spans"):
            self._path(kind).unlink(missing_ok=True)
