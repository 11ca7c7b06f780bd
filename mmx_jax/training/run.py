"""A whole run: data, mesh, where to start, the stages, the report."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from mmx_jax.checkpoint import CheckpointStore
from mmx_jax.checkpoint.store import steps_on_disk
from mmx_jax.config import MESH_AXES, RunConfig, StageConfig, to_dict
from mmx_jax.data import TokenStore, TrainingRows, check_store_vocabulary, held_out_batches
from mmx_jax.data.prepare import prepare
from mmx_jax.evaluation import TaskResult
from mmx_jax.model.trainable import check_trainable
from mmx_jax.training.batches import BatchFeed
from mmx_jax.training.checkpoints import CHECKPOINTS_FOLDER, Checkpoints, StopSignal
from mmx_jax.training.console import ConsoleLog
from mmx_jax.training.errors import CheckpointRefusedError, WorkdirError
from mmx_jax.training.hooks import (
    EVALUATIONS_FILE,
    Evaluation,
    LossCurve,
    MetricsFile,
    NonFinite,
    Profile,
    TensorBoard,
    read_lines,
)
from mmx_jax.training.loop import train
from mmx_jax.training.report import final_report
from mmx_jax.training.schedule import for_round
from mmx_jax.training.session import Hook, Session
from mmx_jax.training.stages import StageSetup, Start, first_start, next_start, resume
from mmx_jax.training.state import abstract_batch
from mmx_jax.training.step import make_train_step
from mmx_jax.training.tokenizers import UsedTokenizer, check_same_tokenizer, check_tokenizers, tokenizer_of_rows
from parallel import distributed
from parallel.connect import connect
from parallel.mesh import make_mesh

CONFIG_FILE = "config.json"


def run(config: RunConfig, console: Console | None = None) -> None:
    """Trains all stages of a run, or what is left of them, and prints what came out.

    Raises:
      ConfigError, MeshError, ShardingError, DataError, CheckpointError, TrainingError: each says what is wrong, where,
        and what would be right.
    """
    console = console or Console(quiet=jax.process_index() != 0)
    workdir = Path(config.workdir or f"runs/{config.name}")
    print_config(console, replace(config, workdir=str(workdir)))
    check_trainable(config)
    create_workdir(workdir)
    _use_compile_cache(workdir)
    prepare_data(config, console)
    check_tokenizers(config)
    mesh = make_mesh({axis: getattr(config.mesh, axis) for axis in MESH_AXES})
    connect(mesh)
    _say(console, f"devices: {mesh.size} x {jax.devices()[0].device_kind}; mesh {_mesh_line(mesh)}")
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        store = stack.enter_context(_open_store(workdir, config))
        start = _start(config, mesh, store, workdir)
        if start is None:
            _say(console, f"finished: nothing is left to train in {workdir}; see python eval.py --help")
            return
        if jax.process_index() == 0:
            write_json(workdir / CONFIG_FILE, to_dict(config))
        held_out = _train_stages(config, mesh, workdir, store, stop, start, console)
    if jax.process_index() == 0:
        final_report(console, config, config.stages[-1], str(workdir), held_out)


def _train_stages(
    config: RunConfig, mesh: jax.sharding.Mesh, workdir: Path, store: CheckpointStore, stop: StopSignal, start: Start,
    console: Console,
) -> TaskResult:  # fmt: skip
    """Trains from `start` to the end of the last stage; returns the last held-out figures."""
    while True:
        _say(console, start.reason)
        session = open_session(config, mesh, workdir, start)
        last = LastEvaluation()
        session.hooks = [*make_hooks(config, workdir, store, stop, console), last]
        train(session)
        if start.index + 1 == len(config.stages):
            assert last.result is not None
            return last.result
        source = session.stage.data.sources[0].store
        tokenizer = UsedTokenizer(session.tokenizer_sha256, source, f"stage {session.stage.name!r}")
        start = next_start(config, mesh, start.index + 1, session.state, session.progress, tokenizer)


class LastEvaluation(Hook):
    """Remembers the newest held-out figures."""

    result: TaskResult | None = None

    def evaluated(self, session: Session, result: TaskResult) -> None:
        self.result = result


def open_session(config: RunConfig, mesh: jax.sharding.Mesh, workdir: Path, start: Start) -> Session:
    """Everything that training a stage from `start` needs.

    Raises:
      DataError: a store is missing or damaged, holds nothing out, or its tokenizer does not fit the model.
      CheckpointRefusedError: the stage began with other rows.
      ConfigError: its rows have another tokenizer than its parameters.
      ShardingError: the batch does not divide by the mesh.
    """
    stage = config.stages[start.index]
    setup = StageSetup(config, stage, mesh)
    rows = open_rows(config, stage)
    if start.data_fingerprint is None:
        check_same_tokenizer(stage, start.tokenizer, tokenizer_of_rows(stage))
    else:
        check_same_rows(start, rows, stage.name)
    most = max(sequences for _, sequences in stage.batch.ramp) // stage.batch.micro_batch
    batch = abstract_batch(most, stage.batch.micro_batch, stage.sequence_length, mesh)
    return Session(
        config=config,
        stage=stage,
        schedule=for_round(stage.schedule, start.progress.round),
        mesh=mesh,
        workdir=workdir,
        state=start.state,
        progress=start.progress,
        feed=BatchFeed(rows, batch, start.progress.row),
        train_step=make_train_step(
            config.model, stage, setup.optimizer, setup.factors, setup.abstract, config.compiler
        ),
        data_fingerprint=rows.fingerprint,
        tokenizer_sha256=rows.tokenizer_sha256,
    )


def check_same_rows(start: Start, rows: TrainingRows, stage: str) -> None:
    """Checks that a stage which goes on reads the rows that it began with.

    Raises:
      CheckpointRefusedError: its token stores changed; names both tokenizers where these differ.
    """
    if start.data_fingerprint == rows.fingerprint:
        return
    changed, now = "its token stores changed since the checkpoint", rows.tokenizer_sha256
    if start.tokenizer is not None and start.tokenizer.sha256 != now:
        changed = (
            f"{rows.sources[0].store.folder} and its other token stores have the tokenizer of SHA-256 {now[:12]}..., "
            f"the checkpoint was trained with that of {start.tokenizer.sha256[:12]}...: ids mean other text"
        )
    raise CheckpointRefusedError(f"stage {stage!r}: {changed}; bring them back, or choose another --workdir")


def open_rows(config: RunConfig, stage: StageConfig) -> TrainingRows:
    """The stream of rows of a stage, checked against the model; its stores have held-out text to evaluate on."""
    rows = TrainingRows(stage.data, stage.sequence_length)
    for source in rows.sources:
        check_store_vocabulary(source.store, config.model.vocab_size)
        held_out_batches(TokenStore(source.store.folder, split="held_out"), stage.sequence_length, 1, max_tokens=1)
    return rows


def make_hooks(
    config: RunConfig, workdir: Path, store: CheckpointStore, stop: StopSignal, console: Console
) -> list[Hook]:
    """What happens beside training. The checkpoint is saved before the final evaluation, the curve drawn after it."""
    writing: list[Hook] = []
    if jax.process_index() == 0:
        every = config.logging.every_steps
        writing = [MetricsFile(workdir), ConsoleLog(console, every), TensorBoard(workdir, every)]
    hooks = [*writing, NonFinite()]
    if writing and config.logging.profile_steps is not None:
        hooks.append(Profile(workdir, config.logging.profile_steps))
    hooks += [Checkpoints(store, config.checkpoint.every_steps, stop), Evaluation(config.evaluation.every_steps)]
    return [*hooks, LossCurve(workdir)] if writing else hooks


def _start(config: RunConfig, mesh: jax.sharding.Mesh, store: CheckpointStore, workdir: Path) -> Start | None:
    steps = distributed.agree(lambda: steps_on_disk(store.folder))
    if not steps:
        return first_start(config, mesh)
    distributed.saved(steps[-1])
    newest = steps[-1]
    lines = (line["update"] for line in read_lines(workdir / EVALUATIONS_FILE, newest))
    return resume(config, mesh, store, reported=distributed.agree(lambda: newest in lines))


def _open_store(workdir: Path, config: RunConfig) -> CheckpointStore:
    keep = config.checkpoint
    store = CheckpointStore(
        workdir / CHECKPOINTS_FOLDER,
        keep_last=keep.keep_last,
        keep_every_steps=keep.keep_every_steps,
        on_saved=distributed.saved,
    )
    store.open_for_writing()
    return store


def prepare_data(config: RunConfig, console: Console) -> None:
    """Prepares the token stores that the stages ask for and that are not there yet; other processes wait."""
    wanted = dict.fromkeys(request for stage in config.stages for request in stage.data.prepare)
    if jax.process_index() == 0:
        for request in wanted:
            manifest = prepare(request, progress=console.is_terminal)
            tokens = manifest.splits["train"]["tokens"]
            _say(console, f"{request.output}: {tokens:,} training tokens")
    if wanted:
        distributed.barrier("data prepared")


def create_workdir(workdir: Path) -> None:
    """Creates the folder of the run and tries to write there.

    Raises:
      WorkdirError: that is not possible.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe-{jax.process_index()}-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise WorkdirError(
            f"{workdir}: cannot be written: {error.strerror or error}; choose another --workdir"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Writes a small file whole or not at all.

    Raises:
      WorkdirError: the disk is full, or the folder is gone.
    """
    partial = path.with_suffix(".tmp")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        raise WorkdirError(f"{path}: cannot be written: {error.strerror or error}") from error


def _use_compile_cache(workdir: Path) -> None:
    """Compiled steps are kept with the run, so that it resumes in seconds; JAX_COMPILATION_CACHE_DIR has precedence."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))


def print_config(console: Console, config: RunConfig) -> None:
    """Prints every setting, an object a line."""
    for line in config_lines("config", config):
        _say(console, line, style="dim")


def _say(console: Console, line: str, style: str = "none") -> None:
    """Prints a line as it is: names and paths may hold what rich takes for markup."""
    console.print(line, highlight=False, markup=False, soft_wrap=True, style=style)


def config_lines(name: str, value: Any) -> Iterator[str]:
    """`name: field=value ...` for a dataclass, then the same for the ones inside it."""
    plain, nested = [], []
    for field in fields(value):
        item = getattr(value, field.name)
        inner = list(enumerate(item)) if isinstance(item, tuple) else [(None, item)]
        if inner and all(hasattr(member, "__dataclass_fields__") for _, member in inner):
            for place, member in inner:
                nested.append((f"{name}.{field.name}" + ("" if place is None else f".{place}"), member))
        else:
            plain.append(f"{field.name}={_short(item)}")
    yield f"{name}: {' '.join(plain)}"
    for path, member in nested:
        yield from config_lines(path, member)


def _short(value: Any) -> str:
    """A value as text; equal neighbours in a list of names are counted."""
    if isinstance(value, tuple) and len(value) > 4 and all(isinstance(item, str) for item in value):
        runs = [(item, len(list(same))) for item, same in groupby(value)]
        return "(" + ", ".join(f"{count} x {item}" for item, count in runs) + ")"
    return repr(value)


def _mesh_line(mesh: jax.sharding.Mesh) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "of one device"
