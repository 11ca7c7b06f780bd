"""safetensors files, read and written without trusting them.

A header is checked completely before a byte of data is read: its size against the file's, every shape and dtype
against the byte range that it claims, and that the ranges cover the data exactly once. Nothing is allocated that the
file does not hold, and nothing is ever unpickled.
"""

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mmx_jax.convert.errors import WeightsFileError
from mmx_jax.convert.files import is_plain_name, open_regular, read_bounded

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
LENGTH_BYTES = 8
HEADER_LIMIT = 100_000_000
"""The format's own limit on a header."""
SHOWN_CHARACTERS = 300
SAMPLES = 9
SAMPLE_BYTES = 2**16
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

FLOATS: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
SIZES: Mapping[str, int] = {name: dtype.itemsize for name, dtype in FLOATS.items()} | {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor is: file, dtype name of the format, shape, and the absolute byte at which it starts."""

    name: str
    file: Path
    code: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype:
        """numpy dtype. Raises: WeightsFileError for a dtype that is no plain float."""
        if self.code not in FLOATS:
            reason = f"tensor {self.name!r} has dtype {self.code}; weights must be one of {', '.join(FLOATS)}"
            raise WeightsFileError(self.file, reason)
        return FLOATS[self.code]

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the first dimension, read into memory of their own.

        Raises: WeightsFileError when the file has become shorter or cannot be read.
        """
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        data = np.empty((stop - start) * row, np.uint8)
        view = memoryview(data)
        try:
            with open_regular(self.file) as file:
                file.seek(self.offset + start * row)
                done = 0
                while done < len(data):
                    count = file.readinto(view[done:])
                    if not count:
                        reason = f"ends inside tensor {self.name!r}; it was whole when its header was read"
                        raise WeightsFileError(self.file, reason)
                    done += count
        except OSError as error:
            raise WeightsFileError(self.file, f"tensor {self.name!r} cannot be read: {error}") from error
        return data.view(self.dtype).reshape(stop - start, *self.shape[1:])


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} appears twice")
    return found


def _parse(path: Path, data: bytes, what: str) -> dict[str, Any]:
    try:
        parsed = json.loads(data, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise WeightsFileError(path, f"{what} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise WeightsFileError(path, f"{what} must be one JSON object")
    return parsed


def fingerprint(path: Path) -> str:
    """CRC-32 of a file's header and of `SAMPLES` pieces of its data from the first to the last byte.

    Raises: WeightsFileError.
    """
    try:
        with open_regular(path) as raw_file, BufferedReader(raw_file) as file:
            size = os.fstat(file.fileno()).st_size
            header = int.from_bytes(file.read(LENGTH_BYTES), "little")
            crc = zlib.crc32(file.read(min(header, HEADER_LIMIT)))
            start = file.tell()
            for i in range(SAMPLES):
                file.seek(start + max(0, size - start - SAMPLE_BYTES) * i // (SAMPLES - 1))
                crc = zlib.crc32(file.read(SAMPLE_BYTES), crc)
    except OSError as error:
        raise WeightsFileError(path, f"cannot be read: {error}") from error
    return f"{crc:08x}"


def _natural(value: Any) -> bool:
    return type(value) is int and value >= 0


def _tensor(path: Path, name: str, entry: Any, data_start: int, data_bytes: int) -> tuple[StoredTensor, int]:
    """The tensor that a header entry describes, and its size in bytes."""

    def bad(reason: str) -> WeightsFileError:
        return WeightsFileError(path, f"tensor {name!r}: {reason}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad("its header entry must have exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in SIZES:
        raise bad(f"unknown dtype {code!r}")
    if not isinstance(shape, list) or len(shape) > 32 or not all(map(_natural, shape)):
        raise bad("its shape must be a list of at most 32 natural numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise bad("data_offsets must be two natural numbers")
    begin, end = offsets
    size = math.prod(shape) * SIZES[code]
    if not begin <= end <= data_bytes:
        raise bad(f"bytes {begin} to {end} lie outside the {data_bytes} bytes of data; truncated or forged")
    if end - begin != size:
        raise bad(f"shape {shape} of {code} needs {size} bytes, data_offsets give {end - begin}")
    return StoredTensor(name, path, code, tuple(shape), data_start + begin), size


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name.

    Raises: WeightsFileError for anything that is not a well-formed file: too short, a header larger than the file or
      the format's limit, invalid JSON, duplicate names, sizes that contradict shapes, ranges that overlap, leave gaps
      or pass the end.
    """
    try:
        with open_regular(path) as raw_file, BufferedReader(raw_file) as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(LENGTH_BYTES)
            length = int.from_bytes(first, "little")
            if len(first) < LENGTH_BYTES or length > min(HEADER_LIMIT, size - LENGTH_BYTES):
                if first[:2] in PICKLE_STARTS:
                    raise WeightsFileError(path, "is a pickle, not safetensors; pickles can run code: never loaded")
                reason = f"has {size} bytes, but claims a header of {length}; truncated, or not safetensors"
                raise WeightsFileError(path, reason)
            raw = file.read(length)
    except OSError as error:
        raise WeightsFileError(path, f"cannot be read: {error}") from error
    if not raw.startswith(b"{"):
        raise WeightsFileError(path, "its header does not start with '{': not safetensors")
    header = _parse(path, raw, "its header")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise WeightsFileError(path, "__metadata__ must map names to text")
    data_start = LENGTH_BYTES + length
    found = [_tensor(path, name, entry, data_start, size - data_start) for name, entry in header.items()]
    position, before = data_start, "the header"
    for tensor, nbytes in sorted(found, key=lambda item: (item[0].offset, item[1])):
        if tensor.offset != position:
            relation = "overlaps" if tensor.offset < position else "leaves a gap after"
            raise WeightsFileError(path, f"tensor {tensor.name!r} {relation} {before}: the data must be covered once")
        position, before = position + nbytes, f"tensor {tensor.name!r}"
    if position != size:
        raise WeightsFileError(path, f"has {size - position} bytes after {before} that belong to no tensor")
    return {tensor.name: tensor for tensor, _ in found}


def _index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from an index whose file names stay in its folder."""
    try:
        data = read_bounded(path, HEADER_LIMIT)
    except OSError as error:
        raise WeightsFileError(path, f"cannot be read as an index: {error}") from error
    weight_map = _parse(path, data, "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsFileError(path, "has no weight_map")
    for name, file in weight_map.items():
        if not is_plain_name(file):
            shown = repr(file)[:SHOWN_CHARACTERS]
            raise WeightsFileError(path, f"tensor {name!r}: {shown} must be the plain name of a file in this folder")
        if not file.endswith(".safetensors"):
            raise WeightsFileError(path, f"tensor {name!r}: {file!r} is no safetensors file; pickles are never loaded")
    return weight_map


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder with an index or with one safetensors file, every header checked.

    Raises: WeightsFileError for a missing folder, index or shard, a tensor that is not where the index says, in two
      files or in none, a file that the index does not name, a file name that leaves the folder, and a folder that has
      only pickles.
    """
    if not folder.is_dir():
        raise WeightsFileError(folder, "no such folder")
    index = folder / INDEX_FILE
    if not os.path.lexists(index):  # a link to nothing is an index that cannot be read
        return read_header(_single(folder))
    weight_map = _index(index)
    if strangers := sorted({path.name for path in folder.glob("*.safetensors")} - set(weight_map.values())):
        reason = f"has no place for {', '.join(strangers[:3])} beside it: which of the files are the model is not clear"
        raise WeightsFileError(index, f"{reason}; move away what does not belong to it")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).exists():
            name = next(name for name, holder in weight_map.items() if holder == file)
            count = sum(holder == file for holder in weight_map.values())
            raise WeightsFileError(folder / file, f"is missing; the index puts {name!r} and {count - 1} more there")
        for name, tensor in read_header(folder / file).items():
            if weight_map.get(name) != file:
                place = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise WeightsFileError(folder / file, f"holds tensor {name!r}, which the index puts {place}")
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors:
            raise WeightsFileError(folder / file, f"does not hold tensor {name!r}, which the index puts there")
    return tensors


def _single(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        reason = f"is missing, and without it {len(found)} safetensors files are no checkpoint"
        raise WeightsFileError(folder / INDEX_FILE, reason)
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES):
        reason = f"holds pickles ({pickles[0]}) and no safetensors; pickles can run code and are never loaded"
        raise WeightsFileError(folder, reason)
    raise WeightsFileError(folder, f"holds neither {INDEX_FILE} nor a safetensors file")


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: its place in its file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def create_file(path: Path, tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]) -> list[PlannedTensor]:
    """Writes the header of a new file and reserves the room of its data; returns where each tensor belongs.

    Raises: OSError when there is no room.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    sized = []
    for name, dtype, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, begin + size]}
        sized.append((name, dtype, shape, begin))
        begin += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    start = LENGTH_BYTES + len(header)
    with open(path, "xb") as file:
        file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, start + begin)
    return [PlannedTensor(name, dtype, shape, start + offset) for name, dtype, shape, offset in sized]
