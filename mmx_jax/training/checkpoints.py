"""When a run saves, and what it writes beside the arrays."""

import signal
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from mmx_jax.checkpoint import CheckpointStore
from mmx_jax.config import to_dict
from mmx_jax.training.errors import Interrupted, NonFiniteError
from mmx_jax.training.schedule import decay_start
from mmx_jax.training.session import Hook, Session
from mmx_jax.training.state import TrainState, all_finite

CHECKPOINTS_FOLDER = "checkpoints"


class StopSignal:
    """Notices SIGTERM and Ctrl-C, to stop at the next step boundary; a second Ctrl-C stops at once.

    In a multi-process run JAX's own preemption notice counts, on which all processes agree; it comes from SIGTERM to
    any of them (`parallel.guard` makes Ctrl-C one).
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name

    def received(self, update: int) -> str | None:
        """Name of the signal that arrived, or None; all processes get the same answer for the same update."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(update):
            return "SIGTERM"
        return self._received


class Checkpoints(Hook):
    """Saves every so many steps, where the final decay begins, at the end, and when the run is asked to stop."""

    def __init__(self, store: CheckpointStore, every: int, stop: StopSignal):
        self._store = store
        self._every = every
        self._stop = stop
        self._tokens_before = 0
        self._saved_update = 0

    def start(self, session: Session) -> None:
        self._tokens_before = session.progress.tokens
        self._saved_update = session.progress.update

    def update(self, session: Session) -> None:
        self._store.check()
        decay = decay_start(session.schedule)
        at_decay = self._tokens_before < decay <= session.progress.tokens
        self._tokens_before = session.progress.tokens
        if at_decay or (session.progress.step % self._every == 0 and not session.finished):
            self._save(session, before_decay=at_decay)
        if name := self._stop.received(session.progress.update):
            self._save(session)
            self._store.wait()
            raise Interrupted(
                f"{name}: saved step {session.progress.step:,} of stage {session.stage.name!r} in "
                f"{self._store.folder}; the same command goes on from there"
            )

    def finish(self, session: Session) -> None:
        self._save(session)
        self._store.wait()

    def _save(self, session: Session, before_decay: bool = False) -> None:
        session.settle()
        update = session.progress.update
        if update == self._saved_update:
            return
        if not all_finite(session.state):
            raise NonFiniteError(
                f"stage {session.stage.name!r}, step {session.progress.step}: parameters or moments are not finite; "
                "nothing was saved, the last checkpoint is good. Lower the learning rate"
            )
        metadata = metadata_of(session)
        metadata |= {"finished": session.finished, "before_decay": before_decay}
        self._store.save(update, state_tree(session.state), metadata, permanent=before_decay)
        self._saved_update = update


def state_tree(state: TrainState) -> dict[str, Any]:
    """The state as checkpoints hold it."""
    return {"params": state.params, "optimizer": state.optimizer}


def metadata_of(session: Session) -> dict[str, Any]:
    """What is stored beside the arrays: configuration with its seed, progress with the data position, what the rows and
    their ids are, code version."""
    return {
        "config": to_dict(session.config),
        "progress": session.progress.to_dict(),
        "data_fingerprint": session.data_fingerprint,
        "tokenizer_sha256": session.tokenizer_sha256,
        "code_version": code_version(),
    }


def code_version() -> str:
    """Version of this package, with the commit when it runs from a checkout."""
    try:
        number = version("mmx-jax")
    except PackageNotFoundError:
        number = "unknown"
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return number
    return f"{number}+{commit}"
