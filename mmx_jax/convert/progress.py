"""A progress bar in bytes, with GB/s and the time that is left."""

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class ByteProgress:
    """Counts bytes from any thread; draws only on a terminal."""

    def __init__(self, label: str, total: int, shown: bool = True):
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[done]:.2f} of {task.fields[all]:.2f} GB"),
            TextColumn("{task.fields[rate]:.2f} GB/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not shown or not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=total, done=0.0, all=total / 1e9, rate=0.0)
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self.done = 0

    def __enter__(self) -> "ByteProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._start

    def add(self, nbytes: int) -> None:
        """Counts bytes that are done."""
        with self._lock:
            self.done += nbytes
        rate = self.done / 1e9 / max(self.seconds, 1e-9)
        self._bar.update(self._task, advance=nbytes, done=self.done / 1e9, rate=rate)
