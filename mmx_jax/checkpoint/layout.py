"""Names, chunks, checksums and JSON files of a stored step: the one definition of the format.

`mmx_jax.checkpoint` describes the format as a whole. Everything that writes a step (the trainer's saves, an import of
released weights) and everything that reads one goes through the records and functions here.
"""

import dataclasses
import itertools
import json
import math
import os
import urllib.parse
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 and the 8-bit floats with numpy by name)
import numpy as np
import tensorstore as ts

FORMAT = 1
ARRAYS_FOLDER = "arrays"
ARRAY_FILE = "zarr.json"
METADATA_FILE = "metadata.json"
CHECKSUMS_FILE = "checksums.json"
PART_PREFIX = "checksums.part-"
CHUNK_BYTES = 128 * 2**20

Index = tuple[int, ...]
Checksums = dict[str, str]


@dataclasses.dataclass(frozen=True)
class ArrayRecord:
    """One stored array: its name (key path joined by "/"), shape, dtype name and chunk shape.

    Every chunk is whole: the chunk shape divides the shape, so that a chunk file holds exactly the chunk's elements in
    C order, little endian, and its CRC-32 is that of the elements in memory.
    """

    name: str
    shape: Index
    dtype: str
    chunk: Index

    def __post_init__(self) -> None:
        fits = len(self.shape) == len(self.chunk) and all(c >= 1 and s % c == 0 for s, c in zip(self.shape, self.chunk))
        if not fits:
            raise ValueError(f"array {self.name!r}: chunk shape {self.chunk} does not divide shape {self.shape}")

    @property
    def folder(self) -> str:
        """Folder of the array below `arrays/`: the name with "." for "/", anything unusual percent-encoded."""
        return ".".join(urllib.parse.quote(part, safe="") for part in self.name.split("/"))

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    @property
    def chunk_nbytes(self) -> int:
        return math.prod(self.chunk) * self.itemsize

    def chunks(self) -> Iterator[Index]:
        """Indices of all chunks in C order; (0, 2) is the third chunk of the first row of chunks."""
        return itertools.product(*(range(s // c) for s, c in zip(self.shape, self.chunk)))

    def chunk_file(self, index: Index) -> str:
        """File name of a chunk in the array's folder: `c.0.2`; `c` for a scalar."""
        return ".".join(["c", *map(str, index)])

    def chunk_slices(self, index: Index) -> tuple[slice, ...]:
        """The part of the array that a chunk holds."""
        return tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, self.chunk))

    def overlapping(self, box: tuple[slice, ...]) -> Iterator[Index]:
        """Indices of the chunks that share elements with `box` (slices with integer bounds)."""
        return itertools.product(*(range(b.start // c, -(-b.stop // c)) for b, c in zip(box, self.chunk)))

    def file_names(self) -> Iterator[str]:
        """Every file of the array's folder."""
        yield ARRAY_FILE
        yield from (self.chunk_file(index) for index in self.chunks())

    def spec(self, step_folder: Path) -> dict[str, Any]:
        """TensorStore spec: zarr 3, no compression, every chunk stored (zeros too), a missing chunk is an error."""
        return {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{plain_path(step_folder) / ARRAYS_FOLDER / self.folder}/"},
            "metadata": {
                "shape": list(self.shape),
                "data_type": self.dtype,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            },
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": False,
        }


def plain_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path of the same place without "..", which TensorStore takes for damage.

    What ".." means behind a link only the file system knows, so such paths are resolved; others keep their links.
    """
    return Path(os.path.realpath(path)) if ".." in Path(path).parts else Path(path).absolute()


def is_utf8(path: Path) -> bool:
    """Whether a path is UTF-8: TensorStore and JSON files hold no other."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def chunk_shape(shard: Index, itemsize: int, limit: int = CHUNK_BYTES) -> Index:
    """Chunk shape of an array whose devices hold shards of shape `shard`: the shard, cut until it fits `limit` bytes.

    The leading dimensions are cut first, so that a chunk is one piece of the shard's memory. A dimension without a
    divisor near the number of pieces wanted stays whole rather than falling into crumbs.
    """
    chunk = [max(1, size) for size in shard]
    for axis, size in enumerate(chunk):
        wanted = -(-math.prod(chunk) * itemsize // limit)
        if wanted <= 1:
            break
        pieces = next((n for n in range(min(wanted, size), size + 1) if size % n == 0), size)
        if pieces <= 8 * wanted:
            chunk[axis] = size // pieces
    return tuple(chunk)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """(name, leaf) of every leaf of a pytree, the name being its key path joined by "/".

    Raises: ValueError when two leaves would share a name or a folder, or a name cannot be a folder.
    """
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    seen: dict[str, str] = {}
    for name, _ in named:
        folder = ArrayRecord(name, (), "uint8", ()).folder
        if not folder or folder.startswith("."):
            raise ValueError(f"array name {name!r} cannot name a folder; use a dict with plain, non-empty keys")
        if folder in seen:
            raise ValueError(f"arrays {seen[folder]!r} and {name!r} would share the folder {folder!r}")
        seen[folder] = name
    return named


def crc32(data: bytes | np.ndarray) -> str:
    """CRC-32 (zlib) of bytes, or of an array's elements in C order, as 8 hexadecimal digits."""
    if isinstance(data, np.ndarray):
        return f"{zlib.crc32(np.ascontiguousarray(data).reshape(-1).view(np.uint8)):08x}"
    return f"{zlib.crc32(data):08x}"


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file and forces it to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def plain_json(content: Any) -> bytes:
    """JSON text of `content`, for people to read. Raises TypeError for what JSON cannot hold."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def seal(content: Mapping[str, Any]) -> bytes:
    """JSON text that holds `content` and its own CRC-32."""
    normal = json.loads(json.dumps(content))
    return plain_json({"crc32": crc32(plain_json(normal)), "content": normal})


def unseal(data: bytes) -> dict[str, Any]:
    """The content of `seal`ed text. Raises ValueError when any byte differs from what was sealed."""
    try:
        content = json.loads(data)["content"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"not a sealed JSON file ({error})") from error
    if seal(content) != data:
        raise ValueError("its own checksum does not match")
    return content


def create_array(step_folder: Path, record: ArrayRecord) -> str:
    """Creates an array's folder with its `zarr.json` and returns the CRC-32 of that file."""
    ts.open(record.spec(step_folder), create=True, open=False).result()
    return crc32((step_folder / ARRAYS_FOLDER / record.folder / ARRAY_FILE).read_bytes())


def open_for_chunks(step_folder: Path, record: ArrayRecord) -> ts.TensorStore:
    """Opens an array by its record alone: no file is read, so any process may write chunks at once."""
    return ts.open(record.spec(step_folder), open=True, assume_metadata=True).result()


def write_chunk(store: ts.TensorStore, record: ArrayRecord, index: Index, value: np.ndarray) -> str:
    """Writes one whole chunk and returns the CRC-32 of its bytes, computed from memory, not from the disk."""
    value = np.asarray(value, order="C")
    store[record.chunk_slices(index)].write(value, can_reference_source_data_indefinitely=True).result()
    return crc32(value)


def part_file(process: int) -> str:
    """Name of the file with the checksums of one writing process; it is gone when the step is complete."""
    return f"{PART_PREFIX}{process:05d}.json"


def write_metadata(step_folder: Path, step: int, metadata: Mapping[str, Any], permanent: bool) -> None:
    """Writes `metadata.json`: what the caller wants to find again, and what the store must know."""
    content = {"format": FORMAT, "step": step, "permanent": permanent, "metadata": metadata}
    write_bytes(step_folder / METADATA_FILE, plain_json(content))


def write_checksums(step_folder: Path, records: list[ArrayRecord], checksums: Mapping[str, Checksums]) -> None:
    """Writes `checksums.json`, the list of all arrays and files of a step with their checksums.

    Raises: ValueError when a file of an array has no checksum, that is, when nobody wrote it.
    """
    arrays = {}
    for record in records:
        known = checksums.get(record.name, {})
        missing = [name for name in record.file_names() if name not in known]
        if missing:
            raise ValueError(f"array {record.name!r}: {len(missing)} files were not written, the first is {missing[0]}")
        arrays[record.name] = {
            "shape": record.shape,
            "dtype": record.dtype,
            "chunk": record.chunk,
            "files": dict(sorted(known.items())),
        }
    metadata = crc32((step_folder / METADATA_FILE).read_bytes())
    write_bytes(step_folder / CHECKSUMS_FILE, seal({"format": FORMAT, METADATA_FILE: metadata, "arrays": arrays}))
