"""What a compiled step costs by a roofline: its schedule run through on paper, instruction by instruction.

Three clocks: the chip computes (matrix products at `MATMUL_EFFICIENCY` of the peak, or bytes at the bandwidth of main
memory, whichever takes longer), the links carry one collective after the other, and a collective that was started
early costs only what is left of it when its result is wanted. Loops count as often as they run. Of a conditional the
cheapest branch counts: further rounds of the experts' transport run only where routing is uneven.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax

from parallel.hlo import (
    Computation,
    Instruction,
    Module,
    array_bytes,
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
KernelFlops = Callable[[str], float]
"""Arithmetic of a kernel, by its name: the text of a program does not say it."""


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
    """(kind, "synchronous" or "asynchronous", "count", "bytes", "seconds" or "exposed_seconds") -> sum."""

    def add(self, other: "Cost", times: float | int = 1) -> None:
        """Adds what another stretch of the program costs, so many times."""
        self.seconds += times * other.seconds
        self.exposed += times * other.exposed
        self.flops += times * other.flops
        self.memory_bytes += times * other.memory_bytes
        for key, value in other.collectives.items():
            self.collectives[key] += times * value


@dataclass
class Roofline:
    """Costs of programs on one kind of chip."""

    chip: Chip
    devices: Sequence[jax.Device]
    """In the order of the mesh."""
    kernel_flops: KernelFlops
    unknown_loops: int = 1
    """How often loops run that end by a value which the program is given."""

    def cost(self, module: Module) -> Cost:
        """Cost of a whole program."""
        return self._computation(module.computations[module.entry], module)

    def _computation(self, computation: Computation, module: Module) -> Cost:
        total = Cost()
        now, links_free = 0.0, 0.0
        arrives: dict[str, tuple[float, str]] = {}
        for item in computation.instructions:
            kind = collective_kind(item, module)
            if kind is not None:
                received, seconds = self._travel(item, kind, computation)
                start = max(now, links_free)
                links_free = start + seconds
                how = "asynchronous" if item.opcode.endswith("-start") else "synchronous"
                for key, value in (("count", 1), ("bytes", received), ("seconds", seconds)):
                    total.collectives[kind, how, key] += value
                if how == "asynchronous":
                    arrives[item.name] = (links_free, kind)
                    continue
                total.collectives[kind, how, "exposed_seconds"] += links_free - now
                total.exposed += links_free - now
                now = links_free
            elif item.opcode.endswith("-done") and item.operands and item.operands[0] in arrives:
                end, kind = arrives.pop(item.operands[0])
                waits = max(end - now, 0.0)
                total.collectives[kind, "asynchronous", "exposed_seconds"] += waits
                total.exposed += waits
                now += waits
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
            cost.add(body, trip_count(item, module) or self.unknown_loops)
            return cost
        if item.opcode == "conditional":
            names = item.called("branch_computations", "true_computation", "false_computation")
            return min((self._computation(module.computations[name], module) for name in names), key=_seconds)
        if item.opcode == "call":
            return self._computation(module.computations[item.called("to_apply")[0]], module)
        work, moved = flops(item, computation, module), moved_bytes(item, computation, module)
        kernel = self.kernel_flops(item.name) if item.opcode == "custom-call" else 0.0
        computing = work / MATMUL_EFFICIENCY + kernel / KERNEL_EFFICIENCY
        seconds = max(computing / self.chip.peak_flops, moved / (MEMORY_EFFICIENCY * self.chip.hbm_bandwidth))
        return Cost(seconds, flops=work + kernel, memory_bytes=moved)

    def _travel(self, item: Instruction, kind: str, computation: Computation) -> tuple[float, float]:
        """Bytes that a chip receives in a collective, and the seconds that this takes."""
        group = [self.devices[place] for place in first_group(item, len(self.devices))]
        ways, own = len(group), math.fsum(map(array_bytes, computation.operand_shapes(item)))
        received = own * {
            "all-gather": ways - 1,
            "reduce-scatter": (ways - 1) / ways,
            "all-reduce": 2 * (ways - 1) / ways,
            "collective-permute": 1,
        }.get(kind, (ways - 1) / ways)
        if len({getattr(device, "slice_index", 0) for device in group}) > 1:
            return received, received / self.chip.dcn_bandwidth
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


def _seconds(cost: Cost) -> float:
    return cost.seconds


def _extents(devices: Sequence[jax.Device]) -> list[int]:
    return [len(set(places)) for places in zip(*(device.coords for device in devices))]
