"""Which files an input names: files, folders, globs, and Python's own library."""

import fnmatch
import glob
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmx_jax.data.errors import DataError

STDLIB = "python:stdlib"
# Tests, installed packages, and folders of generated tables (character maps, help texts), which are no source.
STDLIB_SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
}
COMPRESSIONS = {".gz": "gzip", ".dz": "gzip", ".xz": "xz"}
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
SNIFFED_BYTES = 4096


@dataclass(frozen=True)
class InputFile:
    """One file of the corpus."""

    path: str
    name: str
    """Name of its document(s): the path below the input, the same on every machine; decides the held-out split."""
    kind: str
    """"text", "jsonl" or "parquet"."""
    compression: str | None
    """"gzip", "xz" or None."""
    size: int
    """Bytes on disk."""
    modified: int
    """Time of the last change, in nanoseconds."""


@dataclass(frozen=True)
class Inputs:
    """All files of a corpus, in a fixed order."""

    files: tuple[InputFile, ...]
    skipped: int
    """Files of folders that are no text."""


def find_inputs(inputs: tuple[str, ...], include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> Inputs:
    """Lists the files of a corpus: inputs in the order given, the files of each sorted by name.

    Args:
      inputs: files; folders (all files below that are text, not hidden, and match `include`); globs ("**" too);
        "python:stdlib" (the *.py files of this Python's own library, without tests, generated tables and installed
        packages).
      include: file name patterns that files in folders must match; empty takes every text file.
      exclude: patterns on the path below the input, which leave files out of folders and globs.

    Raises:
      DataError: an input does not exist, matches nothing, or the corpus has no bytes.
    """
    files: dict[str, InputFile] = {}
    skipped = 0
    for entry in inputs:
        found = 0
        for path, name, explicit in _expand(entry):
            inner = name.partition("/")[2] or name
            if not explicit:
                patterns = include or ("*",)
                if not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns):
                    continue
                if any(fnmatch.fnmatch(inner, pattern) for pattern in exclude):
                    continue
            file = _describe(path, name)
            if not explicit and file.kind == "text" and file.compression is None and _is_binary(path):
                skipped += 1
                continue
            found += 1
            files.setdefault(file.path, file)
        if not found:
            raise DataError(
                f"input {entry!r}: no text file found ({skipped} were no text)"
                if skipped
                else f"input {entry!r}: no file found"
            )
    if not sum(file.size for file in files.values()):
        raise DataError(f"inputs {', '.join(map(repr, inputs))}: the corpus is empty (0 bytes in {len(files)} files)")
    return Inputs(tuple(files.values()), skipped)


def _expand(entry: str) -> Iterator[tuple[Path, str, bool]]:
    """(path, name, named explicitly) of every file of one input."""
    if entry == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        for path in _walk(root, STDLIB_SKIPPED):
            # _sysconfigdata* holds paths of the machine that built this Python.
            if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
                yield path, f"{STDLIB}/{path.relative_to(root).as_posix()}", False
        return
    path = Path(entry)
    if path.is_dir():
        root = path.resolve()
        for file in _walk(root, set()):
            yield file, f"{root.name}/{file.relative_to(root).as_posix()}", False
    elif path.is_file():
        yield path.resolve(), path.name, True
    elif glob.has_magic(entry):
        base = Path(*_before_magic(path.parts)).resolve()
        for match in sorted(glob.glob(entry, recursive=True)):
            if os.path.isfile(match):
                file = Path(match).resolve() if not base.is_dir() else base / os.path.relpath(match, base)
                yield file, f"{base.name}/{file.relative_to(base).as_posix()}", False
    else:
        raise DataError(f"input {entry!r}: no such file, folder or glob")


def _before_magic(parts: tuple[str, ...]) -> tuple[str, ...]:
    stop = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return parts[:stop] or (".",)


def _walk(root: Path, skipped: set[str]) -> Iterator[Path]:
    """Files below `root`, sorted by path; hidden ones and named folders are left out, links to folders not followed."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    yield from sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).as_posix())


def _describe(path: Path, name: str) -> InputFile:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    inner = suffixes[:-1] if compression else suffixes
    kind = KINDS.get(inner[-1], "text") if inner else "text"
    status = path.stat()
    return InputFile(str(path), readable(name), kind, compression, status.st_size, status.st_mtime_ns)


def readable(name: str) -> str:
    """A file name as text; bytes that are no UTF-8 become \\x escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _is_binary(path: Path) -> bool:
    """Whether the first bytes hold a NUL, which no text has."""
    with open(path, "rb") as file:
        return b"\0" in file.read(SNIFFED_BYTES)
