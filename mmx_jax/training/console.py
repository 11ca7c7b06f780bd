"""What a run says on the terminal while it trains."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from mmx_jax.evaluation import TaskResult
from mmx_jax.training.session import Hook, Record, Session


class ConsoleLog(Hook):
    """A line of figures every so many steps, and on a terminal a progress bar under them."""

    def __init__(self, console: Console, every: int):
        self._console = console
        self._every = every
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._started = time.monotonic()
        self._speed: float | None = None
        self._first = True

    def start(self, session: Session) -> None:
        self._started, self._first = time.monotonic(), True
        name = Text(session.stage.name, style="bold")  # (of any characters: never read as markup)
        self._console.print(name + Text(f": {_target(session)}; compiling the first step ...", style="none"))
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
            )
            self._bar = Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[eta]}"), console=self._console)
            self._task = self._bar.add_task(session.stage.name, total=session.schedule.tokens, eta="")
            self._bar.start()

    def record(self, session: Session, record: Record) -> None:
        if (speed := record["tokens_per_second"]) is not None:
            self._speed = speed if self._speed is None else 0.9 * self._speed + 0.1 * speed
        left = max(session.schedule.tokens - record["tokens"], 0)
        eta = f"{duration(left / self._speed)} left" if self._speed else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=min(record["tokens"], session.schedule.tokens), eta=eta)
        if self._first:
            self._console.print(f"first step after {time.monotonic() - self._started:.1f} s", highlight=False)
            self._first = False
        if record["step"] % self._every == 0 or not left:
            line = self._line(record, eta if self._bar is None else "", moe=bool(session.model.num_experts))
            self._console.print(line, highlight=False, soft_wrap=True)

    def _line(self, record: Record, eta: str, moe: bool) -> str:
        parts = [
            f"step {record['step']:>6,}",
            f"{record['tokens'] / 1e6:8.2f}M tokens",
            f"loss {record['loss']:.4f}",
            f"lr {record['learning_rate']:.2e}",
            f"grad norm {record['grad_norm']:.2f}",
        ]
        if moe:
            parts.append(f"drop {record['drop_rate']:.1%}  load {record['load_balance']:.2f}")
        if self._speed:
            parts.append(f"{self._speed:,.0f} tok/s")
        if record["mfu"] is not None:
            parts.append(f"MFU {record['mfu']:.1%}")
        if record["skipped"]:
            parts.append(f"[red]skipped {record['skipped']}[/red]")
        return "  ".join([*parts, eta] if eta else parts)

    def evaluated(self, session: Session, result: TaskResult) -> None:
        figures = result.groups["all"]
        self._console.print(
            f"held out after step {session.progress.step:,}: loss {figures['loss']:.4f}, "
            f"{figures['bits_per_byte']:.4f} bits per byte ({result.seconds:.1f} s)",
            highlight=False,
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _target(session: Session) -> str:
    budget, done = session.schedule.tokens, session.progress.tokens
    what = f"{budget:,} tokens" if not done else f"{done:,} of {budget:,} tokens done"
    return what + (f", round {session.progress.round}" if session.progress.round > 1 else "")


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
