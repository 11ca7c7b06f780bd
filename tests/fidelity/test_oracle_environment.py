"""What needs PyTorch and transformers themselves; run by `make test-full` where Python 3.11 can have them."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mmx_jax.convert import compute_logits, export_weights, import_weights, load_params, parse_config
from mmx_jax.convert.exporting import PATCH_FILE
from tests.fidelity.common import native_config, tiny_weights, write_folder
from tests.oracle import environment
from tests.oracle.weights import CASES

ORACLE = Path(__file__).parents[1] / "oracle"
REPEATABLE = 1e-6

MISSING = f"no Python 3.11 to make the oracle's environment from, and {environment.VARIABLE} names none"


def required_python():
    """The oracle's interpreter; where there is none, CI fails and a workplace skips."""
    found = environment.oracle_python()
    if found is None:
        # Hosted CI sets CI: there a skip would be a proof that nobody notices is gone.
        pytest.fail(MISSING) if os.environ.get("CI", "") not in ("", "false", "0") else pytest.skip(MISSING)
    return found


@pytest.fixture(scope="module")
def python():
    return required_python()


def generate(python, *arguments):
    command = [python, str(ORACLE / "generate.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), (None, pytest.skip.Exception)])
def test_without_an_oracle_ci_fails_and_a_workplace_skips(ci, outcome, monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    monkeypatch.setattr(environment, "FOLDER", Path("nowhere"))
    monkeypatch.delenv(environment.VARIABLE, raising=False)
    monkeypatch.delenv("CI", raising=False)
    if ci is not None:
        monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match=r"no Python 3\.11"):
        required_python()


@pytest.mark.full
def test_goldens_can_be_made_again(python, tmp_path):
    """The committed goldens are what the generator makes, within 1e-6 relative, choices exactly."""
    generate(python, "goldens", tmp_path)
    for name in CASES:
        with np.load(ORACLE / "goldens" / f"{name}.npz") as old, np.load(tmp_path / f"{name}.npz") as new:
            assert set(old) == set(new)
            for key in old:
                if old[key].dtype == np.uint8:
                    np.testing.assert_array_equal(old[key], new[key])
                    continue
                scale = max(np.abs(old[key]).max(), 1e-30)
                # Gradients add up many roundings whose order is the machine's.
                bar = 10 * REPEATABLE if key.startswith("grad/") else REPEATABLE
                assert np.abs(old[key].astype(np.float64) - new[key]).max() <= bar * scale, (name, key)


@pytest.mark.full
@pytest.mark.parametrize(("rotary_dim", "patched"), [(8, False), (4, True)])
def test_exported_folder_gives_the_logits_there(python, rotary_dim, patched, tmp_path):
    """Stock transformers where the whole head is rotated, else with the shipped patch; no word about keys."""
    config = native_config(rotary_dim=rotary_dim)

    tensors = tiny_weights(parse_config(config), seed=5)
    import_weights(write_folder(tmp_path / "source", config, tensors), tmp_path / "work", progress=False)
    folder = export_weights(tmp_path / "work", tmp_path / "out", "transformers", max_shard=100_000, progress=False)
    assert (folder / PATCH_FILE).is_file() == patched
    tokens = np.random.default_rng(6).integers(0, config["vocab_size"], (2, 300)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    words = generate(python, "logits", folder, tmp_path / "tokens.npy", tmp_path / "logits.npy")
    assert "MISSING" not in words
    assert "UNEXPECTED" not in words
    model, params = load_params(tmp_path / "work")

    ours = compute_logits(dataclasses.replace(model, compute_dtype="float32"), params, tokens)
    theirs = np.load(tmp_path / "logits.npy")
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    if patched:
        (folder / PATCH_FILE).unlink()
        generate(python, "logits", folder, tmp_path / "tokens.npy", tmp_path / "stock.npy")
        wrong = np.load(tmp_path / "stock.npy")
        assert np.abs(wrong - theirs).max() > 1e-2 * np.abs(theirs).max()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "minimax"
