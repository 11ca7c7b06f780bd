"""Which steps stay, and that the last good one always does."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mmx_jax.checkpoint import CheckpointDamagedError, CheckpointError, CheckpointStore

TREE = {"params": {"w": jnp.arange(8.0)}}
ABSTRACT = {"params": {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}}


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, TREE, {})
    store.wait()


def break_step(folder: Path, step: int, *, size: bool = False) -> None:
    file = folder / f"{step:08d}/arrays/params.w/c.0"
    file.write_bytes(file.read_bytes()[: 8 if size else None][::-1])


def test_newest_every_nth_and_permanent_stay(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, keep_last=2, keep_every_steps=40) as store:
        store.save(0, TREE, {})
        save(store, 10)
        store.save(20, TREE, {}, permanent=True)
        save(store, 30, 40, 50, 60, 70)
        assert store.steps() == [0, 20, 40, 60, 70]
    with CheckpointStore(tmp_path, keep_last=1) as store:
        save(store, 80)
        assert store.steps() == [20, 80], "permanent is remembered in the step; the other rules are the store's"
    assert {path.name for path in tmp_path.iterdir()} == {"00000020", "00000080", "writer.lock"}


def test_damaged_steps_do_not_count(tmp_path: Path) -> None:
    """keep_last=1 with a newer step that is damaged: the good one stays until another good one exists."""
    with CheckpointStore(tmp_path, keep_last=9) as store:
        save(store, 10, 20, 30)
    break_step(tmp_path, 30)
    with CheckpointStore(tmp_path, keep_last=1) as store:
        assert store.restore(ABSTRACT).step == 20
        save(store, 25)
        assert store.steps() == [25, 30], "25 is the last good step, though 30 is newer by number"
        assert store.restore(ABSTRACT).step == 25
        save(store, 35)
        assert store.steps() == [35]


def test_steps_cut_short_do_not_count_even_when_nobody_restored(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, keep_last=9) as store:
        save(store, 10, 20, 30)
    break_step(tmp_path, 20, size=True)
    (tmp_path / "00000030/checksums.json").unlink()
    with CheckpointStore(tmp_path, keep_last=2) as store:
        save(store, 40)
        assert store.steps() == [10, 20, 40], "10 and 40 are the two newest good ones"
        save(store, 50)
        assert store.steps() == [40, 50]


def test_step_just_saved_stays(tmp_path: Path) -> None:
    """A run that went back to an older step keeps what it saves, whatever the numbers of the other branch."""
    with CheckpointStore(tmp_path, keep_last=1) as store:
        save(store, 100)
    with CheckpointStore(tmp_path, keep_last=1) as store:
        save(store, 50)
        assert store.steps() == [50, 100]


def test_flipped_permanent_step_is_not_deleted(tmp_path: Path) -> None:
    """What a person marked as permanent is theirs to delete: its other arrays may still be good."""
    with CheckpointStore(tmp_path, keep_last=1) as store:
        store.save(1, TREE, {}, permanent=True)
        save(store, 2)
        break_step(tmp_path, 1)
        with pytest.raises(CheckpointDamagedError):
            store.restore(ABSTRACT, 1)
        save(store, 3, 4)
        assert store.steps() == [1, 4]


@pytest.mark.parametrize(("option", "value"), [("keep_last", 0), ("keep_every_steps", 0)])
def test_impossible_values(tmp_path: Path, option: str, value: int) -> None:
    with pytest.raises(CheckpointError, match=f"{option} is 0"):
        CheckpointStore(tmp_path, **{option: value})
