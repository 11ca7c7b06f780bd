"""Preparing a store: complete or not a store, resumable, the same for any number of processes; and its reading."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmx_jax.config import ConfigError, PrepareConfig, TokenizerConfig
from mmx_jax.data import (
    DataError,
    Manifest,
    StoreError,
    TokenStore,
    check_store_vocabulary,
    load_tokenizer,
    verify,
    work,
)
from mmx_jax.data.errors import TokenizerError
from mmx_jax.data.prepare import prepare
from mmx_jax.data.work import is_held_out

RUN_IN_SMALL_SHARDS = """
import sys
from mmx_jax.config import PrepareConfig, TokenizerConfig
from mmx_jax.data import work
from mmx_jax.data.prepare import prepare
if __name__ == "__main__":
    work.SHARD_BYTES = 40_000
    prepare(PrepareConfig(inputs=(sys.argv[1],), output=sys.argv[2], tokenizer=TokenizerConfig(path=sys.argv[3]),
                          held_out_fraction=0.2, processes=1), progress=False)
"""


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The corpus becomes some thirty shards."""
    monkeypatch.setattr(work, "SHARD_BYTES", 40_000)


def _config(corpus: Path, output: Path, tokenizer: Path, **changes: object) -> PrepareConfig:
    config = PrepareConfig(
        inputs=(str(corpus),),
        output=str(output),
        tokenizer=TokenizerConfig(path=str(tokenizer)),
        held_out_fraction=0.2,
        processes=1,
    )
    return replace(config, **changes)


def _texts(folder: Path) -> dict[str, str]:
    """Name -> text of every document of a store."""
    texts = {}
    for split in ("train", "held_out"):
        store = TokenStore(folder, split)
        names = []
        for shard in store.manifest.splits[split]["shards"]:
            lines = (folder / "shards" / f"{shard['stem']}.names").read_text().splitlines()
            names += [json.loads(line) for line in lines]
        for i, name in enumerate(names):
            tokens = store.tokens(i)
            assert tokens[-1] == store.manifest.tokenizer["end_of_text_id"]
            assert len(tokens) == store.lengths[i]
            texts[name] = store.tokenizer.decode(tokens)
            assert store.bytes(i) == store.byte_lengths[i] == len(texts[name].encode())
            assert is_held_out(name, 0.2) == (split == "held_out")
    return texts


def test_a_store_holds_the_corpus(corpus: Path, store_folder: Path) -> None:
    """Every document is there once, text for text, in the split that its name decides."""
    expected = {f"{corpus.name}/{path.name}": path.read_text() for path in corpus.iterdir()}
    assert _texts(store_folder) == {name: text for name, text in expected.items() if text}
    manifest = Manifest.read(store_folder)
    assert manifest.statistics["bytes"] == sum(len(text.encode()) for text in expected.values())
    assert manifest.statistics["documents"] == sum(bool(text) for text in expected.values())
    assert verify(store_folder) == []
    assert TokenStore(store_folder).tokens(0).dtype == np.uint16
    with pytest.raises(IndexError, match="document 100000 is outside"):
        TokenStore(store_folder).tokens(100_000)


def test_processes_do_not_change_the_store(
    corpus: Path, store_folder: Path, tmp_path: Path, small_shards: None
) -> None:
    """One process and two write the same shards; the number of shards does not change documents."""
    one = prepare(_config(corpus, tmp_path / "one", store_folder), progress=False)
    two = prepare(_config(corpus, tmp_path / "two", store_folder, processes=2), progress=True)
    assert one.fingerprint == two.fingerprint
    assert len(one.splits["train"]["shards"]) > 5
    assert _texts(tmp_path / "one") == _texts(store_folder)


def test_a_second_call_returns_the_finished_store(corpus: Path, store_folder: Path) -> None:
    """Nothing is read or written again, even if the inputs are gone; other settings are refused."""
    manifest = Manifest.read(store_folder)
    before = {path: path.stat().st_mtime_ns for path in store_folder.rglob("*.tokens")}
    config = PrepareConfig(
        inputs=(str(corpus),),
        output=str(store_folder),
        tokenizer=TokenizerConfig(vocab_size=512),
        held_out_fraction=0.2,
        processes=2,
    )
    assert prepare(config, progress=False) == manifest
    assert before == {path: path.stat().st_mtime_ns for path in store_folder.rglob("*.tokens")}
    with pytest.raises(DataError, match=r"other values of license: .*unknown.*choose another output"):
        prepare(replace(config, license="MIT"), progress=False)


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.full)])
def test_killed_halfway_goes_on(
    corpus: Path, store_folder: Path, tmp_path: Path, kills: int, small_shards: None
) -> None:
    """SIGKILL on the way: no manifest, finished shards stay as they are, and the end is the undisturbed store."""
    folder = tmp_path / "store"
    arguments = [sys.executable, "-c", RUN_IN_SMALL_SHARDS, str(corpus), str(folder), str(store_folder)]
    shards = folder / "shards"
    for _ in range(kills):
        finished = len(list(shards.glob("*.json")))
        process = subprocess.Popen(arguments)
        while len(list(shards.glob("*.json"))) < finished + 2 and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (folder / "manifest.json").exists()
        with pytest.raises(StoreError, match="no token store here"):
            TokenStore(folder)
    kept = {
        path: path.stat().st_mtime_ns for record in shards.glob("*.json") for path in shards.glob(f"*-{record.stem}.*")
    }
    assert kept
    damaged = sorted(shards.glob("train-*.tokens"))[0]
    os.truncate(damaged, 10)
    resumed = prepare(_config(corpus, folder, store_folder), progress=False)
    undisturbed = prepare(_config(corpus, tmp_path / "other", store_folder), progress=False)
    assert resumed.fingerprint == undisturbed.fingerprint
    assert verify(folder) == []
    changed = {path.stem for path, modified in kept.items() if path.stat().st_mtime_ns != modified}
    assert {stem.rpartition("-")[2] for stem in changed} == {damaged.stem.rpartition("-")[2]}


def test_changed_inputs_start_anew(
    corpus: Path, store_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Shards of an interrupted run are not mixed with those of other text."""
    source, folder = tmp_path / "a.txt", tmp_path / "store"
    source.write_text("first version\n" * 50)
    config = _config(source, folder, store_folder, held_out_fraction=0.0)
    prepare(config, progress=False)
    progress = {"format": 1, "request": json.loads((folder / "manifest.json").read_text())["request"], "inputs": "old"}
    (folder / "manifest.json").unlink()
    (folder / "unfinished.json").write_text(json.dumps(progress))
    source.write_text("second version\n" * 50)
    prepare(config, progress=False)
    assert "starting anew" in caplog.text
    assert TokenStore(folder).tokenizer.decode(TokenStore(folder).tokens(0)).startswith("second")


def test_a_damaged_note_of_an_interrupted_run_starts_anew(store_folder: Path, tmp_path: Path) -> None:
    source, folder = tmp_path / "a.txt", tmp_path / "store"
    source.write_text("some text\n" * 50)
    (folder / "shards").mkdir(parents=True)
    (folder / "unfinished.json").write_text('{"format": 1, "req')
    (folder / "shards" / "00000.json").write_text("{")
    assert prepare(_config(source, folder, store_folder, held_out_fraction=0.0), progress=False).splits["train"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "c.txt").write_text("new"), r"1 added \(corpus/c\.txt\)"),
        (lambda folder: (folder / "a.txt").unlink(), r"1 gone \(corpus/a\.txt\)"),
        (lambda folder: (folder / "a.txt").write_text("b"), r"1 of another size \(corpus/a\.txt\)"),
        (lambda folder: os.utime(folder / "a.txt", (1, 1)), None),
        (shutil.rmtree, None),
    ],
    ids=["added", "gone", "resized", "touched", "no corpus"],
)
def test_a_corpus_that_changed_since_is_noticed(
    store_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Any, words: str | None
) -> None:
    """The command refuses it, training goes on with a warning; a store without its corpus is as good."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in "ab":
        (corpus / f"{name}.txt").write_text(f"text of {name}\n" * 20)
    config = _config(corpus, tmp_path / "store", store_folder, held_out_fraction=0.0)
    manifest = prepare(config, progress=False)
    change(corpus)
    assert prepare(config, progress=False) == manifest
    assert bool(caplog.records) == (corpus.exists())
    if words is None:
        assert prepare(config, progress=False, refuse_changes=True) == manifest
        return
    with pytest.raises(DataError, match=words + r".*Delete the folder to prepare it anew"):
        prepare(config, progress=False, refuse_changes=True)


def test_file_names_that_are_no_utf8(store_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Such a file is a document like others, its name has escapes; invalid text in it is still reported."""
    source = tmp_path / os.fsdecode(b"caf\xe9.txt")
    source.write_bytes(b"good\n" * 9 + b"\xff\n")
    manifest = prepare(_config(source, tmp_path / "store", store_folder, held_out_fraction=0.0), progress=False)
    assert list(manifest.statistics["invalid_utf8"].values()) == [1]
    assert "caf\\xe9.txt: 1 invalid" in caplog.text
    (names,) = (tmp_path / "store" / "shards").glob("*.names")
    assert json.loads(names.read_text()) == "caf\\xe9.txt"
    assert prepare(_config(source, tmp_path / "store", store_folder, held_out_fraction=0.0), progress=False) == manifest


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "fine"}\nnot json\n', "no JSON"),
        ("a.txt.gz", b"\x1f\x8bbroken", "cannot be read"),
        ("a.parquet", b"PAR1" + b"x" * 60_000 + b"PAR1", "cannot be read"),
    ],
)
def test_a_corpus_error_is_no_tokenizer_error(
    tmp_path: Path, small_shards: None, name: str, content: bytes, words: str
) -> None:
    """What is wrong with a file is said of the file, while a tokenizer is trained on it as well."""
    (tmp_path / name).write_bytes(content)
    config = PrepareConfig(inputs=(str(tmp_path / name),), output=str(tmp_path / "store"), processes=1)
    with pytest.raises(DataError, match=f"{name}.*{words}") as caught:
        prepare(config, progress=False)
    assert not isinstance(caught.value, TokenizerError)


def test_killed_worker_is_an_error(corpus: Path, store_folder: Path, tmp_path: Path, small_shards: None) -> None:
    """Bad input: SIGKILL of a tokenising process; the call says so, and running it again finishes the store."""
    config = _config(corpus, tmp_path / "store", store_folder, processes=2)

    def kill_first_worker() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.001)
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill_first_worker)
    killer.start()
    with pytest.raises(DataError, match=r"worker process died .*shard 000.*run the same command again"):
        prepare(config, progress=False)
    killer.join()
    assert not (tmp_path / "store" / "manifest.json").exists()
    prepare(replace(config, processes=1), progress=False)
    assert verify(tmp_path / "store") == []


def test_errors_in_a_worker_surface(tmp_path: Path, store_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad record found by another process is reported with its file, and leaves no store."""
    monkeypatch.setattr(work, "SHARD_BYTES", 2000)
    lines = [json.dumps({"text": f"record {i} " * 20}) for i in range(40)]
    lines[30] = "broken"
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"r\.jsonl: the line at byte \d+ is no JSON"):
        prepare(_config(tmp_path / "r.jsonl", tmp_path / "s", store_folder, processes=2), progress=False)
    assert not (tmp_path / "s" / "manifest.json").exists()
    assert not list((tmp_path / "s" / "shards").glob("*.tmp"))


def test_full_disk(corpus: Path, store_folder: Path, tmp_path: Path) -> None:
    """Bad input: the kernel's own "no space left", while tokens and while the manifest is written; then room again."""
    folder = tmp_path / "store"
    config = _config(corpus, folder, store_folder)
    folder.mkdir()
    (folder / "manifest.json.tmp").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"store: the disk is full .*run the same command again"):
        prepare(config, progress=False)
    assert not (folder / "manifest.json").exists()
    for record in (folder / "shards").glob("*.json"):
        record.unlink()
    (folder / "shards" / "train-00000.tokens").unlink()
    (folder / "shards" / "train-00000.tokens.tmp").symlink_to("/dev/full")
    with pytest.raises(DataError, match="the disk is full"):
        prepare(config, progress=False)
    assert not (folder / "manifest.json").exists()
    assert not list((folder / "shards").glob("train*"))
    prepare(config, progress=False)
    assert verify(folder) == []
    assert _texts(folder) == _texts(store_folder)


def test_file_size_limit(corpus: Path, store_folder: Path, tmp_path: Path) -> None:
    """A limit of the operating system in the middle of a shard is an error with a reason, not a short store."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(DataError, match="the file size limit is reached"):
            prepare(_config(corpus, tmp_path / "store", store_folder), progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_folder_that_cannot_be_written(corpus: Path, store_folder: Path, tmp_path: Path) -> None:
    """Bad input: a read-only place (sysfs takes no folders from anybody) and a file where the folder should be."""
    (tmp_path / "file").touch()
    for output, reason in {
        "/sys/mmx-store": "not writable|read-only|writing failed",
        str(tmp_path / "file"): "failed",
    }.items():
        with pytest.raises(DataError, match=f"{output}: .*({reason})"):
            prepare(_config(corpus, Path(output), store_folder), progress=False)


def test_damaged_shards(corpus: Path, store_folder: Path, tmp_path: Path) -> None:
    """Bad input: a short or missing file is noticed on opening, a flipped bit by `verify`; the file is named."""
    folder = tmp_path / "store"
    prepare(_config(corpus, folder, store_folder), progress=False)
    tokens = folder / "shards" / "train-00000.tokens"
    good = tokens.read_bytes()
    for position in (0, len(good) // 2, len(good) - 1):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        tokens.write_bytes(bad)
        assert verify(folder) == [f"{tokens}: contents differ from the manifest's SHA-256"]
    tokens.write_bytes(good[:-2])
    with pytest.raises(StoreError, match=r"train-00000\.tokens has \d+ bytes, expected \d+ bytes"):
        TokenStore(folder)
    tokens.unlink()
    with pytest.raises(StoreError, match=r"train-00000\.tokens is missing"):
        TokenStore(folder)
    assert len(verify(folder)) == 1
    tokens.write_bytes(good)
    assert verify(folder) == []
    (folder / "manifest.json").write_text('{"format": 1')
    with pytest.raises(StoreError, match=r"manifest\.json: not a manifest"):
        TokenStore(folder)


def test_invalid_utf8_is_in_the_manifest(tmp_path: Path, store_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bad input: the manifest and a warning name the file and how much was replaced."""
    (tmp_path / "latin.txt").write_bytes("déjà vu\n".encode("latin-1") * 10)
    config = _config(tmp_path / "latin.txt", tmp_path / "store", store_folder, held_out_fraction=0.0)
    manifest = prepare(config, progress=False)
    path = str(tmp_path / "latin.txt")
    assert manifest.statistics["invalid_utf8"] == {path: 20}
    assert f"{path}: 20 invalid UTF-8 sequences" in caplog.text


def test_nothing_to_train_on(tmp_path: Path, store_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A corpus whose only document is held out is an error; one with nothing held out a warning; parts help both."""
    (tmp_path / "one.txt").write_text("just one document\n" * 2000)
    config = _config(tmp_path / "one.txt", tmp_path / "store", store_folder, held_out_fraction=0.999)
    with pytest.raises(DataError, match="no training document: 1 documents are held out"):
        prepare(config, progress=False)
    prepare(replace(config, output=str(tmp_path / "b"), held_out_fraction=0.001), progress=False)
    assert "no document is held out" in caplog.text
    parts = replace(config, output=str(tmp_path / "c"), held_out_fraction=0.3, document_bytes=1024)
    manifest = prepare(parts, progress=False)
    assert min(manifest.splits[split]["documents"] for split in ("train", "held_out")) > 3
    assert manifest.statistics["bytes"] == 36_000


def test_tokenizer_is_trained_on_training_documents_only(tmp_path: Path) -> None:
    """A word that only held-out documents have gets no piece of its own; a sample spreads over the corpus."""
    folder = tmp_path / "docs"
    folder.mkdir()
    for i in range(400):
        name = f"doc{i}.txt"
        secret = is_held_out(f"docs/{name}", 0.3)
        (folder / name).write_text(("zyxwvut " if secret else "ordinary ") * 200 + f"text number {i}\n")
    config = PrepareConfig(
        inputs=(str(folder),),
        output=str(tmp_path / "store"),
        tokenizer=TokenizerConfig(vocab_size=300, training_bytes=100_000),
        held_out_fraction=0.3,
    )
    prepare(config, progress=False)
    tokenizer = load_tokenizer(tmp_path / "store")
    assert len(tokenizer.encode(" ordinary")) < 3
    assert len(tokenizer.encode(" zyxwvut")) > 5


def test_vocabulary_of_another_size_than_the_model(store: TokenStore) -> None:
    """Bad input: checked against the store before anything is trained."""
    check_store_vocabulary(store, 512)
    with pytest.raises(TokenizerError, match=r"tokenizer of .* has 512 ids, the model's vocab_size is 4096"):
        check_store_vocabulary(store, 4096)


def test_command_line(corpus: Path, store_folder: Path, tmp_path: Path) -> None:
    """The documented command prepares a store, `--verify` checks it, and errors are one line and a code."""
    base = [sys.executable, "-m", "mmx_jax.data.prepare", f"--output={tmp_path / 'store'}"]
    done = subprocess.run(
        [*base, f"--inputs={corpus}", f"--tokenizer={store_folder}", "--deduplicate=exact,near", "--license=PSF"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "train:" in done.stdout
    assert Manifest.read(tmp_path / "store").license == "PSF"
    for wrong, said in (
        ("--inputs=/nowhere/*.txt", "nowhere"),
        ("--inpts=x", "inpts"),
        ("--processes=many", "processes"),
        ("corpus", "unexpected arguments: corpus; inputs are named by --inputs=a,b"),
    ):
        done = subprocess.run([*base, f"--output={tmp_path / 'other'}", wrong], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("prepare.py: error: ")
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_impossible_settings() -> None:
    with pytest.raises(ConfigError, match="inputs = \\(\\): names no input"):
        PrepareConfig(inputs=(), output="x")
    with pytest.raises(ConfigError, match="document_bytes = 10: must be at least 1024"):
        PrepareConfig(inputs=("a",), output="x", document_bytes=10)
