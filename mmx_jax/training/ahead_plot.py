"""A picture of what fills a chip's memory, and a table, from the JSON lines of steps that were compiled ahead of time.

python -m mmx_jax.training.ahead_plot docs/data/ahead_of_time.jsonl docs/images/memory_by_part.png
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app

from mmx_jax.config import ConfigError
from mmx_jax.config.command_line import fail_with, parse_flags

PARTS = {
    "params": "parameters, fp32",
    "moments": "both moments",
    "gradients": "gradients, fp32",
    "other_temporaries": "activations and other temporaries",
    "rest": "program and batch",
}
COLORS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#999999")


def plot_memory(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws one bar a report (`ahead.compile_ahead`): gigabytes of a chip by part, and a line at what the chip has.

    Args:
      reports: of steps that were compiled; drawn from the top down.
      path: PNG file to write.

    Raises:
      OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # (half a second that other commands need not pay)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.2 + 0.6 * len(reports)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = range(len(reports))
    left = [0.0] * len(reports)
    for (part, label), color in zip(PARTS.items(), COLORS):
        widths = [_gigabytes(report["memory_per_chip"], part) for report in reports]
        axes.barh(rows, widths, left=left, height=0.6, color=color, label=label)
        left = [start + width for start, width in zip(left, widths)]
    for row, (report, end) in enumerate(zip(reports, left)):
        there = report["memory_per_chip"]["hbm"] / 1e9
        axes.plot([there, there], [row - 0.42, row + 0.42], color="black", linewidth=2.5,
                  label="memory of the chip" if row == 0 else None)  # fmt: skip
        axes.annotate(f"{end:.1f}", (end, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(rows, [_title(report) for report in reports], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("GB a chip")
    axes.set_title("Memory of the compiled training step, by part")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)


def table(reports: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the reports: memory, estimate and what compiling took."""
    names = ("slice", "chips", "mesh", "remat", "tokens a step", "GB a chip", "MFU, at 75%", "seconds a step, exposed",
             "compiled in", "host memory")  # fmt: skip
    lines = [names, ("---",) * len(names)]
    for report in reports:
        memory, speed = report["memory_per_chip"], report["estimate"]
        lines.append((
            report["topology"],
            f"{report['chips']:,}",
            _mesh(report),
            report["remat"],
            f"{report['sequences_per_step']:,} x {report['sequence_length']:,}",
            f"{memory['total'] / 1e9:.1f} of {memory['hbm'] / 1e9:.0f}",
            f"{speed['mfu']:.3f}, {speed['slower_matmul']['mfu']:.3f}",
            f"{speed['step_seconds']:.2f}, {speed['exposed_collective_seconds']:.2f}",
            f"{report['lower_seconds'] + report['compile_seconds']:.0f} s",
            f"{report['host_peak_bytes'] / 1e9:.1f} GB",
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _gigabytes(memory: dict[str, int], part: str) -> float:
    if part == "rest":
        return (memory["program"] + memory["arguments"] - memory["params"] - memory["moments"]) / 1e9
    return memory[part] / 1e9


def _title(report: dict[str, Any]) -> str:
    rows = f"{report['sequences_per_step']:,} x {report['sequence_length']:,} tokens"
    first = f"{report['topology']} ({report['chips']:,}), {report['config']}, {rows}"
    return f"{first}\n{_mesh(report)}, remat {report['remat']}"


def _mesh(report: dict[str, Any]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items()) or "one chip"


def read_reports(path: Path) -> list[dict[str, Any]]:
    """Lines of a file of reports; those of steps that did not fit, and the ranking of a search, are passed over.

    Raises:
      ConfigError: the file cannot be read, or a line is no report of a step that was compiled; names both.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    reports = []
    for number, line in enumerate(lines, start=1):
        try:
            report = json.loads(line)
            if "ranking" in report or report.get("fits") is False:  # (a search has such lines too)
                continue
            _title(report)
            table([report])
            for part in PARTS:
                _gigabytes(report["memory_per_chip"], part)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}, line {number}: no report of a compiled step ({error!r})") from error
        reports.append(report)
    if not reports:
        raise ConfigError(f"{path}: has no lines")
    return reports


def main(arguments: Sequence[str]) -> None:
    """Reads the lines, writes the picture and prints the table."""
    try:
        if len(arguments) != 3:
            raise ConfigError("give two paths: a file of JSON lines, and the PNG file to write")
        reports = read_reports(Path(arguments[1]))
        plot_memory(reports, Path(arguments[2]))
        print(table(reports))
    except (ConfigError, OSError) as error:
        fail_with(error)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
