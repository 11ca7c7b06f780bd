"""Scores a checkpoint.

    python eval.py --checkpoint runs/quickstart
    python eval.py --checkpoint runs/quickstart --tasks held_out --stores books=data/books --max_tokens 100000

Prints a table for each task and writes <workdir>/evaluations/<step>.<task>.json.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from absl import app, flags
from rich.console import Console

from mmx_jax.checkpoint import CheckpointError
from mmx_jax.config import ConfigError, DataConfig, RunConfig, SourceConfig, StageConfig
from mmx_jax.config.overrides import fail_with
from mmx_jax.data import DataError
from mmx_jax.evaluation import EvalModel, find_tasks, result_table, write_result
from mmx_jax.inference.load import LoadError, load_for_inference

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run, its folder of checkpoints, or a single step.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to score; by default the newest good one.")
_TASKS = flags.DEFINE_string("tasks", "held_out", "Names of tasks, separated by commas.")
_STORES = flags.DEFINE_list("stores", None, "name=folder of token stores to score instead of the run's own.")
_SEQUENCE = flags.DEFINE_integer("sequence_length", None, "Longest context; by default training's.", lower_bound=1)
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", None, "Tokens per store; 0 scores all; by default the run's.", lower_bound=0
)
_BATCH = flags.DEFINE_integer("batch_size", None, "Rows of a batch; by default the run's.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the result files; by default <workdir>/evaluations.")


def with_flags(run: RunConfig, stage: StageConfig) -> tuple[RunConfig, StageConfig]:
    """The configuration with what the command line says.

    Raises:
      ConfigError: for a store without a name.
    """
    evaluation = run.evaluation
    if _MAX_TOKENS.value is not None:
        evaluation = replace(evaluation, max_tokens=_MAX_TOKENS.value or None)
    if _BATCH.value is not None:
        evaluation = replace(evaluation, batch_size=_BATCH.value)
    if _SEQUENCE.value is not None:
        stage = replace(stage, sequence_length=_SEQUENCE.value)
    if _STORES.value:
        pairs = [item.partition("=") for item in _STORES.value]
        if wrong := [name for name, _, folder in pairs if not (name and folder)]:
            raise ConfigError(f"--stores: {wrong[0]!r} must be name=folder, as in books=data/books")
        sources = tuple(SourceConfig(name=name, store=folder) for name, _, folder in pairs)
        stage = replace(stage, data=DataConfig(sources=sources))
    return replace(run, evaluation=evaluation), stage


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    try:
        if len(argv) > 1:
            raise ConfigError(f"unexpected argument {argv[1]!r}")
        tasks = find_tasks(_TASKS.value)
        if _CHECKPOINT.value is None:
            raise ConfigError("--checkpoint is missing: name a run's workdir, as in --checkpoint runs/quickstart")
        loaded = load_for_inference(_CHECKPOINT.value, _STEP.value)
        run, stage = with_flags(loaded.run, loaded.stage)
        model = EvalModel(loaded.model, loaded.params)
        folder = Path(_OUTPUT.value) if _OUTPUT.value else loaded.workdir / "evaluations"
        console = Console()
        for task in tasks:
            result = task.from_config(run, stage).run(model)
            path = folder / f"{loaded.step:08d}.{result.task}.json"
            console.print(result_table(result))
            write_result(result, loaded.summary(), path)
            console.print(f"written to {path}", soft_wrap=True)
    except (ConfigError, CheckpointError, DataError, LoadError, OSError) as error:
        return fail_with(error)
    return 0


if __name__ == "__main__":
    sys.exit(app.run(main))
