"""SIGKILL at any moment, also inside a save: the run goes on and ends bit for bit as if nothing had happened."""

import random
import subprocess
import time
from pathlib import Path

import pytest

from mmx_jax.config import RunConfig
from tests.checkpoint.kill_points import Moment, kill_at
from tests.training import process

TIMEOUT = 120


def _wait_for_update(running: subprocess.Popen, workdir: Path, update: int) -> None:
    """Returns when metrics.jsonl has a line of this update or a later one."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        lines = process.metrics(workdir)
        if lines and lines[-1]["update"] >= update:
            return
        assert running.poll() is None, f"training ended with code {running.returncode} before update {update}"
        time.sleep(0.002)
    raise TimeoutError(f"update {update} did not come")


def _kill_between_saves(running: subprocess.Popen, workdir: Path, seed: int) -> None:
    """Kills some updates after the newest one written so far."""
    chance = random.Random(seed)
    lines = process.metrics(workdir)
    _wait_for_update(running, workdir, (lines[-1]["update"] if lines else 0) + chance.randrange(1, 3))
    time.sleep(chance.random() * 0.01)
    running.kill()
    running.wait()


def _finish(running: subprocess.Popen, workdir: Path) -> None:
    assert running.wait(TIMEOUT) == 0, Path(f"{workdir}.log").read_text()[-3000:]


def _terminate(running: subprocess.Popen, workdir: Path) -> None:
    """SIGTERM: the process saves at the next step and ends with the code that says so."""
    _wait_for_update(running, workdir, 1)
    running.terminate()
    assert running.wait(TIMEOUT) == 75, Path(f"{workdir}.log").read_text()[-3000:]


def _killed_run(config_file: Path, workdir: Path, moments: list[Moment | None]) -> list[Moment | None]:
    """Stops politely once, kills at each moment (None: between saves), lets the run end; returns what kills met."""
    met = []
    _terminate(process.start(config_file, workdir), workdir)
    for number, moment in enumerate(moments):
        running = process.start(config_file, workdir)
        if moment is None:
            _kill_between_saves(running, workdir, number)
            met.append(None)
        else:
            met.append(kill_at(running, workdir / "checkpoints", moment, timeout=TIMEOUT))
    _finish(process.start(config_file, workdir), workdir)
    return met


def _assert_ends_equal(tiny: RunConfig, folder: Path, moments: list[Moment | None], inside: int) -> None:
    config_file = process.write_config(tiny, folder / "tiny.py")
    calm, killed = folder / "calm", folder / "killed"
    _finish(process.start(config_file, calm), calm)
    met = _killed_run(config_file, killed, moments)
    assert sum(moment is not None for moment in met) >= inside, f"too few kills inside a save: {met}"
    assert process.metrics(killed) == process.metrics(calm)
    expected, found = process.arrays(calm), process.arrays(killed)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert "resuming from checkpoint" in Path(f"{killed}.log").read_text()


@pytest.mark.short
def test_five_kills_change_nothing(tiny: RunConfig, tmp_path: Path) -> None:
    """Two kills inside a save, three between, one SIGTERM; packing, a changing mixture and a batch ramp are on."""
    moments = [None, Moment.ARRAYS_WRITTEN, None, Moment.BEFORE_COMMIT, None]
    _assert_ends_equal(tiny, tmp_path, moments, inside=2)


@pytest.mark.full
def test_twenty_kills_change_nothing(tiny: RunConfig, tmp_path: Path) -> None:
    """Twelve kills inside a save, at every moment of it, eight between."""
    moments = [*Moment, None, None] * 3 + [None, None]
    _assert_ends_equal(tiny, tmp_path, moments, inside=8)
