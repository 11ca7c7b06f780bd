"""Scores a checkpoint.

    python eval.py --checkpoint runs/quickstart
    python eval.py --checkpoint runs/quickstart --tasks held_out --stores books=data/books --max_tokens 100000

Prints a table for each task and writes <workdir>/evaluations/<step>.<task>.json; results with other settings stay, and
the new one is called <step>.<task>.2.json and so on.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from absl import app, flags
from rich.console import Console

from mmx_jax.checkpoint import CheckpointError
from mmx_jax.config import ConfigError, DataConfig, RunConfig, SourceConfig, StageConfig
from mmx_jax.config.command_line import fail_with, parse_flags
from mmx_jax.data import DataError, TokenizerError, TokenStore, check_store_vocabulary
from mmx_jax.evaluation import EvalModel, find_tasks, result_path, result_table, write_result
from mmx_jax.evaluation.held_out import unique_stores
from mmx_jax.inference.flags import define_checkpoint_flags
from mmx_jax.inference.load import Loaded, LoadError, load_for_inference, with_tokenizer


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this program."""
    define_checkpoint_flags(values)
    flags.DEFINE_string("tasks", "held_out", "Names of tasks, separated by commas.", flag_values=values)
    flags.DEFINE_list("stores", None, "name=folder of token stores to score, not the run's own.", flag_values=values)
    flags.DEFINE_string("output", None, "Folder of results; by default <workdir>/evaluations.", flag_values=values)
    for name, text, least in (
        ("sequence_length", "Longest context; by default training's.", 1),
        ("max_tokens", "Tokens per store; 0 scores all; by default the run's.", 0),
        ("batch_size", "Rows of a batch; by default the run's.", 1),
    ):
        flags.DEFINE_integer(name, None, text, lower_bound=least, flag_values=values)


def with_flags(options: flags.FlagValues, run: RunConfig, stage: StageConfig) -> tuple[RunConfig, StageConfig]:
    """The configuration with what the command line says.

    Raises:
      ConfigError: for a store without a name.
    """
    evaluation = run.evaluation
    if options.max_tokens is not None:
        evaluation = replace(evaluation, max_tokens=options.max_tokens or None)
    if options.batch_size is not None:
        evaluation = replace(evaluation, batch_size=options.batch_size)
    if options.sequence_length is not None:
        stage = replace(stage, sequence_length=options.sequence_length)
    if options.stores:
        pairs = [item.partition("=") for item in options.stores]
        if wrong := [name for name, _, folder in pairs if not (name and folder)]:
            raise ConfigError(f"--stores: {wrong[0]!r} must be name=folder, as in books=data/books")
        sources = tuple(SourceConfig(name=name, store=folder) for name, _, folder in pairs)
        stage = replace(stage, data=DataConfig(sources=sources))
    return replace(run, evaluation=evaluation), stage


def check_tokenizers(loaded: Loaded, stage: StageConfig) -> None:
    """Checks that the stores hold ids of the model's own tokenizer, as far as one is known.

    Raises:
      DataError: a store is missing or has another tokenizer.
    """
    try:
        _, tokenizer = with_tokenizer(loaded)
    except TokenizerError as error:
        print(f"warning: tokenizers are compared by size only: {error}", file=sys.stderr)
        return
    for _, folder in unique_stores(stage):
        check_store_vocabulary(TokenStore(folder, split="held_out"), loaded.model.vocab_size, tokenizer)


def score(options: flags.FlagValues) -> None:
    """Loads the model, runs the tasks, prints and writes their results."""
    tasks = find_tasks(options.tasks)
    if options.checkpoint is None:
        raise ConfigError("--checkpoint is missing: name a run's workdir, as in --checkpoint runs/quickstart")
    loaded = load_for_inference(options.checkpoint, options.step)
    run, stage = with_flags(options, loaded.run, loaded.stage)
    check_tokenizers(loaded, stage)
    model = EvalModel(loaded.model, loaded.params)
    folder = Path(options.output) if options.output else loaded.workdir / "evaluations"
    console = Console()
    for task in tasks:
        result = task.from_config(run, stage).run(model)
        path = result_path(folder, f"{loaded.step:08d}.{result.task}", result)
        console.print(result_table(result))
        write_result(result, loaded.summary(), path)
        console.print(f"written to {path}", soft_wrap=True)


def run(options: flags.FlagValues) -> int:
    """Runs the program with parsed flags; returns its exit code, and ends it when it cannot work."""
    try:
        score(options)
        return 0
    except (ConfigError, CheckpointError, DataError, LoadError, OSError) as error:
        return fail_with(error)


def main(argv: Sequence[str]) -> int:
    """Entry point after flags are parsed."""
    if len(argv) > 1:
        fail_with(ConfigError(f"unexpected argument {argv[1]!r}"))
    return run(flags.FLAGS)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main, flags_parser=parse_flags)
