"""From files to documents: text, JSONL and Parquet, plain or compressed, streamed in bounded memory.

A text file is one document. A JSONL line and a Parquet row are one document each, and are read whole; a text file is
read in blocks. Bytes that are no UTF-8 become U+FFFD and are counted.
"""

import codecs
import gzip
import io
import json
import lzma
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmx_jax.data.errors import DataError
from mmx_jax.data.inputs import InputFile, readable

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Span:
    """Text of one role; role None is plain text."""

    role: str | None
    chunks: Iterable[str]


@dataclass(frozen=True)
class Document:
    """A document as a stream: spans, and the chunks of each, are read once and in order."""

    name: str
    spans: Iterable[Span]


@dataclass(frozen=True)
class Piece:
    """Part of a file that one worker reads: all of it, lines that start in a byte range, or row groups."""

    file: InputFile
    start: int = 0
    stop: int | None = None


@dataclass
class ReadReport:
    """What a reader had to change or leave out."""

    replaced: dict[str, int] = field(default_factory=dict)
    """File -> invalid UTF-8 sequences that became U+FFFD."""
    empty: int = 0
    """Records without any text."""


_replacements = threading.local()


def _count_and_replace(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    _replacements.count = getattr(_replacements, "count", 0) + 1
    return "\ufffd", error.end


codecs.register_error("mmx_jax.replace", _count_and_replace)


class _Utf8:
    """Decodes one file's bytes and notes replacements in the report."""

    def __init__(self, file: InputFile, report: ReadReport) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("mmx_jax.replace")
        self._path = readable(file.path)
        self._report = report

    def decode(self, data: bytes, final: bool = True) -> str:
        _replacements.count = 0
        text = self._decoder.decode(data, final)
        if _replacements.count:
            self._report.replaced[self._path] = self._report.replaced.get(self._path, 0) + _replacements.count
        return text


def _open_bytes(file: InputFile) -> io.BufferedIOBase:
    """Opens a file for reading, decompressed. dictd's .dz is gzip with an index that gzip readers pass over."""
    if file.compression == "gzip":
        return gzip.open(file.path, "rb")
    if file.compression == "xz":
        return lzma.open(file.path, "rb")
    return open(file.path, "rb")


def read_documents(piece: Piece, text_field: str, document_bytes: int | None, report: ReadReport) -> Iterator[Document]:
    """Documents of one piece of input, in order.

    Args:
      piece: what to read.
      text_field: field of a record that holds its text, if it has no "spans".
      document_bytes: longer plain documents are cut at line ends into documents of at most so many bytes.
      report: is filled while reading.

    Raises:
      DataError: the file cannot be read or decompressed, or a record is not what it should be; names file and place.
    """
    file = piece.file
    if file.kind == "text":
        chunks = _text_chunks(file, report)
        if document_bytes is None:
            yield Document(file.name, [Span(None, chunks)])
        else:
            yield from _parts(file.name, chunks, document_bytes)
        return
    records = _json_records(piece, report) if file.kind == "jsonl" else _parquet_records(piece)
    for name, record in records:
        spans = _spans(record, text_field, f"{file.path}: record {name.rpartition('#')[2]}")
        if not any(text for _, text in spans):
            report.empty += 1
        elif document_bytes is not None and [role for role, _ in spans] == [None]:
            yield from _parts(name, [spans[0][1]], document_bytes)
        else:
            yield Document(name, [Span(role, [text]) for role, text in spans])


@contextmanager
def open_input(file: InputFile) -> Iterator[io.BufferedIOBase]:
    """Opens a file for reading, decompressed.

    Raises:
      DataError: it cannot be opened, or what happens in the block cannot read it; names the file.
    """
    try:
        with _open_bytes(file) as stream:
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise DataError(f"{file.path}: cannot be read ({type(error).__name__}: {error})") from error


def _text_chunks(file: InputFile, report: ReadReport) -> Iterator[str]:
    utf8 = _Utf8(file, report)
    with open_input(file) as stream:
        while data := stream.read(BLOCK_BYTES):
            yield utf8.decode(data, final=False)
    yield utf8.decode(b"", final=True)


def _parts(name: str, chunks: Iterable[str], document_bytes: int) -> Iterator[Document]:
    """Cuts plain text into documents at line ends; a line that is longer than a document is cut anywhere."""
    number, buffer = 0, b""
    for chunk in chunks:
        buffer += chunk.encode()
        start = 0
        while len(buffer) - start > document_bytes:
            stop = buffer.rfind(b"\n", start, start + document_bytes) + 1 or start + document_bytes
            while buffer[stop] & 0xC0 == 0x80:  # not inside a character
                stop -= 1
            yield Document(f"{name}#part-{number}", [Span(None, [buffer[start:stop].decode()])])
            number, start = number + 1, stop
        buffer = buffer[start:]
    if buffer:
        yield Document(f"{name}#part-{number}" if number else name, [Span(None, [buffer.decode()])])


def _json_records(piece: Piece, report: ReadReport) -> Iterator[tuple[str, Any]]:
    """Lines that start in [start, stop), named by the byte at which they start in the decompressed file."""
    utf8 = _Utf8(piece.file, report)
    with open_input(piece.file) as stream:
        position = piece.start
        if position:
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        while piece.stop is None or position < piece.stop:
            line = stream.readline()
            if not line:
                return
            text = utf8.decode(line).removeprefix("\ufeff")
            if text.strip():
                try:
                    yield f"{piece.file.name}#{position}", json.loads(text)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{piece.file.path}: the line at byte {position} is no JSON ({error}); a .jsonl file has "
                        "one JSON object a line"
                    ) from error
            position += len(line)


def _parquet_records(piece: Piece) -> Iterator[tuple[str, Any]]:
    with open_input(piece.file) as stream, pq.ParquetFile(stream) as table:
        stop = table.num_row_groups if piece.stop is None else piece.stop
        row = sum(table.metadata.row_group(group).num_rows for group in range(piece.start))
        for batch in table.iter_batches(batch_size=64, row_groups=list(range(piece.start, stop))):
            for record in batch.to_pylist():
                yield f"{piece.file.name}#{row}", record
                row += 1


def _spans(record: Any, text_field: str, where: str) -> list[tuple[str | None, str]]:
    """(role, text) of a record: its "spans" if it has them, else its text field."""
    if not isinstance(record, dict):
        raise DataError(f"{where} is a {type(record).__name__}; an object with the field {text_field!r} is needed")
    if record.get("spans") is not None:
        spans = record["spans"]
        if not isinstance(spans, list) or not all(
            isinstance(span, dict) and isinstance(span.get("role"), str) and isinstance(span.get("text"), str)
            for span in spans
        ):
            raise DataError(f'{where}: "spans" must be a list of {{"role": string, "text": string}}')
        return [(span["role"], _valid(span["text"])) for span in spans]
    text = record.get(text_field)
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {text_field!r} is {'missing' if text is None else 'no string'}; it has "
            f"{', '.join(map(str, record)) or 'no fields'} (set text_field)"
        )
    return [(None, _valid(text))]


def _valid(text: str) -> str:
    """JSON may escape half a surrogate pair, which no UTF-8 can hold: it becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if _has_surrogate(text) else text


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
