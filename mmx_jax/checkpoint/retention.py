"""Which steps stay: the newest good ones, every so-many-th, and the permanent ones."""

from pathlib import Path

from absl import logging

from mmx_jax.checkpoint import reader
from mmx_jax.checkpoint.errors import CheckpointDamagedError, CheckpointError


class Retention:
    """Decides what may be deleted; a step goes only when `keep_last` newer good steps exist.

    A step counts as good when its JSON files verify and all its chunk files have their size, unless a restore in this
    process found wrong bytes in it. The step just saved always stays.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every_steps: int | None):
        if keep_last < 1:
            raise CheckpointError(folder, f"keep_last is {keep_last}; at least 1 step must be kept")
        if keep_every_steps is not None and keep_every_steps < 1:
            raise CheckpointError(folder, f"keep_every_steps is {keep_every_steps}; give a positive number or None")
        self._folder = folder
        self._keep_last = keep_last
        self._keep_every_steps = keep_every_steps
        self._newest: int | None = None
        self._good: dict[int, bool] = {}  # what was looked at already
        self._permanent: set[int] = set()

    def saved(self, step: int) -> None:
        """A step was saved whole."""
        self._newest = step
        self._good.pop(step, None)

    def found_damaged(self, step: int) -> None:
        """A step turned out to be damaged; it no longer counts, and may be saved again."""
        self._good[step] = False

    def is_good(self, step: int) -> bool:
        """Whether a step counts as good."""
        if step not in self._good:
            try:
                manifest = reader.read_manifest(self._folder / f"{step:08d}")
                self._permanent |= {step} if manifest.permanent else set()
                problems = reader.missing_files(manifest)
            except CheckpointDamagedError as error:
                problems = error.problems
            if problems:
                logging.error("checkpoint step %d in %s is damaged: %s", step, self._folder, problems[0])
            self._good[step] = not problems
        return self._good[step]

    def superseded(self, steps: list[int]) -> list[int]:
        """The steps that may be deleted, oldest first; `steps` are all there are."""
        newer_good, doomed = 0, []
        for step in sorted(steps, reverse=True):
            good = self.is_good(step)
            every = self._keep_every_steps is not None and step % self._keep_every_steps == 0
            kept = every or step == self._newest or step in self._permanent
            if newer_good >= self._keep_last and not kept:
                doomed.append(step)
            newer_good += good
        return doomed[::-1]
