"""Results for people and for programs: a table, and a file."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from mmx_jax.evaluation.task import ALL, TaskResult


def result_table(result: TaskResult) -> Table:
    """Groups as rows, metrics as columns, the sum last."""
    table = Table(title=f"{result.task}  ({result.seconds:.1f} s)", title_justify="left")
    columns = list(dict.fromkeys(name for metrics in result.groups.values() for name in metrics))
    table.add_column("group")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    groups = [group for group in result.groups if group != ALL]
    for group in [*groups, ALL] if len(groups) != 1 else groups:
        metrics = result.groups[group]
        table.add_row(group, *(_figure(metrics[name]) if name in metrics else "" for name in columns))
    return table


def _figure(value: float | int) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3e}"


def result_path(folder: Path, stem: str, result: TaskResult) -> Path:
    """A name for a result file: the first of stem.json, stem.2.json, ... that is free or holds a result of the same
    settings, so that figures of other text or lengths stay."""
    settings = json.loads(json.dumps(result.settings))
    names = itertools.chain([f"{stem}.json"], (f"{stem}.{number}.json" for number in itertools.count(2)))
    paths = (folder / name for name in names)
    return next(path for path in paths if not path.exists() or _settings(path) == settings)


def _settings(path: Path) -> Any:
    """The settings of a result file; None for another kind of file."""
    try:
        return json.loads(path.read_bytes())["settings"]
    except (ValueError, KeyError, TypeError):
        return None


def write_result(result: TaskResult, model: Mapping[str, Any], path: Path) -> None:
    """Writes a result file (`TaskResult.to_json`); an older one of the same name is replaced.

    Raises:
      OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(result.to_json(model), indent=1) + "\n")
    partial.replace(path)
