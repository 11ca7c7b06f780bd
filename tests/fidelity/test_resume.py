"""An import that was stopped, or whose folder was damaged since, ends as one that never was; others' work stays."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from mmx_jax.checkpoint import CheckpointError, CheckpointStore
from mmx_jax.checkpoint.__main__ import verify_steps
from mmx_jax.convert import ConvertError, WeightsFileError, compare_weights, import_weights, importing
from mmx_jax.convert.files import size_text
from mmx_jax.convert.journal import Journal
from mmx_jax.convert.source import read_config
from mmx_jax.inference.load import load_for_inference
from tests.fidelity.common import tiny_folder

FOLDER = "checkpoints/00000000.importing"
ARRAYS = f"{FOLDER}/arrays"
JOURNAL = f"{FOLDER}/import.journal"


class Stopped(Exception):
    """Stands for a kill."""


def import_until_the_end(source, work):
    """Stops an import when all chunks are written, but not yet the list of their checksums."""

    def stop(*args):
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importing.layout, "write_checksums", stop)
        with pytest.raises(Stopped):
            import_weights(source, work, progress=False)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """(source, workdir) of an import that was stopped when all chunks were written, and a list of what is written."""
    source, _ = tiny_folder(tmp_path / "source", shards=2)
    written = []
    original = importing.layout.write_chunk

    def counted(store, record, index, value):
        written.append((record.folder, record.chunk_file(index)))
        return original(store, record, index, value)

    monkeypatch.setattr(importing.layout, "write_chunk", counted)
    import_until_the_end(source, tmp_path / "work")
    count = len(written)
    written.clear()
    assert count == len(safetensors_of(source))
    return source, tmp_path / "work", written


def safetensors_of(folder):
    return [name for file in folder.glob("*.safetensors") for name in safetensors.numpy.load_file(file)]


def assert_finishes(source, work):
    import_weights(source, work, progress=False)
    assert CheckpointStore(work / "checkpoints").verify(0) == []
    assert {d.problem for d in compare_weights(source, work)} == {"equal"}
    assert not list(work.rglob("import.journal"))


def test_what_is_whole_is_not_written_again(stopped):
    """Also a stop in the very last moment loses nothing."""
    source, work, written = stopped
    assert_finishes(source, work)
    assert written == []


def damage_zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


def damage_bit(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def damage_length(file):
    os.truncate(file, file.stat().st_size - 1)


def damage_pipe(file):
    file.unlink()
    os.mkfifo(file)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", [damage_zeros, damage_bit, damage_length, damage_pipe, os.unlink])
def test_damaged_chunks_are_written_again(damage, stopped):
    """Only those: the bytes decide, not the size."""
    source, work, written = stopped
    damage(work / ARRAYS / "params.head" / "c.0.0")
    assert_finishes(source, work)
    assert written == [("params.head", "c.0.0")]


def test_descriptions_of_arrays_are_made_anew(stopped):
    source, work, written = stopped
    (work / ARRAYS / "params.head" / "zarr.json").write_bytes(b"")
    (work / ARRAYS / "params.embedding" / "zarr.json").unlink()
    assert_finishes(source, work)
    assert written == []


def test_garbled_journal_lines_cost_only_their_chunks(stopped):
    source, work, written = stopped
    first, *lines = (work / JOURNAL).read_bytes().splitlines(keepends=True)
    lines[0] = b"\xff\xfe not JSON\n"
    lines[1] = b"[" * 100_000 + b"\n"
    lines[2] = b'{"params/head": 3}\n'
    lines[3] = b'[["params/head", "c.0.0"], 5, [1, 2, 3], ["params/none", "../../x", "00000000"]]\n'
    lines[4] = json.dumps([[*entry[:2], "00000000"] for entry in json.loads(lines[4])]).encode() + b"\n"
    lines[-1] = lines[-1][:-9]  # the one that was being written
    (work / JOURNAL).write_bytes(first + b"".join(lines))
    assert_finishes(source, work)
    assert len(written) == 6


def test_a_line_after_half_a_line_counts(stopped):
    """What is appended behind a line that was cut off stays readable."""
    source, work, written = stopped
    os.truncate(work / JOURNAL, (work / JOURNAL).stat().st_size - 9)
    import_until_the_end(source, work)
    assert len(written) == 1
    assert_finishes(source, work)
    assert len(written) == 1


@pytest.mark.parametrize("change", [lambda value: value + 1, lambda value: np.where(value > 2, 0, value)])
def test_another_source_of_equal_names_sizes_and_times(change, stopped):
    """What was taken from one model never ends in another one's checkpoint."""
    source, work, written = stopped
    for file in source.glob("*.safetensors"):
        before = file.stat()
        tensors = {name: change(value).astype(np.float32) for name, value in safetensors.numpy.load_file(file).items()}
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_size == before.st_size
    assert_finishes(source, work)
    assert len(written) == len(safetensors_of(source))


def test_two_imports_at_once(stopped):
    """The second is told; the first loses nothing."""
    source, work, written = stopped
    busy = pytest.raises(ConvertError, match="another import is writing here")
    with contextlib.closing(Journal(work / FOLDER, "x" * 64)), busy:
        import_weights(source, work, progress=False)
    assert_finishes(source, work)
    assert len(written) == len(safetensors_of(source))  # another fingerprint: all of it anew


def test_a_folder_that_no_import_made_stays(tmp_path):
    source, _ = tiny_folder(tmp_path / "source", shards=1)
    mine = tmp_path / "work/checkpoints/00000000.importing/mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("keep")
    with pytest.raises(ConvertError, match=r"no import made it"):
        import_weights(source, tmp_path / "work", progress=False)
    assert mine.read_text() == "keep"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("name", "words"), [
    ("checkpoints/00000120/metadata.json", "another run.*00000120"),
    ("checkpoints/00000120.orbax-checkpoint-tmp/x", "another run"),
    ("config.json", "config.json.*workdir of their own"),
    ("tokenizer.model", "tokenizer.model.*not the source's"),
    ("generation_config.json", "generation_config.json.*not the source's"),
])  # fmt: skip
def test_a_workdir_of_something_else_is_refused(name, words, tmp_path):
    """No step 0 beside another run's steps, and none of its files is replaced."""
    source, _ = tiny_folder(tmp_path / "source", shards=1)
    (source / "generation_config.json").write_text("{}")
    file = tmp_path / "work" / name
    file.parent.mkdir(parents=True)
    file.write_text("theirs")
    before = contents(tmp_path / "work")
    with pytest.raises(ConvertError, match=words):
        import_weights(source, tmp_path / "work", progress=False)
    assert contents(tmp_path / "work") == before
    shutil.rmtree(tmp_path / "work")
    import_weights(source, tmp_path / "work", progress=False)


def test_published_weights_are_no_workdir(tmp_path):
    source, _ = tiny_folder(tmp_path / "source", shards=1)
    with pytest.raises(ConvertError, match=r"published weights"):
        import_weights(source, source, progress=False)


@pytest.mark.parametrize("extra", ["model.safetensors", "model-00003-of-00003.safetensors"])
def test_a_file_that_the_index_does_not_name_is_refused(extra, tmp_path):
    """Two sets of weights in one folder: nobody can say which one is meant."""
    source, _ = tiny_folder(tmp_path / "source", shards=2)
    shutil.copyfile(source / "model-00001-of-00002.safetensors", source / extra)
    with pytest.raises(WeightsFileError, match=rf"no place for {extra} beside it"):
        import_weights(source, tmp_path / "work", progress=False)


@pytest.mark.parametrize("which", ["source", "work"])
def test_paths_that_are_not_utf8_are_refused_at_once(which, tmp_path):
    source, _ = tiny_folder(tmp_path / "source", shards=1)
    odd = tmp_path / os.fsdecode(b"m\xff")
    if which == "source":
        source = source.rename(odd)
    work = odd if which == "work" else tmp_path / "work"
    with pytest.raises(ConvertError, match="not UTF-8"):
        import_weights(source, work, progress=False)
    assert not work.exists()
    with pytest.raises(CheckpointError, match="not UTF-8"):
        CheckpointStore(odd / "checkpoints")


def test_sizes_in_words():
    """Small ones too: a message never says 0.00 GB."""
    texts = {0: "0 bytes", 999: "999 bytes", 1500: "1.50 kB", 999_999: "1.00 MB", 12_340_000: "12.3 MB"}
    texts |= {912_180_000_000: "912 GB", 1_800_000_000_000: "1.80 TB"}
    assert {size: size_text(size) for size in texts} == texts


def test_paths_with_dots_and_links(tmp_path, monkeypatch):
    """TensorStore refuses ".." in a path; whatever the caller writes, the place is the same."""
    source, _ = tiny_folder(tmp_path / "source", shards=1)
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a/b")
    monkeypatch.chdir(tmp_path / "a")
    import_weights("../source", "../link/../run", progress=False)  # the link's parent is a, not the current folder's
    assert (tmp_path / "a/run/checkpoints/00000000").is_dir()
    monkeypatch.chdir(tmp_path / "a/b")
    assert verify_steps(Path("../run/checkpoints"), [0], Console(quiet=True))
    assert {d.problem for d in compare_weights(source, "../run")} == {"equal"}
    assert CheckpointStore("../run/checkpoints").verify(0) == []
    assert load_for_inference("../run").model == read_config(source)


@pytest.mark.parametrize("name", ["20261122", "00000007"])
def test_a_workdir_may_be_called_like_a_step(name, tmp_path):
    """What a folder holds decides, not its name; its own steps are still found by name."""
    source, _ = tiny_folder(tmp_path / "source", shards=1)
    work = tmp_path / name
    step = import_weights(source, work, progress=False)
    for path in (work, work / "checkpoints", step):
        assert {d.problem for d in compare_weights(source, path)} == {"equal"}
    (tmp_path / "other" / name).mkdir(parents=True)
    with pytest.raises(ConvertError, match="holds no checkpoint"):
        list(compare_weights(source, tmp_path / "other" / name))
