"""The loss curve."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float


def plot_losses(records: list[dict[str, Any]], evaluations: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws training loss, its moving average and held-out losses over trained tokens, with the learning rate below.

    Args:
      records: lines of metrics.jsonl; those whose loss is null are left out.
      evaluations: lines of evaluations.jsonl.
      path: PNG file to write.
      title: headline.

    Raises:
      OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # (half a second that other commands need not pay)
    from matplotlib.figure import Figure

    records = [record for record in records if record["loss"] is not None]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    rounds = sorted({(record["stage"], record["round"]) for record in records})
    for index, (stage, number) in enumerate(rounds):
        mine = [record for record in records if (record["stage"], record["round"]) == (stage, number)]
        tokens = np.array([record["tokens"] for record in mine]) / 1e6
        losses = np.array([record["loss"] for record in mine], np.float64)
        color, label = f"C{index}", stage if number == 1 else f"{stage}, round {number}"
        top.plot(tokens, losses, color=color, alpha=0.25, linewidth=0.8)
        top.plot(tokens, smoothed(losses), color=color, label=label)
        bottom.plot(tokens, [record["learning_rate"] for record in mine], color=color)
    if evaluations:
        tokens = np.array([evaluation["tokens"] for evaluation in evaluations]) / 1e6
        held_out = [evaluation["held_out"]["all"]["loss"] for evaluation in evaluations]
        top.plot(tokens, held_out, "ko", markersize=4, label="held out")
    top.set_ylabel("loss, nats per token")
    top.set_title(title)
    top.grid(alpha=0.3)
    if rounds or evaluations:
        top.legend()
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("million tokens")
    bottom.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def smoothed(values: Float[np.ndarray, " n"], share: float = 0.05) -> Float[np.ndarray, " n"]:
    """Mean over the last `share` of the points up to each one, at least one."""
    width = max(1, round(share * len(values)))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
