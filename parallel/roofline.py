"""What a compiled step costs by a roofline: its schedule run through on paper, instruction by instruction.

Three clocks: the chip computes (matrix products at `MATMUL_EFFICIENCY` of the peak, or bytes at the bandwidth of main
memory, whichever takes longer), the links carry one collective after the other, and so does the network between slices;
a collective that was started early costs only what is left of it when its result is wanted. Loops count as often as
they run. Of a conditional the cheapest branch counts, or, on demand, the dearest: further rounds of the experts'
transport run only where a block of rows overflows on some chip.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax

from parallel.hlo import (
    Computation,
    Instruction,
    Module,
    array_bytes,
    collective,
    collective_kind,
    first_group,
    flops,
    moved_bytes,
    trip_count,
)
from parallel.topology import Chip

MATMUL_EFFICIENCY = 0.85
"""Share of the peak that large matrix products reach."""
KERNEL_EFFICIENCY = 0.5
"""Share of the peak that attention kernels reach."""
MEMORY_EFFICIENCY = 0.9
"""Share of main memory's bandwidth."""
KernelFlops = Callable[[Instruction, Sequence[str]], float]
"""Arithmetic of a kernel, by its instruction and the shapes of its operands: the text of a program does not say it."""


def _sums() -> defaultdict[tuple[str, str, str], float]:
    return defaultdict(float)


@dataclass
class Cost:
    """What some instructions cost on one chip; seconds, FLOPs and bytes add up."""

    seconds: float = 0.0
    exposed: float = 0.0
    """Seconds in which the chip waits for collectives."""
    flops: float = 0.0
    memory_bytes: float = 0.0
    collectives: defaultdict[tuple[str, str, str], float] = field(default_factory=_sums)
    """(kind, "synchronous" or "asynchronous", what) -> sum. What: "count", "bytes", "seconds", "exposed_seconds"; of
    asynchronous ones "hidden_bytes", their bytes by the share of their seconds in which the chip does not wait, and
    "with_matmul", how many have matrix products or kernels between start and end."""

    def add(self, other: "Cost", times: float | int = 1) -> None:
        """Adds what another stretch of the program costs, so many times."""
        self.seconds += times * other.seconds
        self.exposed += times * other.exposed
        self.flops += times * other.flops
        self.memory_bytes += times * other.memory_bytes
        for key, value in other.collectives.items():
            self.collectives[key] += times * value


@dataclass(frozen=True)
class _Travel:
    """An asynchronous collective that is underway."""

    kind: str
    received: float
    seconds: float
    arrives: float
    flops_before: float
    """Arithmetic of its computation before it started."""

    def ends(self, now: float, total: Cost) -> float:
        """Seconds that the chip still waits for it; adds to the costs of its computation."""
        waits = max(self.arrives - now, 0.0)
        hidden = 1 - min(waits / self.seconds, 1.0) if self.seconds else 1.0
        for what, value in (("exposed_seconds", waits), ("hidden_bytes", hidden * self.received),
                            ("with_matmul", total.flops > self.flops_before)):  # fmt: skip
            total.collectives[self.kind, "asynchronous", what] += value
        total.exposed += waits
        return waits


@dataclass
class Roofline:
    """Costs of programs on one kind of chip."""

    chip: Chip
    devices: Sequence[jax.Device]
    """In the order of the mesh."""
    kernel_flops: KernelFlops
    unknown_loops: Callable[[Instruction], float] = lambda loop: 1.0
    """How often a loop runs that ends by a value which the program is given or computes."""
    matmul_efficiency: float = MATMUL_EFFICIENCY
    """Share of the peak that matrix products outside kernels reach."""
    dearest: bool = False
    """Whether of a conditional the dearest branch counts, not the cheapest."""

    def cost(self, module: Module) -> Cost:
        """Cost of a whole program."""
        return self._computation(module.computations[module.entry], module)

    def _computation(self, computation: Computation, module: Module) -> Cost:
        total = Cost()
        now = 0.0
        free = {"links": 0.0, "slices": 0.0}
        underway: dict[str, _Travel] = {}
        for item in computation.instructions:
            moves, between = collective(item, module), _between_slices(item)
            if moves is not None or between is not None:
                if moves is not None:
                    way, kind = "links", collective_kind(moves)
                    received, seconds = self._travel(item, moves, computation)
                    how = "asynchronous" if item.opcode.endswith("-start") else "synchronous"
                else:
                    way, kind, how = "slices", f"{between} between slices", "asynchronous"
                    received = self._received_from_slices(item, str(between))
                    seconds = received / self.chip.dcn_bandwidth
                free[way] = max(now, free[way]) + seconds
                for key, value in (("count", 1), ("bytes", received), ("seconds", seconds)):
                    total.collectives[kind, how, key] += value
                if how == "asynchronous":
                    underway[item.name] = _Travel(kind, received, seconds, free[way], total.flops)
                    continue
                total.collectives[kind, how, "exposed_seconds"] += free[way] - now
                total.exposed += free[way] - now
                now = free[way]
            elif item.opcode.endswith("-done") and item.operands and item.operands[0] in underway:
                now += underway.pop(item.operands[0]).ends(now, total)
            else:
                part = self._instruction(item, computation, module)
                total.add(part)
                now += part.seconds
        total.seconds = now
        return total

    def _instruction(self, item: Instruction, computation: Computation, module: Module) -> Cost:
        if item.opcode == "while":
            cost = Cost()
            body = self._computation(module.computations[item.called("body")[0]], module)
            cost.add(body, trip_count(item, module) or self.unknown_loops(item))
            return cost
        if item.opcode == "conditional":
            names = item.called("branch_computations", "true_computation", "false_computation")
            choose = max if self.dearest else min
            return choose((self._computation(module.computations[name], module) for name in names), key=_seconds)
        if item.opcode == "call":
            return self._computation(module.computations[item.called("to_apply")[0]], module)
        work, moved = flops(item, computation, module), moved_bytes(item, computation, module)
        called = item.opcode == "custom-call"
        kernel = self.kernel_flops(item, computation.operand_shapes(item)) if called else 0.0
        computing = work / self.matmul_efficiency + kernel / KERNEL_EFFICIENCY
        seconds = max(computing / self.chip.peak_flops, moved / (MEMORY_EFFICIENCY * self.chip.hbm_bandwidth))
        return Cost(seconds, flops=work + kernel, memory_bytes=moved)

    def _received_from_slices(self, item: Instruction, kind: str) -> float:
        """Bytes that a chip receives from other slices in what a `recv` brings."""
        slices = len({getattr(device, "slice_index", 0) for device in self.devices})
        share = {"all-gather": (slices - 1) / slices, "all-reduce": 2 * (slices - 1) / slices,
                 "reduce-scatter": slices - 1}.get(kind, 1.0)  # fmt: skip
        return share * array_bytes(item.shape)

    def _travel(self, item: Instruction, moves: Instruction, computation: Computation) -> tuple[float, float]:
        """Bytes that a chip receives in a collective (`moves`, which `item` starts), and the seconds that it takes."""
        kind = collective_kind(moves)
        group = [self.devices[place] for place in first_group(moves, len(self.devices))]
        ways, own = len(group), math.fsum(map(array_bytes, computation.operand_shapes(item)))
        received = own * {
            "all-gather": ways - 1,
            "reduce-scatter": (ways - 1) / ways,
            "all-reduce": 2 * (ways - 1) / ways,
            "collective-permute": 1,
        }.get(kind, (ways - 1) / ways)
        if self.chip.platform == "gpu":  # behind one switch: each has all of its links to any other
            return received, received / self.chip.ici_bandwidth
        extents = [len(set(places)) for places in zip(*(device.coords for device in group))]
        spanned = sum(extent > 1 for extent in extents)
        if spanned == 0:
            return received, 0.0
        axes = sum(limit > 1 for limit in _extents(self.devices))
        along_axis = self.chip.ici_bandwidth / axes
        if "all-to-all" in kind:
            # On a ring of n chips rows travel n / 4 hops on average; the longest of the axes holds up the others.
            return received, own * max(extents) / 4 / along_axis
        return received, received / (along_axis * (1 if kind == "collective-permute" else spanned))


def _between_slices(item: Instruction) -> str | None:
    """The collective whose part from other slices an instruction begins to receive; the compiler splits such in two."""
    if item.opcode != "recv":
        return None
    match = re.search(r'_xla_megascale_transfer_type="(\w+)"', item.attributes)
    return match[1].lower().replace("_", "-") if match else None


def _seconds(cost: Cost) -> float:
    return cost.seconds


def _extents(devices: Sequence[jax.Device]) -> list[int]:
    return [len(set(places)) for places in zip(*(device.coords for device in devices))]
