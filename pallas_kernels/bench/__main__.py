"""Command line of the kernel benchmarks; see `--help`."""

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import sys
from pathlib import Path


def main() -> int:
    """Runs one benchmark and prints its table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    parser.add_argument("operation", choices=sorted(path.stem for path in _benchmarks()), help="what to time")
    parser.add_argument("--peers", default="", help="peers to time in the same run, by name, comma-separated")
    parser.add_argument("--only", default="", help="time cases whose name contains one of these, comma-separated")
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    arguments = parser.parse_args()
    # Peers on torch share the card.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    import jax

    from pallas_kernels.bench import ceilings, timing

    if jax.default_backend() != "gpu":
        print(f"benchmarks need a GPU; the default backend is {jax.default_backend()}", file=sys.stderr)
        return 1
    device = jax.devices()[0].device_kind
    copy, matmul = ceilings.copy_gbps(), ceilings.matmul_tflops()
    print(f"{device}, jax {jax.__version__}: copy {copy:.0f} GB/s, bf16 matmul {matmul:.0f} TFLOP/s", flush=True)
    benchmark = importlib.import_module(f"pallas_kernels.bench.{arguments.operation}")
    rows = benchmark.run(_names(arguments.peers), _names(arguments.only))
    print(timing.table(rows, copy, matmul))
    if arguments.json:
        record = {
            "device": device,
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
            "copy_gbps": copy,
            "matmul_tflops": matmul,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _benchmarks() -> list[Path]:
    support = {"__init__", "__main__", "timing", "ceilings", "peers"}
    return [path for path in Path(__file__).parent.glob("*.py") if path.stem not in support]


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    sys.exit(main())
