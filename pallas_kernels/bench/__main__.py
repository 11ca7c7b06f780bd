"""Times one operation against this card's ceilings and its peers, all in one run, or draws what was timed."""

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

OPERATIONS = {
    "lightning": "lightning attention, forward and forward + backward",
    "softmax": "softmax attention: causal, packed, long",
    "norm_gate": "joint RMSNorm times sigmoid gate, forward and forward + backward",
    "decode": "one token of lightning attention, states updated in place",
    "grouped_matmul": "the experts' matrix products, forward and forward + backward",
}
"""Each is a module beside this one with `run(peer_names, only) -> Iterator[Row]` and the names of its `PEERS`; imported
when asked for."""


def main() -> int:
    """Runs one benchmark and prints its table, or draws a picture; returns the exit code."""
    arguments = _parser().parse_args()
    if arguments.operation == "plot":
        from pallas_kernels.bench import plot

        try:
            plot.draw(arguments.files, arguments.output)
        except (OSError, ValueError, KeyError) as error:
            print(f"plot: {type(error).__name__}: {error}", file=sys.stderr)
            return 2
        return 0
    return _measure(arguments)


def _measure(arguments: argparse.Namespace) -> int:
    # Peers on torch share the card; the longest sequences need nearly all of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

    import jax

    from pallas_kernels.bench import ceilings, timing

    benchmark = importlib.import_module(f"pallas_kernels.bench.{arguments.operation}")
    peers = _names(arguments.peers)
    if not set(peers) <= set(benchmark.PEERS):
        print(f"--peers {arguments.peers}: {arguments.operation} knows {', '.join(benchmark.PEERS)}", file=sys.stderr)
        return 2
    only = _names(arguments.only)
    cases = [case.name for case in benchmark.CASES]
    if strange := [part for part in only if not any(part in case for case in cases)]:
        print(f"--only: no case of {arguments.operation} has {', '.join(strange)} in its name; there are "
              f"{'; '.join(cases)}", file=sys.stderr)  # fmt: skip
        return 2
    if jax.default_backend() != "gpu":
        print(f"benchmarks need a GPU; the default backend is {jax.default_backend()}", file=sys.stderr)
        return 1
    if arguments.json:
        try:
            _replacement(arguments.json).touch()
        except OSError as error:
            print(f"--json {arguments.json}: cannot be written: {error}", file=sys.stderr)
            return 2
    device = jax.devices()[0].device_kind
    rows: list[timing.Row] = []
    start = time.perf_counter()
    copy, matmul = ceilings.copy_gbps(), ceilings.matmul_tflops()
    print(f"{device}, jax {jax.__version__}: copy {copy:.0f} GB/s, bf16 matmul {matmul:.0f} TFLOP/s", flush=True)
    for row in benchmark.run(peers, only):
        elapsed = time.perf_counter() - start
        print(f"{elapsed:.0f} s: {row.case} {row.implementation} {row.ms} ms {row.note}", file=sys.stderr, flush=True)
        rows.append(row)
        if arguments.json:
            record = {
                "device": device,
                "jax": jax.__version__,
                "date": datetime.date.today().isoformat(),
                "copy_gbps": copy,
                "matmul_tflops": matmul,
                "rows": [dataclasses.asdict(row) for row in rows],
            }
            _replace(arguments.json, record)
    print(timing.table(rows, copy, matmul))
    return 0


def _replace(path: Path, record: dict[str, Any]) -> None:
    """Writes after every row, so that a run that is cut short is not lost, and never half a file."""
    beside = _replacement(path)
    beside.write_text(json.dumps(record, indent=1) + "\n")
    beside.replace(path)


def _replacement(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    operations = parser.add_subparsers(dest="operation", required=True, metavar="OPERATION")
    for name, what in OPERATIONS.items():
        operation = operations.add_parser(name, help=what, description=f"Times {what}.")
        operation.add_argument("--peers", default="", help="peers to time in the same run, by name, comma-separated")
        operation.add_argument(
            "--only", default="", help="time cases whose name contains one of these, comma-separated"
        )
        operation.add_argument("--json", type=Path, help="also write the measurements to this file, row by row")
    picture = operations.add_parser("plot", help="draws time against length from what --json wrote")
    picture.add_argument(
        "files", type=Path, nargs="+", help="written by `lightning --json`; the last has the last word"
    )
    picture.add_argument("--output", type=Path, required=True, help="the picture, PNG or SVG")
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    sys.exit(main())
