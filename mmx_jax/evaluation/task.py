"""Tasks and their results: one interface, one registry, one JSON schema."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from mmx_jax.config import ConfigError, RunConfig, StageConfig
from mmx_jax.evaluation.model import EvalModel

FORMAT = 1
ALL = "all"
"""The group that sums up the others."""


@dataclass(frozen=True)
class TaskResult:
    """What a task measured."""

    task: str
    groups: Mapping[str, Mapping[str, float]]
    """Metrics by group (a source, a length, a subject); the group "all" sums up the others."""
    settings: Mapping[str, Any]
    """Everything that the figures depend on beside the model."""
    seconds: float

    def to_json(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """The one schema of result files: {"format": 1, "model": {...}, "task", "groups", "settings", "seconds"}."""
        return {"format": FORMAT, "model": dict(model), **asdict(self)}


@runtime_checkable
class Task(Protocol):
    """Something to measure; holds its settings."""

    @classmethod
    def from_config(cls, run: RunConfig, stage: StageConfig) -> "Task":
        """The task as a run's configuration describes it."""
        ...

    def run(self, model: EvalModel) -> TaskResult:
        """Measures a model."""
        ...


TASKS: dict[str, type[Task]] = {}


def register[T: type](name: str, task: T) -> T:
    """Makes a task available under a name."""
    TASKS[name] = task
    return task


def find_tasks(names: str) -> list[type[Task]]:
    """Tasks of a comma-separated list of names.

    Raises:
      ConfigError: for an unknown name, or none; the message lists the names there are.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = ", ".join(sorted(TASKS))
    if not wanted:
        raise ConfigError(f"no task named; there are {known}")
    if unknown := [name for name in wanted if name not in TASKS]:
        raise ConfigError(f"unknown task {unknown[0]!r}; there are {known}")
    return [TASKS[name] for name in wanted]
