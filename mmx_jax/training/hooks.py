"""What happens beside training: metrics file, TensorBoard, loss curve, profile, evaluation, giving up."""

import json
import logging
import math
import os
import time
from io import FileIO
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

from mmx_jax.evaluation import TaskResult
from mmx_jax.training.errors import NonFiniteError, WorkdirError
from mmx_jax.training.plot import plot_losses
from mmx_jax.training.session import Hook, Record, Session

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
LOSS_CURVE = "loss.png"


def read_lines(path: Path, last_update: int) -> list[Record]:
    """Records of a JSON-lines file up to an update.

    A half-written last line, as a killed run leaves it, is left out; so are damaged ones, which the log names.
    """
    if not path.is_file():
        return []
    *whole, _half = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(whole, start=1):
        try:
            record = json.loads(line)
            wanted = record["update"] <= last_update
        except (ValueError, TypeError, LookupError):
            log.warning("%s:%d: no record of an update; the line is left out", path, number)
            continue
        if wanted:
            records.append(record)
    return records


class JsonLines:
    """A file of JSON lines that goes on after a resume as if nothing had been written since the checkpoint."""

    def __init__(self, path: Path):
        self.path = path
        self._file: FileIO | None = None

    def open(self, last_update: int) -> None:
        """Keeps the records up to `last_update`, drops the rest, and opens the file to append.

        Raises:
          WorkdirError: the file cannot be written.
        """
        try:
            kept = read_lines(self.path, last_update)
            if self.path.is_file():
                replacement = self.path.with_suffix(".tmp")
                replacement.write_text("".join(_line(record) for record in kept))
                os.replace(replacement, self.path)
            self._file = FileIO(self.path, "a")  # (unbuffered: what is not written must not linger)
        except OSError as error:
            raise self._error(error) from error

    def append(self, record: Record) -> None:
        """Adds a record and hands it to the operating system at once.

        Raises:
          WorkdirError: the disk is full, or the file is gone.
        """
        assert self._file is not None
        try:
            line = _line(record).encode()
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _error(self, error: OSError) -> WorkdirError:
        return WorkdirError(f"{self.path}: cannot be written: {error.strerror or error}")


def _line(record: Record) -> str:
    return json.dumps(_finite(record)) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class MetricsFile(Hook):
    """metrics.jsonl: one object a step. evaluations.jsonl: one object for each time that held-out text was scored."""

    def __init__(self, workdir: Path):
        self.steps = JsonLines(workdir / METRICS_FILE)
        self.evaluations = JsonLines(workdir / EVALUATIONS_FILE)

    def start(self, session: Session) -> None:
        self.steps.open(session.progress.update)
        self.evaluations.open(session.progress.update)

    def record(self, session: Session, record: Record) -> None:
        self.steps.append(record)

    def evaluated(self, session: Session, result: TaskResult) -> None:
        progress = session.progress
        position = {
            "step": progress.step,
            "tokens": progress.tokens,
            "stage": progress.stage,
            "update": progress.update,
        }
        self.evaluations.append(position | {"held_out": {name: dict(group) for name, group in result.groups.items()}})

    def close(self) -> None:
        self.steps.close()
        self.evaluations.close()


class TensorBoard(Hook):
    """Scalars for TensorBoard under workdir/tensorboard."""

    def __init__(self, workdir: Path, every: int):
        self._folder = workdir / "tensorboard"
        self._every = every
        self._writer: SummaryWriter | None = None

    def start(self, session: Session) -> None:
        try:
            self._writer = SummaryWriter(str(self._folder), purge_step=session.progress.update + 1)
        except OSError as error:
            raise WorkdirError(f"{self._folder}: cannot be written: {error.strerror or error}") from error

    def record(self, session: Session, record: Record) -> None:
        if record["update"] % self._every:
            return
        self._write("train", record, record["update"])
        self._write("source_loss", record["source_loss"], record["update"])

    def evaluated(self, session: Session, result: TaskResult) -> None:
        for name, group in result.groups.items():
            self._write(f"held_out/{name}", dict(group), session.progress.update)

    def _write(self, prefix: str, values: Record, update: int) -> None:
        assert self._writer is not None
        for name, value in values.items():
            if isinstance(value, int | float) and name not in ("step", "update", "round"):
                self._writer.add_scalar(f"{prefix}/{name}", value, update)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class LossCurve(Hook):
    """loss.png: training loss over tokens, redrawn now and then and at the end."""

    SECONDS = 600.0

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._drawn = time.monotonic()

    def record(self, session: Session, record: Record) -> None:
        if time.monotonic() - self._drawn > self.SECONDS:
            self._draw(session)

    def finish(self, session: Session) -> None:
        self._draw(session)

    def _draw(self, session: Session) -> None:
        update = session.progress.update
        records = read_lines(self._workdir / METRICS_FILE, update)
        evaluations = read_lines(self._workdir / EVALUATIONS_FILE, update)
        path = self._workdir / LOSS_CURVE
        try:
            plot_losses(records, evaluations, path, title=session.config.name)
        except OSError as error:
            raise WorkdirError(f"{path}: cannot be written: {error.strerror or error}") from error
        self._drawn = time.monotonic()
        session.pause()


class NonFinite(Hook):
    """Ends the run when too many updates in a row had to be skipped, or at its end more than half of a stage's."""

    def record(self, session: Session, record: Record) -> None:
        in_a_row, limit = session.progress.skipped_in_a_row, session.stage.optimizer.max_skipped_steps
        if in_a_row > limit:
            sources = ", ".join(f"{name} {loss:.3g}" for name, loss in record["source_loss"].items())
            raise NonFiniteError(
                f"stage {record['stage']!r}, step {record['step']}: loss or gradients were not finite in {in_a_row} "
                f"updates in a row, max_skipped_steps is {limit}; loss by source: {sources}. The parameters are "
                f"those from before, the last checkpoint is good. Lower the learning rate, or look at the rows before "
                f"row {session.progress.row}"
            )

    def finish(self, session: Session) -> None:
        if not (in_a_row := session.progress.skipped_in_a_row):
            return
        if 2 * in_a_row > (steps := session.progress.step):
            raise NonFiniteError(
                f"stage {session.stage.name!r}: loss or gradients were not finite in its last {in_a_row} of {steps} "
                "updates; look at the learning rate, the model's settings and where it started"
            )
        log.warning("stage %r: its last %d updates were not finite and skipped", session.stage.name, in_a_row)


class Profile(Hook):
    """A profiler trace of some steps, under workdir/profile."""

    def __init__(self, workdir: Path, steps: tuple[int, int]):
        self._folder = workdir / "profile"
        self._first, self._last = steps
        self._running = False

    def start(self, session: Session) -> None:
        if self._first <= session.progress.step + 1 <= self._last:
            session.settle()
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def update(self, session: Session) -> None:
        if not self._running:
            self.start(session)
        elif session.progress.step >= self._last:
            jax.block_until_ready(session.state)
            self.close()

    def close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


class Evaluation(Hook):
    """Scores held-out text at the end of a stage, and every so many steps before."""

    def __init__(self, every: int | None):
        self._every = every

    def update(self, session: Session) -> None:
        if self._every and session.progress.step % self._every == 0 and not session.finished:
            session.evaluate()

    def finish(self, session: Session) -> None:
        session.evaluate()
