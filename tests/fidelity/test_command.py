"""The command line: every command, its output and its exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.fidelity.common import tiny_folder

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, "-m", "mmx_jax.convert", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def test_check_of_the_released_model():
    """Issue 5, 4."""
    done = run("check", "--config", "configs/minimax_text_01.py")
    assert done.returncode == 0, done.stderr
    assert "8,243 of 8,243" in done.stdout
    assert "912,179,310,592 bytes" in done.stdout


@pytest.mark.full
def test_import_logits_export_diff(tmp_path):
    source, _ = tiny_folder(tmp_path / "source")
    done = run("import", "--source", source, "--checkpoint", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    np.save(tmp_path / "tokens.npy", tokens)
    for extra in ((), ("--decode",)):
        done = run("logits", "--checkpoint", tmp_path / "work", "--tokens", tmp_path / "tokens.npy", "--output",
                   tmp_path / f"logits{len(extra)}.npy", *extra)  # fmt: skip
        assert done.returncode == 0, done.stderr
    whole, stepwise = (np.load(tmp_path / f"logits{i}.npy") for i in (0, 1))
    assert whole.shape == (2, 6, 61)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole, stepwise, rtol=1e-4, atol=1e-5)
    done = run("export", "--checkpoint", tmp_path / "work", "--output", tmp_path / "out", "--format", "transformers",
               "--max-shard", "1MB")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Stock transformers rotates all 8 dims" in done.stdout.replace("\n", " ")
    done = run("diff", source, tmp_path / "out")
    assert done.returncode == 0, done.stdout
    assert "79 tensors bit-equal, 0 differ" in done.stdout


def test_what_cannot_work_is_said_in_one_line(tmp_path):
    source, _ = tiny_folder(tmp_path / "source")
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    done = run("import", "--source", source, "--checkpoint", tmp_path / "work")
    assert done.returncode == 2
    assert "config.json: model_type: is 'llama'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.full
def test_wrong_command_lines(tmp_path):
    done = run("import", "--source", tmp_path)
    assert done.returncode == 2
    assert "--checkpoint" in done.stderr
    assert run("nonsense").returncode == 2
