"""A full disk, an unwritable folder, a dead or second writer: no run claims to have saved when it did not."""

import concurrent.futures
import contextlib
import os
import resource
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx_jax.checkpoint import CheckpointError, CheckpointStore, CheckpointWriteError, layout

SMALL = {"params": {"w": jnp.arange(8.0)}}
LARGE = {"params": {"w": np.ones((64, 2**14), np.float32)}}  # 4 MiB
ABSTRACT = {"params": {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}}


@contextlib.contextmanager
def full_disk(folder: Path, kind: str) -> Iterator[None]:
    """A folder on a disk of 1 MiB; where none can be mounted, a limit of 1 MiB for every file this process writes."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if kind == "disk" and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Nobody's rights where the tests run as root, whom no permission stops."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that everybody may enter (pytest's own are private)."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize(
    ("surfaces_at", "kind"),
    [("wait", "disk"), ("save", "disk"), ("close", "disk"), ("check", "disk"), ("restore", "disk"), ("wait", "limit")],
)
def test_full_disk(tmp_path: Path, surfaces_at: str, kind: str) -> None:
    folder = tmp_path / "run"
    with full_disk(folder, kind):
        store = CheckpointStore(folder)
        store.save(1, SMALL, {})
        store.save(2, LARGE, {})
        done = store._pending
        assert done is not None
        concurrent.futures.wait([done])
        surface = {
            "wait": store.wait,
            "save": lambda: store.save(3, SMALL, {}),
            "close": store.close,
            "check": store.check,
            "restore": lambda: store.restore(ABSTRACT),
        }[surfaces_at]
        with pytest.raises(CheckpointWriteError, match=r"step 2 in .*was NOT saved: .*(No space|too large)"):
            surface()
        assert store.steps() == [1]
        assert sorted(path.name for path in folder.iterdir()) == ["00000001", "writer.lock"], "space is given back"
        if surfaces_at != "close":
            store.save(3, SMALL, {})
            assert store.restore(ABSTRACT).step == 3, "a store works on when there is room again"
            store.close()


def test_folder_that_cannot_be_written(public_folder: Path) -> None:
    folder = public_folder / "run"
    with CheckpointStore(folder) as store:
        store.save(1, SMALL, {})
    (folder / "writer.lock").unlink()
    folder.chmod(0o555)
    try:
        with unprivileged():
            store = CheckpointStore(folder)
            with pytest.raises(CheckpointWriteError, match=r"cannot be written: .*denied"):
                store.save(2, SMALL, {})
            with pytest.raises(CheckpointWriteError, match=r"cannot be written: .*denied"):
                store.open_for_writing()
            assert store.restore(ABSTRACT).step == 1, "reading works"
            store.close()
    finally:
        folder.chmod(0o755)


def test_folder_turned_read_only_between_saves(public_folder: Path) -> None:
    folder = public_folder / "run"
    with CheckpointStore(folder) as store:
        store.save(1, SMALL, {})
        store.wait()
        folder.chmod(0o555)
        try:
            with unprivileged(), pytest.raises(CheckpointWriteError, match=r"step 2 .*was NOT saved: .*denied"):
                store.save(2, SMALL, {})
        finally:
            folder.chmod(0o755)
        assert store.steps() == [1]


def test_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointWriteError, match="cannot be written"):
        CheckpointStore(tmp_path / "file/checkpoints").open_for_writing()


@pytest.mark.parametrize("death", [SystemExit, concurrent.futures.CancelledError, MemoryError])
def test_dead_writer_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: type[BaseException]) -> None:
    """However the writing thread ends, cancelled without a word included, the step is not claimed."""

    def dies(*arguments: object) -> str:
        raise death

    with CheckpointStore(tmp_path) as store:
        store.save(1, SMALL, {})
        store.wait()
        with monkeypatch.context() as patch:
            patch.setattr(layout, "write_chunk", dies)
            store.save(2, SMALL, {})
            with pytest.raises(CheckpointWriteError, match=r"step 2 .*was NOT saved"):
                store.wait()
        assert store.steps() == [1]
        store.save(2, SMALL, {})
        store.wait()
        assert store.steps() == [1, 2]


def test_chunk_that_was_not_written_stops_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that forgets a chunk cannot make a step: the checksums file is refused."""
    file_names = layout.ArrayRecord.file_names
    monkeypatch.setattr(layout.ArrayRecord, "file_names", lambda self: [*file_names(self), "c.9"])
    with CheckpointStore(tmp_path, asynchronous=False) as store:
        with pytest.raises(CheckpointWriteError, match=r"'params/w': 1 files were not written, the first is c\.9"):
            store.save(1, SMALL, {})
        assert store.steps() == []


def test_second_writer_is_refused_and_readers_disturb_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    write_chunk = layout.write_chunk

    def slow(*arguments: object) -> str:
        assert go_on.wait(30)
        return write_chunk(*arguments)

    with CheckpointStore(tmp_path) as store:
        store.save(1, SMALL, {})
        store.wait()
        monkeypatch.setattr(layout, "write_chunk", slow)
        store.save(2, SMALL, {})
        reader = CheckpointStore(tmp_path)
        assert reader.restore(ABSTRACT).step == 1
        with pytest.raises(CheckpointWriteError, match=f"another process is writing here: process {os.getpid()} on"):
            reader.open_for_writing()
        go_on.set()
        store.wait()
        assert reader.restore(ABSTRACT).step == 2, "opening a reader did not clean away the save under way"
    reader.save(3, SMALL, {})
    reader.close()
    assert reader.steps() == [1, 2, 3]


def test_leftovers_are_cleaned_at_the_next_open(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        store.save(1, SMALL, {})
    for name in ("00000002.orbax-checkpoint-tmp/arrays", "00000001.deleted", "notes", "00000002.backup"):
        (tmp_path / name).mkdir(parents=True)
    CheckpointStore(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"00000001", "00000002.backup", "notes", "writer.lock"}


def test_opening_creates_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "no" / "such")
    assert store.steps() == []
    with pytest.raises(CheckpointError, match="no checkpoint"):
        store.restore(ABSTRACT)
    store.close()
    assert list(tmp_path.iterdir()) == []
