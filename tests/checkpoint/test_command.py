"""`python -m mmx_jax.checkpoint list|verify FOLDER`."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from mmx_jax.checkpoint import CheckpointStore


def run(*arguments: object) -> tuple[int, str]:
    command = [sys.executable, "-m", "mmx_jax.checkpoint", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    with CheckpointStore(tmp_path / "checkpoints") as store:
        store.save(7, {"w": jnp.zeros((1024, 256))}, {"progress": {"tokens": 4096}})
        store.save(8, {"w": jnp.zeros((1024, 256))}, {"progress": {"tokens": 8192}}, permanent=True)
    return tmp_path


def test_good_and_damaged_folder(workdir: Path) -> None:
    code, text = run("list", workdir)
    assert code == 0
    lines = [line.split() for line in text.splitlines()]
    assert [[line[0], *line[1:3], line[-2], line[-1]] for line in lines[1:]] == [
        ["7", "1.00", "MiB", "4096", "complete"],
        ["8", "1.00", "MiB", "8192", "permanent"],
    ]
    code, text = run("verify", workdir / "checkpoints")
    assert code == 0
    assert text.count("good, 1.00 MiB read") == 2
    file = workdir / "checkpoints/00000007/arrays/w/c.0.0"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    code, text = run("verify", workdir)
    assert code == 1
    assert "step 7: DAMAGED, 1 problem\n" in text
    assert f"array 'w', chunk (0, 0), {file}: CRC-32" in text
    assert "step 8: good" in text


def test_wrong_use(tmp_path: Path) -> None:
    code, text = run("list", tmp_path)
    assert code == 1
    assert "holds no checkpoint" in text
    code, text = run("remove", tmp_path)
    assert code == 2
    assert "usage" in text
