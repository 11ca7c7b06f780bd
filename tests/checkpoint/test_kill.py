"""SIGKILL at any moment of a save leaves steps that are whole, and nothing else after the next open (Must show 4)."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mmx_jax.checkpoint import CheckpointStore
from tests.checkpoint import writer_process
from tests.checkpoint.kill_points import Moment, kill_after, kill_at

ROOT = Path(__file__).parents[2]


def _start(folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, writer_process.__file__, str(folder)], env=environment, cwd=ROOT)


def _check(folder: Path, at_least: int) -> int:
    """Every listed step is bit-equal to what its number says; returns the newest."""
    with CheckpointStore(folder) as store:
        left = {path.name for path in folder.iterdir() if path.is_dir()}
        assert left == {f"{step:08d}" for step in store.steps()}, "opening removes what the killed save left behind"
        for step in store.steps():
            restored = store.restore(writer_process.content(0), step)
            assert writer_process.same(restored.tree, writer_process.content(step))
            assert restored.metadata == {"tokens": step * 4096}
        newest = max(store.steps(), default=0)
    assert newest >= at_least, "a step that was listed once must not be lost"
    return newest


def _kill_and_check(folder: Path, moments: list[Moment | float]) -> None:
    newest = 0
    for moment in moments:
        process = _start(folder)
        try:
            if isinstance(moment, Moment):
                found = kill_at(process, folder, moment, from_step=newest + 2)
                assert found in (moment, None)
            else:
                kill_after(process, moment)
        finally:
            process.kill()
            process.wait()
        newest = _check(folder, newest)
    assert newest >= len([moment for moment in moments if isinstance(moment, Moment)])


@pytest.mark.short
def test_killed_inside_a_save_at_each_moment(tmp_path: Path) -> None:
    _kill_and_check(tmp_path, list(Moment))


@pytest.mark.full
def test_killed_twenty_times(tmp_path: Path) -> None:
    """Sixteen kills inside a save, four at each moment, and four at random."""
    order = random.Random(20)
    moments = [*list(Moment) * 4, *(order.uniform(2, 5) for _ in range(4))]
    order.shuffle(moments)
    _kill_and_check(tmp_path, moments)
