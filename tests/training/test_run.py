"""Whole runs in this process: what they leave, how they go on, and what they refuse."""

import io
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mmx_jax.checkpoint import CheckpointStore
from mmx_jax.checkpoint.store import steps_on_disk
from mmx_jax.config import (
    BatchConfig,
    ConfigError,
    MeshConfig,
    OptimizerConfig,
    PrepareConfig,
    ReportConfig,
    RunConfig,
    ScheduleConfig,
    SchedulePhase,
    SourceConfig,
    StageConfig,
    TokenizerConfig,
    TrainableGroup,
    from_dict,
)
from mmx_jax.data import DataError, TokenStore, TrainingRows
from mmx_jax.data.prepare import prepare
from mmx_jax.training.errors import CheckpointRefusedError, Interrupted, NonFiniteError, WorkdirError
from mmx_jax.training.hooks import JsonLines
from mmx_jax.training.run import open_session, run
from mmx_jax.training.stages import first_start, resume
from mmx_jax.training.tokenizers import check_tokenizers
from parallel.mesh import MeshError, make_mesh
from parallel.sharding import ShardingError
from tests.training import process

LENGTH = 32
STABLE, DECAY = 8 * 8 * LENGTH, 4 * 8 * LENGTH
"""Tokens of the two parts of the schedule: 8 and 4 steps of 8 rows."""


@pytest.fixture(scope="module")
def short(tiny: RunConfig) -> RunConfig:
    """Twelve steps of eight rows over eight devices, the last four in the decay; goes on when it is started again."""
    phases = (SchedulePhase(until_tokens=STABLE, learning_rate=1e-2),
              SchedulePhase(until_tokens=STABLE + DECAY, learning_rate=1e-3, shape="linear"))  # fmt: skip
    stage = replace(
        tiny.stages[0],
        batch=BatchConfig(micro_batch=8, ramp=((0, 8),)),
        schedule=ScheduleConfig(phases=phases, warmup_steps=2),
    )
    report = ReportConfig(
        baselines=True, prompts=("one two",), max_new_tokens=3, continue_finished=True, next_commands=("see {workdir}",)
    )
    return replace(tiny, stages=(stage,), mesh=MeshConfig(fsdp=-1), report=report)


def _run(config: RunConfig, workdir: Path) -> str:
    """Runs and returns what it printed."""
    text = io.StringIO()
    run(replace(config, workdir=str(workdir)), Console(file=text, width=150))
    return text.getvalue()


def _interrupted(config: RunConfig, workdir: Path, update: int) -> None:
    """Runs until SIGTERM comes after an update; the run must end by saying so."""

    def send() -> None:
        while not any(line["update"] >= update for line in process.metrics(workdir)):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    with pytest.raises(Interrupted, match=r"SIGTERM: saved step .* the same command goes on") as stopped:
        _run(config, workdir)
    sender.join()
    assert stopped.value.exit_code == 75


@pytest.fixture(scope="module")
def two_rounds(short: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A workdir after a run and a second start of it, with what both printed."""
    workdir = tmp_path_factory.mktemp("run") / "work [/red]"  # (what rich takes for markup is printed as it is)
    return workdir, _run(short, workdir), _run(short, workdir)


def test_a_run_leaves_figures_curve_and_report(two_rounds: tuple[Path, str, str], short: RunConfig) -> None:
    workdir, first, _ = two_rounds
    lines = process.metrics(workdir)[:12]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["tokens"] for line in lines] == [8 * LENGTH * step for step in range(1, 13)]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5, "twelve steps learn something"
    assert {"aux_loss", "grad_norm", "learning_rate", "drop_rate", "load_balance", "source_loss"} <= set(lines[0])
    assert len(lines[0]["load_balance_by_layer"]) == short.model.num_layers
    assert from_dict(json.loads((workdir / "config.json").read_text())).model == short.model
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").glob("events*"))
    evaluation = json.loads((workdir / "evaluations.jsonl").read_text().splitlines()[0])
    bits = evaluation["held_out"]["all"]["bits_per_byte"]
    printed = first.splitlines()
    assert f"held-out bits per byte: {bits:.4f}" in printed
    for name in ("xz -9", "bigram", "unigram", "loss curve: ", "one two", f"see {workdir}"):
        assert any(name in line for line in printed[-20:]), f"the report must show {name!r}"
    assert any("model: vocab_size=320" in line for line in printed), "the resolved configuration is printed"


def test_a_finished_run_goes_on_before_the_decay(two_rounds: tuple[Path, str, str]) -> None:
    """The second start says so, restores step 8, and trains one more budget with a decay as long as the first."""
    workdir, _, second = two_rounds
    assert "finished before: going on from checkpoint 8, before the decay, for one more budget" in second
    lines = process.metrics(workdir)
    later = [line for line in lines if line["round"] == 2]
    assert [line["update"] for line in lines] == list(range(1, len(lines) + 1))
    assert [line["tokens"] // (8 * LENGTH) for line in later] == list(range(9, 21))
    rates = [round(line["learning_rate"], 9) for line in later]
    assert rates[:9] == [0.01] * 9
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert lines[7]["source_loss"].keys() <= {"letters", "numbers"}
    store = CheckpointStore(workdir / "checkpoints")
    marks = {step: store.metadata(step)["before_decay"] for step in store.steps()}
    assert marks[8]
    assert marks[20], "the start of each decay stays, whatever keep_last says"
    metadata = store.metadata(24)
    assert metadata["progress"]["round"] == 2
    assert metadata["finished"]
    assert metadata["code_version"]


def test_a_finished_run_that_may_not_go_on_says_so(short: RunConfig, two_rounds: tuple[Path, str, str]) -> None:
    workdir, _, _ = two_rounds
    before = process.metrics(workdir)
    said = _run(replace(short, report=ReportConfig()), workdir)
    assert "nothing is left to train" in said
    assert process.metrics(workdir) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: replace(c, seed=1), "seed was 0, now it is 1"),
        (lambda c: replace(c, model=replace(c.model, rotary_dim=2)), "model.rotary_dim was 4, now it is 2"),
        (
            lambda c: replace(c, stages=(replace(c.stages[0], optimizer=OptimizerConfig(b2=0.99)),)),
            r"stages.0.optimizer.b2 was 0.95, now it is 0.99",
        ),
        (lambda c: replace(c, stages=(replace(c.stages[0], name="other"),)), "of a stage 'pretrain'"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(
    short: RunConfig, two_rounds: tuple[Path, str, str], change: Callable[[RunConfig], RunConfig], words: str
) -> None:
    """The first key that differs is named, and nothing is touched."""
    workdir, _, _ = two_rounds
    before = process.metrics(workdir)
    with pytest.raises(CheckpointRefusedError, match=words):
        _run(change(short), workdir)
    assert process.metrics(workdir) == before


def test_other_data_is_refused(
    short: RunConfig, two_rounds: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same folder with other contents has another fingerprint."""
    monkeypatch.setattr(TrainingRows, "fingerprint", "another")
    with pytest.raises(CheckpointRefusedError, match="token stores changed since the checkpoint"):
        _run(short, two_rounds[0])


def test_another_tokenizer_is_refused(short: RunConfig, two_rounds: tuple[Path, str, str]) -> None:
    """Checkpoints hold the digest of the tokenizer; a run does not go on with another one, and both are named."""
    workdir, _, _ = two_rounds
    sources = short.stages[0].data.sources
    digest = TokenStore(sources[0].store).manifest.tokenizer["sha256"]
    assert CheckpointStore(workdir / "checkpoints").metadata(24)["tokenizer_sha256"] == digest
    kept = {path: path.read_text() for path in (Path(source.store) / "manifest.json" for source in sources)}
    try:
        for path, text in kept.items():
            path.write_text(text.replace(digest, 64 * "0"))
        words = rf"SHA-256 0{{12}}\.\.\., the checkpoint was trained with that of {digest[:12]}\.\.\."
        with pytest.raises(CheckpointRefusedError, match=words):
            _run(short, workdir)
    finally:
        for path, text in kept.items():
            path.write_text(text)


def test_a_damaged_checkpoint_costs_only_the_steps_after_the_one_before(
    short: RunConfig, two_rounds: tuple[Path, str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One flipped bit in the newest step: it is named and passed over, and the same state is reached again."""
    original, workdir = two_rounds[0], tmp_path / "work"
    shutil.copytree(original, workdir)
    (workdir / "evaluations.jsonl").unlink()  # as if the end had not been reported
    damaged = workdir / "checkpoints/00000024/arrays/params.head/c.0.0"
    content = bytearray(damaged.read_bytes())
    content[7] ^= 4
    damaged.write_bytes(content)
    assert "resuming from checkpoint 20: stage 'pretrain', step 16" in _run(short, workdir)
    assert "params/head" in caplog.text
    assert process.arrays(workdir) == process.arrays(original)
    assert process.metrics(workdir) == process.metrics(original)


def test_a_finished_run_goes_on_from_another_step_when_the_one_before_the_decay_is_damaged(
    short: RunConfig, two_rounds: tuple[Path, str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The next good step before a decay takes its place, never one from within; without any, the way out is named."""
    workdir = tmp_path / "work"
    shutil.copytree(two_rounds[0], workdir)
    store, mesh = CheckpointStore(workdir / "checkpoints"), make_mesh({"fsdp": -1})
    before_decay = [step for step in steps_on_disk(store.folder) if store.metadata(step)["before_decay"]]
    assert len(before_decay) == 2
    for step in reversed(before_decay):
        start = resume(short, mesh, store, reported=True)
        assert start is not None
        assert f"going on from checkpoint {step}, before the decay" in start.reason
        assert (start.progress.round, start.progress.update) == (3, 24)
        assert start.progress.row == store.metadata(step)["progress"]["row"]
        damaged = store.folder / f"{step:08}/arrays/params.head/c.0.0"
        damaged.write_bytes(bytes(len(damaged.read_bytes())))
    with pytest.raises(CheckpointRefusedError, match=r"no step from before its decay.*continue_finished=False"):
        resume(short, mesh, store, reported=True)
    assert "params/head" in caplog.text


@pytest.fixture(scope="module")
def staged(short: RunConfig) -> RunConfig:
    """Two stages: all of the model on 32 tokens, then the head alone on 16, with a fresh optimizer."""
    first = replace(
        short.stages[0], schedule=ScheduleConfig(phases=(SchedulePhase(until_tokens=STABLE // 2, learning_rate=1e-2),))
    )
    second = replace(
        first, name="head", sequence_length=16, keep=("params", "step", "data"), rope_base=100.0,
        trainable=(TrainableGroup(pattern="head"),),
    )  # fmt: skip
    return replace(short, stages=(first, second), report=ReportConfig())


def test_stages_follow_each_other_and_resume_where_they_were(staged: RunConfig, tmp_path: Path) -> None:
    """Hand-over keeps what it says; a run stopped in its second stage ends bit-equal to one that was not."""
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    said = _run(staged, calm)
    assert "stage 'head' after stage 'pretrain', keeping params, step, data" in said
    _interrupted(staged, stopped, update=7)
    assert "resuming from checkpoint" in _run(staged, stopped)
    lines = process.metrics(calm)
    assert [line["stage"] for line in lines] == ["pretrain"] * 4 + ["head"] * 8
    assert [line["step"] for line in lines] == list(range(1, 13)), "the step was kept: no second warm-up"
    assert lines[4]["tokens"] == 8 * 16, "tokens are those of the stage"
    assert process.metrics(stopped) == lines
    assert process.arrays(stopped) == process.arrays(calm)
    progress = CheckpointStore(calm / "checkpoints").metadata(12)["progress"]
    assert progress["row"] == 2 * 4 * 8 + 8 * 8, "rows of half the length, from the same tokens on"


def test_a_stage_starts_from_another_run(staged: RunConfig, two_rounds: tuple[Path, str, str], tmp_path: Path) -> None:
    """init_from takes parameters and nothing else when keep says so; frozen ones are still those of the other run."""
    source = two_rounds[0]
    stage = replace(staged.stages[1], init_from=str(source), keep=("params",))
    said = _run(replace(staged, stages=(stage,)), tmp_path / "work")
    assert f"starting from {source}" in said
    assert process.metrics(tmp_path / "work")[0]["step"] == 1
    frozen = "params.embedding"
    theirs = {k.partition("/")[2]: v for k, v in process.arrays(source).items() if frozen in k}
    ours = {k.partition("/")[2]: v for k, v in process.arrays(tmp_path / "work").items() if frozen in k}
    assert ours == theirs


@pytest.fixture(scope="module")
def foreign(stores: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A token store of the same text under a tokenizer of its own."""
    folder = str(tmp_path_factory.mktemp("foreign") / "store")
    inputs = (str(Path(stores[0]).parent / "letters"),)
    tokenizer = TokenizerConfig(vocab_size=300)
    prepare(
        PrepareConfig(inputs=inputs, output=folder, tokenizer=tokenizer, held_out_fraction=0.2, processes=1),
        progress=False,
    )
    return folder


def _reading(stage: StageConfig, store: str, **changes: object) -> StageConfig:
    """The stage on another token store."""
    sources = (SourceConfig(name="foreign", store=store),)
    return replace(stage, data=replace(stage.data, sources=sources), **changes)


def test_a_later_stage_on_another_tokenizer_is_refused_before_the_first_is_trained(
    staged: RunConfig, foreign: str, tmp_path: Path
) -> None:
    """Both files are named, and what would be right; nothing is trained."""
    first, second = staged.stages[0], _reading(staged.stages[1], foreign)
    theirs = first.data.sources[0].store
    words = (
        rf"stage 'head': .* tokenizer {foreign}/tokenizer\.model .* stage 'pretrain', trained with {theirs}/tokenizer"
    )
    with pytest.raises(ConfigError, match=words) as refusal:
        _run(replace(staged, stages=(first, second)), tmp_path / "work")
    assert f"--tokenizer {theirs}" in str(refusal.value)
    assert "other_tokenizer=True" in str(refusal.value)
    assert not process.metrics(tmp_path / "work")
    without = replace(second, keep=())
    check_tokenizers(replace(staged, stages=(first, without)))  # random weights know no tokenizer


def test_a_stage_from_a_run_with_another_tokenizer_is_refused(
    staged: RunConfig, two_rounds: tuple[Path, str, str], foreign: str, tmp_path: Path
) -> None:
    """init_from: refused at the start and where the stage opens; allowed where the stage says that it is meant."""
    source = two_rounds[0]
    stage = _reading(staged.stages[1], foreign, init_from=str(source), keep=("params",))
    config, mesh = replace(staged, stages=(stage,)), make_mesh({"fsdp": -1})
    words = (
        rf"{foreign}/tokenizer\.model .*step 24 in {re.escape(str(source))}/checkpoints, trained with .*letters_store"
    )
    with pytest.raises(ConfigError, match=words):
        _run(config, tmp_path / "work")
    with pytest.raises(ConfigError, match=words):
        open_session(config, mesh, tmp_path, first_start(config, mesh))
    meant = replace(config, stages=(replace(stage, other_tokenizer=True),))
    assert f"starting from {source}" in _run(meant, tmp_path / "work")


def test_a_stage_that_keeps_an_optimizer_of_other_parameters_is_refused(staged: RunConfig, tmp_path: Path) -> None:
    stages = (staged.stages[0], replace(staged.stages[1], keep=("params", "optimizer")))
    with pytest.raises(ConfigError, match="leave 'optimizer' out of its keep"):
        _run(replace(staged, stages=stages), tmp_path)


def test_a_run_that_blows_up_ends(short: RunConfig, tmp_path: Path) -> None:
    """Updates that are not finite are skipped and counted; after max_skipped_steps in a row the run ends (code 70)."""
    stage = replace(
        short.stages[0],
        schedule=ScheduleConfig(phases=(SchedulePhase(until_tokens=10**6, learning_rate=1e30),), warmup_steps=0),
        optimizer=OptimizerConfig(max_skipped_steps=2),
    )
    with pytest.raises(NonFiniteError, match=r"not finite in 3 updates in a row, max_skipped_steps is 2") as error:
        _run(replace(short, stages=(stage,)), tmp_path)
    assert error.value.exit_code == 70
    lines = process.metrics(tmp_path)
    assert [line["skipped"] for line in lines[-3:]] == [1, 2, 3]
    assert lines[-1]["grad_norm"] is None, "JSON has no NaN"


def test_a_run_that_ends_in_nonsense_is_no_success(short: RunConfig, tmp_path: Path) -> None:
    """One update far too large, the others skipped: the run is not finished, however often it is started again."""
    phase = SchedulePhase(until_tokens=3 * 8 * LENGTH, learning_rate=1e38)
    stage = replace(short.stages[0], schedule=ScheduleConfig(phases=(phase,), warmup_steps=0))
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="not finite in its last 2 of 3 updates"):
            _run(replace(short, stages=(stage,)), tmp_path)
    assert not (tmp_path / "evaluations.jsonl").read_text()


def test_pattern_of_a_later_stage_is_checked_first(staged: RunConfig, tmp_path: Path) -> None:
    second = replace(staged.stages[1], trainable=(TrainableGroup(pattern="hed"),))
    with pytest.raises(ConfigError, match="stage 'head': trainable: pattern 'hed' matches no parameter"):
        _run(replace(staged, stages=(staged.stages[0], second)), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_input_that_cannot_work_is_named_before_training(short: RunConfig, tmp_path: Path) -> None:
    """Missing corpus or store, a vocabulary too small for the tokenizer, sizes that do not divide the mesh."""
    stage = short.stages[0]
    missing = PrepareConfig(inputs=(str(tmp_path / "nothing"),), output=str(tmp_path / "store"))
    source = replace(stage.data.sources[0], store=str(tmp_path / "none"))
    cases: list[tuple[RunConfig, type[Exception], str]] = [
        (_with(short, data=replace(stage.data, prepare=(missing,))), DataError, "nothing"),
        (_with(short, data=replace(stage.data, sources=(source,))), DataError, "no token store here"),
        (replace(short, model=replace(short.model, vocab_size=256)), DataError, "256"),
        (replace(short, mesh=MeshConfig(data=3, fsdp=1)), MeshError, "needs 3 devices, there are 8"),
        (replace(short, mesh=MeshConfig(data=3)), MeshError, "'fsdp' cannot be filled: 8 devices"),
        (_with(short, batch=BatchConfig(micro_batch=4, ramp=((0, 4),))), ShardingError, "size 4"),
        (_with(short, trainable=(TrainableGroup(pattern="hed"),)), ConfigError, "'hed' matches no parameter"),
    ]
    for number, (config, kind, words) in enumerate(cases):
        with pytest.raises(kind, match=words):
            _run(config, tmp_path / f"work{number}")


def _with(config: RunConfig, **changes: object) -> RunConfig:
    return replace(config, stages=(replace(config.stages[0], **changes),))


def test_a_workdir_that_cannot_be_written(short: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file" / "work", Path("/proc/work")):
        with pytest.raises(WorkdirError, match=f"{workdir}: cannot be written: .*choose another --workdir") as error:
            _run(short, workdir)
        assert error.value.exit_code == 74


def test_a_disk_that_fills_up_while_logging(tmp_path: Path) -> None:
    """The line that does not fit ends the run; nothing pretends to have been written."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.open(last_update=0)
    with pytest.raises(WorkdirError, match=r"metrics.jsonl: cannot be written: No space left on device"):
        file.append({"update": 1})
    file.close()


def test_metrics_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    """Lines after the checkpoint, and a line that a kill cut in half, are gone when the run resumes."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1, "loss": 2.0}\n{"update": 2, "loss": 1.5}\n{"update": 3, "lo')
    file = JsonLines(path)
    file.open(last_update=1)
    file.append({"update": 2, "loss": float("nan")})
    file.close()
    assert path.read_text() == '{"update": 1, "loss": 2.0}\n{"update": 2, "loss": null}\n'
