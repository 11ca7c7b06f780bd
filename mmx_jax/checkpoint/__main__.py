"""Looks at a checkpoint folder from the shell; changes nothing in it and uses no accelerator.

python -m mmx_jax.checkpoint list FOLDER              one line a step: size, time, tokens, whether it is complete
python -m mmx_jax.checkpoint verify FOLDER            reads every byte of every step and names what is wrong
python -m mmx_jax.checkpoint verify FOLDER --step 120

FOLDER holds the steps (00000120, ...); a run's workdir with a `checkpoints` folder will do too.
Exit code: 0 when all is well, 1 when a step is damaged or incomplete or there is none, 2 for a wrong command line.
"""

import datetime
import sys
import time
from pathlib import Path

from absl import app, flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmx_jax.checkpoint import reader
from mmx_jax.checkpoint.errors import CheckpointDamagedError, Problem
from mmx_jax.checkpoint.store import step_folder_name, steps_on_disk
from mmx_jax.config.command_line import parse_flags

STEP = flags.DEFINE_integer("step", None, "verify only this step", lower_bound=0)


def _size(nbytes: int) -> str:
    """Bytes in words: "1.50 GiB"."""
    scale = min(4, max(0, nbytes.bit_length() - 1) // 10)
    return f"{nbytes / 1024**scale:.{2 if scale else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[scale]}"


def list_steps(folder: Path, console: Console) -> bool:
    """Prints a table of the steps; returns whether all are complete. Contents are not verified."""
    table = Table("step", "size", "saved at", "tokens", "state", box=None)
    complete = True
    for step in steps_on_disk(folder):
        path = folder / step_folder_name(step)
        saved = datetime.datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S")
        try:
            manifest = reader.read_manifest(path)
            problems = reader.missing_files(manifest)
        except CheckpointDamagedError as error:
            table.add_row(str(step), "", saved, "", f"damaged: {escape(str(error.problems[0]))}")
            complete = False
            continue
        state = (
            f"damaged: {escape(str(problems[0]))}" if problems else "permanent" if manifest.permanent else "complete"
        )
        tokens = manifest.metadata.get("progress", {}).get("tokens", "")
        table.add_row(str(step), _size(manifest.nbytes), saved, str(tokens), state)
        complete = complete and not problems
    console.print(table)
    return complete


def _problems(path: Path) -> tuple[list[Problem], int]:
    try:
        manifest = reader.read_manifest(path)
    except CheckpointDamagedError as error:
        return error.problems, 0
    return reader.verify_files(manifest), manifest.nbytes


def verify_steps(folder: Path, steps: list[int], console: Console) -> bool:
    """Reads every byte of some steps and prints what is wrong with each; returns whether all are good."""
    good = True
    for step in steps:
        start = time.monotonic()
        problems, nbytes = _problems(folder / step_folder_name(step))
        seconds = time.monotonic() - start
        if problems:
            console.print(f"step {step}: DAMAGED, {len(problems)} problem{'s'[: len(problems) != 1]}")
            for problem in problems:
                console.print(f"  {problem}", markup=False)
        else:
            console.print(f"step {step}: good, {_size(nbytes)} read in {seconds:.1f} s")
        good = good and not problems
    return good


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit code."""
    if len(argv) != 3 or argv[1] not in ("list", "verify"):
        print(f"usage:\n{__doc__}", file=sys.stderr)
        return 2
    console = Console(soft_wrap=True, highlight=False)
    folder = Path(argv[2])
    if not steps_on_disk(folder) and (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    steps = steps_on_disk(folder)
    if STEP.value is not None:
        steps = [step for step in steps if step == STEP.value]
    if not steps:
        wanted = "checkpoint" if STEP.value is None else f"checkpoint of step {STEP.value}"
        console.print(f"{folder} holds no {wanted}", markup=False)
        return 1
    good = list_steps(folder, console) if argv[1] == "list" else verify_steps(folder, steps, console)
    return 0 if good else 1


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
