"""Device time of functions, and how a table of measurements is kept and printed."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax


@dataclasses.dataclass
class Row:
    """One measurement.

    Attributes:
        case: what ran, on which shape.
        implementation: whose.
        ms: median milliseconds of a call.
        bytes: the fewest bytes that the call must move, for GB/s.
        flops: nominal floating-point operations, for TFLOP/s.
        errors: relative L2 errors against a higher precision, by name of the result.
        note: why there is no time, or what is special about it.
    """

    case: str
    implementation: str
    ms: float | None = None
    bytes: int | None = None
    flops: float | None = None
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""


def milliseconds(function: Callable[..., Any], inputs: Sequence[Sequence[Any]], *, repeats: int = 9) -> float:
    """Returns the median milliseconds of a call, launch gaps included, host round trips excluded.

    Calls are queued one after another over inputs that take turns, so that a cache holds nothing of the next call; the
    difference of a long and a short queue is what one more call costs. Calls of more than 10 ms are timed one by one: a
    launch is nothing beside them, and a queue of them would hold several results at once.

    Args:
        function: jitted, or any function that queues device work and returns arrays.
        inputs: sets of arguments, together larger than the device's cache.
        repeats: how many differences the median is taken of.
    """
    for arguments in inputs:
        jax.block_until_ready(function(*arguments))

    def queue(calls: int) -> float:
        start = time.perf_counter()
        result = None
        for call in range(calls):
            result = function(*inputs[call % len(inputs)])
        jax.block_until_ready(result)
        return time.perf_counter() - start

    if len(inputs) == 1 and (once := statistics.median(queue(1) for _ in range(3))) > 0.01:
        return statistics.median([once, *(queue(1) for _ in range(repeats - 1))]) * 1e3
    short = len(inputs)
    long = short + max(10, min(300, int(0.05 / max(queue(short) / short, 1e-6))))
    return statistics.median((queue(long) - queue(short)) / (long - short) * 1e3 for _ in range(repeats))


def torch_milliseconds(call: Callable[..., None], sets: Sequence[Sequence[Any]], *, repeats: int = 20) -> float:
    """Returns the median milliseconds between events around a call of torch, over inputs that take turns."""
    import torch

    for arguments in sets:
        call(*arguments)
    torch.cuda.synchronize()
    times = []
    for repeat in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(*sets[repeat % len(sets)])
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def table(rows: Sequence[Row], copy_gbps: float, matmul_tflops: float) -> str:
    """Formats measurements with their share of the ceilings and the ratio of each peer's time to ours."""
    ours = {row.case: row.ms for row in rows if row.implementation == "ours"}
    lines = [
        f"{'case':44} {'whose':6} {'ms':>9} {'GB/s':>6} {'% copy':>6} {'TFLOP/s':>8} {'% mm':>5} {'x ours':>6}  errors"
    ]
    for row in rows:
        cells = [f"{row.case:44} {row.implementation:6}"]
        if row.ms is None:
            lines.append(f"{cells[0]} {row.note}")
            continue
        gbps = row.bytes / row.ms / 1e6 if row.bytes else None
        tflops = row.flops / row.ms / 1e9 if row.flops else None
        base = ours.get(row.case)
        cells.append(f"{row.ms:9.4f}")
        cells.append(f"{gbps:6.0f} {100 * gbps / copy_gbps:6.1f}" if gbps else " " * 13)
        cells.append(f"{tflops:8.1f} {100 * tflops / matmul_tflops:5.1f}" if tflops else " " * 14)
        cells.append(f"{row.ms / base:6.2f}" if base else " " * 6)
        errors = " ".join(f"{name} {error:.1e}" for name, error in row.errors.items())
        lines.append(" ".join(cells) + f"  {errors} {row.note}".rstrip())
    return "\n".join(lines)
