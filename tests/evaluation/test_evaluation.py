"""Scores of held-out text against a straightforward computation; tasks, results and the command."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from mmx_jax.config import ConfigError
from mmx_jax.data import Batch, DataError, TokenizerError, TokenStore
from mmx_jax.evaluation import TASKS, EvalModel, HeldOut, Task, TaskResult, find_tasks, result_table
from mmx_jax.evaluation.likelihood import token_log_probs, vocabulary_chunk
from tests.inference.trained import make_run
from tests.model.common import forward, random_params, rows, tiny


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("chunk", [1, 7, 50, 99, 100])
def test_chunks_of_the_vocabulary_give_the_whole_softmax(chunk):
    """Every chunk size, dividing the vocabulary or not, gives log softmax at the target; large logits are safe."""
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(2, 5, 8)) * 30, rng.normal(size=(8, 100))
    targets = rng.integers(0, 100, (2, 5))
    targets[0, :2] = 0, 99
    got = token_log_probs(*(jnp.asarray(x, jnp.float32) for x in (hidden, weight)), jnp.asarray(targets), chunk)
    want = np.take_along_axis(log_softmax(hidden @ weight), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


def test_logits_of_a_whole_vocabulary_never_exist():
    """INV-40: 200,064 fp32 logits a token would be the largest array by far; the program holds one chunk of them."""
    tokens, vocab_size = (8, 512), 200_064
    chunk = vocabulary_chunk(8 * 512, vocab_size)
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((*tokens, 16), jnp.bfloat16), ((16, vocab_size), jnp.float32), (tokens, jnp.int32))
    ]
    text = jax.jit(token_log_probs, static_argnums=3).lower(*shapes, chunk).as_text()
    assert f"8x512x{chunk}xf32" in text
    assert f"8x512x{vocab_size}" not in text
    assert 8 * 512 * chunk * 4 <= 256 * 2**20


def test_loglikelihood_of_packed_rows():
    """Each target's log-probability given the tokens of its own document before it."""
    config = tiny()
    params = random_params(config)
    tokens, positions, segments = rows(config, [[1] * 9 + [2] * 20 + [0] * 6, [0] * 5 + [1] * 30])
    targets = np.roll(tokens, -1, axis=1)
    logits, *_ = forward(config, params, tokens, positions, segments)
    batch = Batch(tokens=tokens, targets=targets, positions=positions, segment_ids=segments,
                  loss_mask=(segments != 0).astype(np.float32), source_id=segments * 0)  # fmt: skip
    got = EvalModel(config, params).loglikelihood(batch)
    want = np.take_along_axis(log_softmax(logits), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(got[segments != 0], want[segments != 0], atol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("evaluation"))


def score_by_hand(run, params, store, length):
    """Nats, tokens and bytes of a store's held-out text: every window of every document alone, all logits at once."""
    held_out = TokenStore(store, split="held_out")
    nats = tokens = size = 0
    for i in range(len(held_out)):
        document = np.asarray(held_out.tokens(i), np.int32)
        size += sum(int(held_out.tokenizer.piece_bytes[token]) for token in document[1:])
        for start in range(0, len(document) - 1, length):
            window, targets = document[start : start + length], document[start + 1 : start + length + 1]
            padded = np.zeros((1, length), np.int32)
            padded[0, : len(window)] = window
            segments = (np.arange(length) < len(window)).astype(np.int32)[None]
            logits, *_ = forward(run.model, params, padded, np.arange(length, dtype=np.int32)[None], segments)
            scores = log_softmax(logits[0])
            nats -= sum(scores[t, target] for t, target in enumerate(targets))
            tokens += len(targets)
    return nats, tokens, size


def test_held_out_scores(trained):
    """Loss, perplexity and bits per byte equal a computation document by document."""
    _, run, params = trained
    store = run.stages[0].data.sources[0].store
    nats, tokens, size = score_by_hand(run, params, store, 32)
    result = HeldOut(stores=(("texts", store),), sequence_length=32, batch_size=3).run(EvalModel(run.model, params))
    assert result.groups["texts"] == result.groups["all"]
    metrics = result.groups["texts"]
    assert (metrics["tokens"], metrics["bytes"]) == (tokens, size)
    assert metrics["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(np.exp(nats / tokens), rel=1e-4)
    assert metrics["bits_per_byte"] == pytest.approx(nats / np.log(2) / size, rel=1e-5)


def test_sources_are_scored_apart_and_together(trained):
    """ "all" weighs sources by their bytes; a limit on tokens holds for each."""
    _, run, params = trained
    store = run.stages[0].data.sources[0].store
    task = HeldOut(stores=(("a", store), ("b", store)), sequence_length=32, max_tokens=100)
    result = task.run(EvalModel(run.model, params))
    assert set(result.groups) == {"a", "b", "all"}
    assert result.groups["a"] == result.groups["b"]
    assert result.groups["all"]["bits_per_byte"] == pytest.approx(result.groups["a"]["bits_per_byte"])
    assert result.groups["all"]["tokens"] == 2 * result.groups["a"]["tokens"] <= 200


def test_stores_that_cannot_be_scored(trained, tmp_path):
    """A missing store, and a tokenizer that the model does not fit, are named."""
    _, run, params = trained
    store = run.stages[0].data.sources[0].store
    with pytest.raises(DataError, match="no token store here"):
        HeldOut(stores=(("x", str(tmp_path)),), sequence_length=8).run(EvalModel(run.model, params))
    other = tiny(vocab_size=50)
    with pytest.raises(TokenizerError, match="vocab_size"):
        HeldOut(stores=(("x", store),), sequence_length=8).run(EvalModel(other, random_params(other)))


def test_tasks_are_found_by_name():
    """An unknown name is refused with the list of those there are."""
    assert find_tasks(" held_out ,") == [HeldOut]
    assert all(issubclass(task, Task) for task in TASKS.values())
    with pytest.raises(ConfigError, match="unknown task 'mmlu'; there are held_out"):
        find_tasks("held_out,mmlu")
    with pytest.raises(ConfigError, match="there are held_out"):
        find_tasks(",")


def test_results_are_one_schema():
    """The same keys for every task; the table shows groups as rows and the sum last."""
    result = TaskResult("t", {"all": {"x": 1.5}, "a": {"x": 1.0, "n": 3}, "b": {"x": 2e9}}, {"k": 1}, 0.5)
    written = json.loads(json.dumps(result.to_json({"name": "m"})))
    assert list(written) == ["format", "model", "task", "groups", "settings", "seconds"]
    table = result_table(result)
    assert [list(column.cells) for column in table.columns] == [
        ["a", "b", "all"], ["1.0000", "2.000e+09", "1.5000"], ["3", "", ""],
    ]  # fmt: skip


def command(*arguments):
    """Runs eval.py in this process."""
    program = importlib.import_module("eval")
    options = flags.FlagValues()
    program.define_flags(options)
    options(["eval.py", *arguments])
    return program.run(options)


def test_the_command_prints_and_writes(trained, capsys):
    """A table on the terminal, a result file beside the checkpoints, by default of the newest step."""
    workdir, run, params = trained
    assert command(f"--checkpoint={workdir}") == 0
    assert "bits per byte" in capsys.readouterr().out
    written = json.loads((workdir / "evaluations" / "00000012.held_out.json").read_text())
    assert written["model"] == {
        "name": "small", "checkpoint": str(workdir / "checkpoints"), "step": 12, "stage": "pretrain", "tokens": 64,
    }  # fmt: skip
    model = dataclasses.replace(run.model, rope_base=500.0)
    direct = HeldOut.from_config(run, run.stages[0]).run(EvalModel(model, params))
    assert written["groups"]["texts"] == pytest.approx(direct.groups["texts"])


def test_results_of_other_settings_stay(trained, capsys, tmp_path):
    """The same settings replace their result, others get another name."""
    output = f"--output={tmp_path / 'results'}"
    for tokens in (40, 60, 40):
        assert command(f"--checkpoint={trained[0]}", f"--max_tokens={tokens}", output) == 0
    found = {path.name: json.loads(path.read_text())["settings"] for path in (tmp_path / "results").iterdir()}
    assert {name: settings["max_tokens"] for name, settings in found.items()} == {
        "00000012.held_out.json": 40, "00000012.held_out.2.json": 60,
    }  # fmt: skip


def test_a_store_of_another_tokenizer_is_refused(trained, tmp_path, capsys):
    """A vocabulary of the same size is not the same vocabulary."""
    workdir, run, _ = trained
    source = Path(run.stages[0].data.sources[0].store)
    other = tmp_path / "other"
    shutil.copytree(source, other)
    assert command(f"--checkpoint={workdir}", f"--stores=copy={other}", f"--output={tmp_path}") == 0
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit) as stopped:
        command(f"--checkpoint={workdir}", f"--stores=books={other}", f"--output={tmp_path / 'none'}")
    assert stopped.value.code == 2
    assert f"{other}: its tokenizer (SHA-256 000000000000...) is not the model's" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tasks=nope", "unknown task 'nope'"),
        ("", "--checkpoint is missing"),
        ("--checkpoint=/nowhere", "/nowhere: no such folder"),
        ("--checkpoint=WORK --step=3", "complete steps: 12"),
        ("--checkpoint=WORK --stores=texts", "'texts' must be name=folder"),
        ("--checkpoint=WORK --stores=a=/nowhere", "/nowhere: no token store here"),
    ],
)
def test_the_command_says_what_is_wrong(trained, capsys, arguments, message):
    """One line and exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        command(*arguments.replace("WORK", str(trained[0])).split())
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
