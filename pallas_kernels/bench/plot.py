"""Draws lightning attention's time against the length of the sequence, ours and the peers', from benchmark files."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

CASE = re.compile(r"B1 T(\d+) N(\d+) (fwd\+bwd|fwd)$")
PASSES = {"fwd": "forward", "fwd+bwd": "forward + backward"}
LABELS = {"ours": "ours", "jla": "jax-linear-attention", "fla": "flash-linear-attention"}
MARKERS = {"ours": "o", "jla": "s", "fla": "^"}

Lines = dict[tuple[int, str, str], dict[int, float]]
"""Milliseconds by length, for every number of heads, pass and implementation."""


def read(files: Sequence[Path]) -> Lines:
    """Takes the times of single sequences without segments; of two for the same thing that of the later file."""
    lines: Lines = {}
    for file in files:
        for row in json.loads(file.read_text())["rows"]:
            if (match := CASE.search(row["case"])) and row["ms"] is not None:
                length, heads, what = match.groups()
                lines.setdefault((int(heads), what, row["implementation"]), {})[int(length)] = row["ms"]
    return lines


def draw(files: Sequence[Path], output: Path) -> None:
    """Writes one panel for each pass: both axes logarithmic, a colour for each number of heads.

    Raises:
        ValueError: the files hold no time of a single sequence without segments.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read(files)
    if not lines:
        raise ValueError(f"{', '.join(map(str, files))}: no rows named like 'B1 T8192 N64 fwd' with a time")
    heads = sorted({key[0] for key in lines})
    figure, panels = pyplot.subplots(1, len(PASSES), figsize=(11, 4.6), sharey=True, layout="constrained")
    for panel, (what, title) in zip(panels, PASSES.items(), strict=True):
        for (count, passes, whose), points in sorted(lines.items()):
            if passes == what:
                lengths = sorted(points)
                panel.plot(
                    lengths,
                    [points[n] for n in lengths],
                    color=f"C{heads.index(count)}",
                    marker=MARKERS.get(whose, "x"),
                    linestyle="-" if whose == "ours" else ":",
                    markersize=5,
                )
        panel.set(title=title, xlabel="tokens", xscale="log", yscale="log")
        ticks = sorted({n for key, points in lines.items() if key[1] == what for n in points})
        panel.set_xticks(ticks, [f"{n // 1024}k" for n in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds")
    entries = [pyplot.Line2D([], [], color=f"C{i}", label=f"{count} heads") for i, count in enumerate(heads)]
    entries += [
        pyplot.Line2D([], [], color="grey", marker=MARKERS.get(whose, "x"), linestyle="-" if whose == "ours" else ":",
                      label=LABELS.get(whose, whose))
        for whose in sorted({key[2] for key in lines}, key=lambda name: (name != "ours", name))
    ]  # fmt: skip
    panels[0].legend(handles=entries, fontsize="small")
    figure.savefig(output, dpi=150)
    pyplot.close(figure)
