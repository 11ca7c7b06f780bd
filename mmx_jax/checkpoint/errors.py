"""What can go wrong with a checkpoint, each error saying where, what, and what would be right."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a stored step: the file, and the array and chunk it holds where it holds one."""

    file: Path
    reason: str
    array: str | None = None
    chunk: tuple[int, ...] | None = None

    def __str__(self) -> str:
        place = f"{self.file}"
        if self.array is not None:
            place = f"array {self.array!r}" + (f", chunk {self.chunk}" if self.chunk is not None else "") + f", {place}"
        return f"{place}: {self.reason}"


class CheckpointError(Exception):
    """Base of every checkpoint error; the message names the folder, and the step where there is one."""

    def __init__(self, folder: Path, message: str, step: int | None = None):
        self.folder = folder
        self.step = step
        place = f"checkpoint folder {folder}" if step is None else f"checkpoint step {step} in {folder}"
        super().__init__(f"{place}: {message}")


class CheckpointNotFoundError(CheckpointError):
    """The step asked for, or any step at all, is not there."""


class CheckpointMismatchError(CheckpointError):
    """The stored arrays are not those asked for: another configuration, or another tree."""


class CheckpointWriteError(CheckpointError):
    """A save did not reach the disk; the step it was meant for is not listed."""


class CheckpointDamagedError(CheckpointError):
    """A stored step is incomplete or its bytes are not those that were saved; `problems` names them."""

    def __init__(self, folder: Path, step: int, problems: list[Problem]):
        self.problems = problems
        shown = "; ".join(str(problem) for problem in problems[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        super().__init__(folder, f"damaged: {shown}{more}", step)
