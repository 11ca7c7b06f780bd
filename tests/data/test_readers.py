"""Every kind of input, streamed; and what is done with bad ones."""

import gzip
import json
import lzma
import sysconfig
from itertools import pairwise
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx_jax.data import DataError
from mmx_jax.data.inputs import find_inputs
from mmx_jax.data.readers import Piece, ReadReport, read_documents

RECORDS = [
    {"text": "plain 中文\nsecond line"},
    {"text": ""},
    {"spans": [{"role": "user", "text": "question"}, {"role": "assistant", "text": "answer"}]},
    {"text": "last", "other": 3},
]


def _read(path: Path | str, report: ReadReport | None = None, document_bytes: int | None = None) -> list[tuple]:
    """(name, [(role, text)]) of every document."""
    documents = []
    for file in find_inputs((str(path),)).files:
        for document in read_documents(Piece(file), "text", document_bytes, report or ReadReport()):
            documents.append((document.name, [(span.role, "".join(span.chunks)) for span in document.spans]))
    return documents


EXPECTED = [
    [(None, "plain 中文\nsecond line")],
    [("user", "question"), ("assistant", "answer")],
    [(None, "last")],
]


def test_records_of_every_format(tmp_path: Path) -> None:
    """JSONL and Parquet, plain and compressed, give the same documents; names do not depend on compression."""
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    (tmp_path / "r.jsonl").write_bytes(lines)
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "r.jsonl.xz").write_bytes(lzma.compress(lines))
    columns = {key: [record.get(key) for record in RECORDS] for key in ("text", "spans", "other")}
    pq.write_table(pa.table(columns), tmp_path / "r.parquet", row_group_size=2)
    (tmp_path / "r.parquet.gz").write_bytes(gzip.compress((tmp_path / "r.parquet").read_bytes()))
    for name in ("r.jsonl", "r.jsonl.gz", "r.jsonl.xz", "r.parquet", "r.parquet.gz"):
        report = ReadReport()
        assert [spans for _, spans in _read(tmp_path / name, report)] == EXPECTED
        assert report.empty == 1
    offsets = [name.partition("#")[2] for name, _ in _read(tmp_path / "r.jsonl.gz")]
    assert offsets == [name.partition("#")[2] for name, _ in _read(tmp_path / "r.jsonl")]


def test_text_of_every_compression(tmp_path: Path) -> None:
    """A text file is one document, byte for byte; dictd's .dz is gzip with an extra header field."""
    text = "first\r\nsecond\n\ttab é\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.xz").write_bytes(lzma.compress(text.encode()))
    plain = gzip.compress(text.encode())
    extra = b"RA\x08\x00\x01\x00\x00\x40\x01\x00\x10\x00"
    dictzip = plain[:3] + b"\x04" + plain[4:10] + len(extra).to_bytes(2, "little") + extra + plain[10:]
    (tmp_path / "a.dict.dz").write_bytes(dictzip)
    for name in ("a.txt", "a.gz", "a.xz", "a.dict.dz"):
        assert _read(tmp_path / name) == [(name, [(None, text)])]


def test_folders_and_globs(tmp_path: Path) -> None:
    """Folders are read whole in the order of paths; binary and hidden files and excluded paths are not."""
    root = tmp_path / "docs"
    for name in ("b/two.txt", "a.md", "b/one.md", ".hidden/x.md", "b/.secret", "c/skip.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "b" / "image.png").write_bytes(b"\x89PNG\0\0")
    found = find_inputs((str(root),), exclude=("c/*",))
    assert [file.name for file in found.files] == ["docs/a.md", "docs/b/one.md", "docs/b/two.txt"]
    assert found.skipped == 1
    only = find_inputs((str(root),), include=("*.md",))
    assert [file.name for file in only.files] == ["docs/a.md", "docs/b/one.md", "docs/c/skip.md"]
    globbed = find_inputs((str(root / "**" / "*.md"), str(root / "a.md")))
    assert [file.name for file in globbed.files] == ["docs/a.md", "docs/b/one.md", "docs/c/skip.md"]


def test_python_library() -> None:
    """Sources without tests and installed packages, in one order, named the same on every machine."""
    names = [file.name for file in find_inputs(("python:stdlib",)).files]
    assert "python:stdlib/json/decoder.py" in names
    assert names == sorted(names)
    assert not any("/test" in name.removeprefix("python:stdlib") or "site-packages" in name for name in names)
    assert all(name.endswith(".py") for name in names)
    assert len(names) > 300
    assert Path(sysconfig.get_path("stdlib"), "json", "decoder.py").is_file()


def test_invalid_utf8_is_replaced_and_reported(tmp_path: Path) -> None:
    """Bad input: each invalid sequence becomes U+FFFD, counted by file, also across the blocks that are read."""
    path = tmp_path / "bad.txt"
    good = "é" * (1 << 19)
    path.write_bytes(b"a\xff\xfeb" + good.encode() + b"\xc3")
    report = ReadReport()
    ((_, [(_, text)]),) = _read(path, report)
    assert text == "a\ufffd\ufffdb" + good + "\ufffd"
    assert report.replaced == {str(path): 3}
    lines = tmp_path / "bad.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"text": "caf\xe9"}\n{"text": "half \\ud83d pair"}\n')
    report = ReadReport()
    assert [spans[0][1] for _, spans in _read(lines, report)] == ["caf\ufffd", "half \ufffd pair"]
    assert report.replaced == {str(lines): 1}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab中", max_size=30), min_size=1, max_size=20), st.lists(st.integers(1, 400), max_size=6))
def test_byte_ranges_of_jsonl(tmp_path_factory: pytest.TempPathFactory, texts: list[str], cuts: list[int]) -> None:
    """However a JSONL file is cut into byte ranges, every record is read once, in order, under the same name."""
    path = tmp_path_factory.mktemp("ranges") / "r.jsonl"
    path.write_text("".join(json.dumps({"text": text + "."}, ensure_ascii=False) + "\n" for text in texts))
    (file,) = find_inputs((str(path),)).files
    edges = sorted({0, file.size, *(cut for cut in cuts if cut < file.size)})
    read = [
        (document.name, "".join(next(iter(document.spans)).chunks))
        for start, stop in pairwise(edges)
        for document in read_documents(Piece(file, start, stop), "text", None, ReadReport())
    ]
    assert [text for _, text in read] == [text + "." for text in texts]
    assert read == [(name, spans[0][1]) for name, spans in _read(path)]


@settings(max_examples=60, deadline=None)
@given(st.text("a\n中🙂", min_size=1, max_size=6000))
def test_long_documents_in_parts(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """Parts have at most the given size, end at lines where there are any, and together are the document."""
    path = tmp_path_factory.mktemp("parts") / "long.txt"
    path.write_bytes(text.encode())
    parts = [spans[0][1] for _, spans in _read(path, document_bytes=1024)]
    assert "".join(parts) == text
    assert all(0 < len(part.encode()) <= 1024 for part in parts)
    assert all(part.endswith("\n") or "\n" not in part for part in parts[:-1])


@pytest.mark.parametrize("megabytes", [5, pytest.param(100, marks=pytest.mark.full)])
def test_one_enormous_line(tmp_path: Path, megabytes: int) -> None:
    """Bad input: a text of one line is read in blocks, in bounded memory; a JSONL line is read whole."""
    path = tmp_path / "line.txt"
    with open(path, "wb") as file:
        for _ in range(megabytes):
            file.write(b"abcdefghi " * 100_000)
    process = psutil.Process()
    before, most, size = process.memory_info().rss, 0, 0
    (found,) = find_inputs((str(path),)).files
    (document,) = read_documents(Piece(found), "text", None, ReadReport())
    for span in document.spans:
        for chunk in span.chunks:
            size += len(chunk)
            most = max(most, process.memory_info().rss)
    assert size == megabytes * 1_000_000
    assert most - before < 50_000_000
    line = tmp_path / "line.jsonl"
    line.write_text(json.dumps({"text": "x" * size}) + "\n")
    ((_, [(_, text)]),) = _read(line)
    assert len(text) == size


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "fine"}\nnot json\n', "line at byte 17 is no JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "'text' is missing; it has body"),
        ("a.jsonl", b'{"text": 7}\n', "'text' is no string"),
        ("a.jsonl", b"[1]\n", "record 0 is a list"),
        ("a.jsonl", b'{"spans": [{"text": "x"}]}\n', '"spans" must be a list'),
        ("a.parquet", b"PAR1 not really", "cannot be read"),
        ("a.gz", b"\x1f\x8bbroken", "cannot be read"),
        ("a.gz", gzip.compress(b"x" * 1000)[:-9], "cannot be read"),
        ("a.gz", gzip.compress(bytes(range(256)) * 9)[:20] + b"\xff" * 40, "cannot be read"),
        ("a.xz", lzma.compress(b"x" * 1000)[:-9], "cannot be read"),
    ],
    ids=[
        "no json",
        "no text field",
        "text no string",
        "no object",
        "span without role",
        "parquet",
        "gzip header",
        "gzip cut",
        "gzip body",
        "xz cut",
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*{words}"):
        _read(tmp_path / name)


def test_missing_and_empty_corpus(tmp_path: Path) -> None:
    """Bad input: errors say which input."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "x.bin").write_bytes(b"\0")
    for entry, words in {
        "absent.txt": "no such file",
        "folder": "no file found",
        "*.nothing": "no file found",
        "binary": "no text file found",
        "empty.txt": "corpus is empty",
    }.items():
        with pytest.raises(DataError, match=words) as caught:
            find_inputs((str(tmp_path / entry),))
        assert entry in str(caught.value)
