"""The command line: every command, its output and its exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from mmx_jax.convert import import_weights
from tests.fidelity.common import tiny_folder

ROOT = Path(__file__).parents[2]

# Many command lines in one process: starting Python and JAX is what costs time.
DRIVER = """
import contextlib, io, json, sys
from absl import flags
from mmx_jax.convert import __main__ as program

def text():
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)

program.define_flags()
results = []
for line in json.load(sys.stdin):
    flags.FLAGS.unparse_flags()
    out, err = text(), text()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = program.main(program.parse_flags(["convert", *line]))
        except SystemExit as stopped:
            code = stopped.code
    results.append([code, *(stream.buffer.getvalue().decode() for stream in (out, err))])
print(json.dumps(results))
"""


def run(*arguments):
    command = [sys.executable, "-m", "mmx_jax.convert", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def run_all(*lines):
    """[(exit code, stdout, stderr)] of command lines."""
    done = subprocess.run([sys.executable, "-c", DRIVER], cwd=ROOT, capture_output=True, text=True, check=False,
                          timeout=300, input=json.dumps([list(map(str, line)) for line in lines]))  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_refused(cases):
    """Each (command line, words): exit code 2, one message with these words, no traceback."""
    for (line, words), (code, out, err) in zip(cases, run_all(*(line for line, _ in cases)), strict=True):
        assert code == 2, (line, out, err)
        assert "Traceback" not in err
        for word in words:
            assert word in err, (line, err)


def test_check_of_the_released_model():
    """Issue 5, 4."""
    done = run("check", "--config", "configs/minimax_text_01.py")
    assert done.returncode == 0, done.stderr
    assert "8,243 of 8,243" in done.stdout
    assert "912,179,310,592 bytes" in done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with `source`, the workdir `work` imported from it, and `tokens.npy`."""
    folder = tmp_path_factory.mktemp("command")
    source, _ = tiny_folder(folder / "source")
    import_weights(source, folder / "work", progress=False)
    np.save(folder / "tokens.npy", np.arange(12, dtype=np.int32).reshape(2, 6))
    return folder


def test_wrong_command_lines(work, tmp_path):
    """A flag that is unknown, of another command, given twice, empty or missing is named; so is its right place."""
    source, out = ("--source", work / "source"), ("--checkpoint", tmp_path / "new")
    assert_refused([
        ((), ("needs a command", "python -m mmx_jax.convert import")),
        (("nonsense",), ("no command 'nonsense'",)),
        (("import", *source), ("needs --checkpoint",)),
        (("import", *source, *out, "--sauce", "x"), ("sauce",)),
        (("import", *source, *out, "--format", "hub"), ("--format means nothing here; export takes it",)),
        (("import", *source, *out, "--tokenizer", "nowhere"), ("--tokenizer means nothing here; export takes it",)),
        (("import", *source, *out, "--nodecode"), ("--decode means nothing here; logits takes it",)),
        (("import", *source, *out, *source), ("--source is given 2 times",)),
        (("import", "--source", "", *out), ("--source is empty",)),
        (("import", *source, *out, "--dtype", "fp64"), ("dtype", "bf16")),
        (("import", *source, *out, "more"), ("takes no plain arguments", "'more'")),
        (("export", *out, "--config", "x"), ("--config means nothing here; check takes it",)),
        (("diff", "a"), ("takes 2 plain arguments",)),
        (("diff", "a", "b", *source), ("--source means nothing here; check and import take it",)),
        (("diff", "a", "b"), ("a: no such folder",)),
        (("diff", "a" * 5000, "b"), ("too long",)),
        (("check",), ("needs --config, --source or both",)),
        (("logits", *out, "--tokens", "t", "--output", "o", "--quantize", "int8"), ("--quantize", "import takes it")),
    ])  # fmt: skip
    assert not (tmp_path / "new").exists()


def test_exit_codes_of_comparisons(work, tmp_path):
    """0 equal, 1 compared and different, 2 not comparable."""
    other, tensors = tiny_folder(tmp_path / "other", shards=1)
    tensors["model.norm.weight"] += 1
    safetensors.numpy.save_file(tensors, other / "model.safetensors")
    lacking = dict(tensors)
    del lacking["lm_head.weight"]
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "config.json").write_bytes((other / "config.json").read_bytes())
    safetensors.numpy.save_file(lacking, tmp_path / "lacking" / "model.safetensors")
    lines = [("diff", work / "source", work / "work"), ("diff", work / "source", other),
             ("check", "--source", other), ("check", "--source", tmp_path / "lacking"),
             ("check", "--source", work / "work"), ("--help",)]  # fmt: skip
    codes, outs, errors = zip(*run_all(*lines))
    assert codes == (0, 1, 0, 1, 2, 0), errors
    assert "79 tensors bit-equal, 0 differ" in outs[0]
    assert "model.norm.weight: values, largest difference 1" in outs[1]
    assert "lm_head.weight: missing" in outs[3]


def test_sizes_and_outputs_that_cannot_be(work, tmp_path):
    """Said before the weights are read, and nothing is written."""
    logits = ("logits", "--checkpoint", work / "work", "--tokens", work / "tokens.npy", "--output")
    export = ("export", "--checkpoint", work / "work", "--output", tmp_path / "out", "--format", "hub")
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").write_text("theirs")
    assert_refused([
        ((*logits, tmp_path / "folder"), ("folder", "there already")),
        ((*logits, tmp_path / "full"), ("full", "there already")),
        ((*logits, work / "tokens.npy"), ("tokens.npy", "there already")),
        ((*logits, tmp_path / "none" / "out.npy"), ("out.npy", "No such file or directory")),
        ((*export, "--max-shard", "0.1"), ("0.1", "with its unit")),
        ((*export, "--max-shard", "0.1KB"), ("0.1KB", "at least 1MB")),
        ((*export, "--max-shard", ""), ("--max-shard is empty",)),
        ((*export, "--tokenizer", "nowhere"), ("nowhere", "no such folder")),
    ])  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "full"]
    assert (tmp_path / "full").read_text() == "theirs"


def npy(header, version=b"\x01\x00", data=b""):
    text = header.encode("latin-1") + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


FORGED = {
    "empty": b"",
    "text": b"1 2 3\n",
    "magic": b"\x93NUMPY",
    "version": npy("{}", b"\x09\x00"),
    "huge": npy("{'descr': '<i4', 'fortran_order': False, 'shape': (1000000, 1000000)}"),
    "larger": npy(f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({10**40}, 2)}}"),
    "negative": npy("{'descr': '<i4', 'fortran_order': False, 'shape': (-1, 2)}", data=bytes(8)),
    "objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1)}", data=bytes(8)),
    "code": npy("__import__('os').mkdir('ran')"),
    "brackets": npy("(" * 5000),
    "descr": npy("{'descr': [[[]]], 'fortran_order': False, 'shape': (1, 1)}"),
    "keys": npy("{'descr': '<i4'}"),
    "floats": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1)}", data=bytes(4)),
    "scalar": npy("{'descr': '<i4', 'fortran_order': False, 'shape': ()}", data=bytes(4)),
    "none": npy("{'descr': '<i4', 'fortran_order': False, 'shape': (0, 4)}"),
    "outside": npy("{'descr': '<i4', 'fortran_order': False, 'shape': (1, 1)}", data=(61).to_bytes(4, "little")),
}


def test_tokens_that_are_none(work, tmp_path):
    cases = []
    for name, data in FORGED.items():
        (tmp_path / f"{name}.npy").write_bytes(data)
        cases.append(tmp_path / f"{name}.npy")
    np.savez(tmp_path / "several.npz", a=np.zeros((1, 1), np.int32))
    os.mkfifo(tmp_path / "pipe.npy")
    cases += [tmp_path / name for name in ("several.npz", "pipe.npy", "missing.npy", "")]
    logits = ("logits", "--checkpoint", work / "work", "--output", tmp_path / "out.npy", "--tokens")
    assert_refused([((*logits, path), (path.name,)) for path in cases])
    assert not (tmp_path / "out.npy").exists()
    assert not (ROOT / "ran").exists()


def test_logits_are_in_the_file_that_was_named(work, tmp_path):
    """Also without .npy at its end; nothing else is left."""
    logits = ("logits", "--checkpoint", work / "work", "--tokens", work / "tokens.npy", "--output")
    ((code, _, error),) = run_all((*logits, tmp_path / "plain"))
    assert code == 0, error
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
    assert np.load(tmp_path / "plain").shape == (2, 6, 61)


def test_what_is_not_there_is_said_by_the_program_itself(tmp_path):
    """One line and no traceback from the real command, and so for a flag that nobody knows."""
    source, _ = tiny_folder(tmp_path / "source")
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    done = run("import", "--source", source, "--checkpoint", tmp_path / "work")
    assert done.returncode == 2
    assert 'config.json: model_type: is "llama"' in done.stderr
    assert "Traceback" not in done.stderr
    done = run("diff", "a", "b", "--sauce=x")
    assert done.returncode == 2
    assert "Unknown command line flag 'sauce'" in done.stderr


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
