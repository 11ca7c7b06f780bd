"""How a list of layer kinds becomes scans: compile time is flat in depth."""

from dataclasses import dataclass
from itertools import groupby

from mmx_jax.config import ModelConfig


@dataclass(frozen=True)
class LayerRun:
    """`length` consecutive layers of one kind; inside a section they repeat once per group."""

    kind: str
    first_layer: int
    length: int


@dataclass(frozen=True)
class Section:
    """`groups` repetitions of the same runs; weights are stacked as [groups, run length, ...]."""

    groups: int
    period: int
    runs: tuple[LayerRun, ...]

    def layer(self, run: LayerRun, group: int, index: int) -> int:
        """Global index of the layer at `index` of `run` in repetition `group`."""
        return run.first_layer + group * self.period + index


def _runs(kinds: tuple[str, ...], first_layer: int) -> tuple[LayerRun, ...]:
    runs = []
    for kind, members in groupby(kinds):
        length = len(list(members))
        runs.append(LayerRun(kind, first_layer, length))
        first_layer += length
    return tuple(runs)


def layer_plan(config: ModelConfig) -> tuple[Section, ...]:
    """Splits the layers into the longest repeating part and a remainder.

    The period is the shortest one whose repetitions, from layer 0 on, cover the most layers. The remainder (or the
    whole list, when nothing repeats) is one section with a single group.
    """
    kinds = config.layers
    best_period, best_groups = len(kinds), 1
    for period in range(1, len(kinds) // 2 + 1):
        groups = 1
        while kinds[groups * period : (groups + 1) * period] == kinds[:period]:
            groups += 1
        if groups > 1 and (best_groups == 1 or groups * period > best_groups * best_period):
            best_period, best_groups = period, groups
    covered = best_period * best_groups
    sections = [Section(best_groups, best_period, _runs(kinds[:best_period], 0))]
    if covered < len(kinds):
        sections.append(Section(1, len(kinds) - covered, _runs(kinds[covered:], covered)))
    return tuple(sections)
