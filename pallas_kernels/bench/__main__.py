"""Times one operation against this card's ceilings and its peers, all in one run: `--help` lists the operations."""

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import sys
from pathlib import Path

OPERATIONS = {
    "lightning": "lightning attention, forward and forward + backward",
    "softmax": "softmax attention: causal, packed, long",
    "norm_gate": "joint RMSNorm times sigmoid gate, forward and forward + backward",
    "decode": "one token of lightning attention, states updated in place",
    "grouped_matmul": "the experts' matrix products, forward and forward + backward",
}
"""Each is a module beside this one with `run(peer_names, only) -> list[Row]`; imported when asked for."""


def main() -> int:
    """Runs one benchmark and prints its table; returns the exit code."""
    arguments = _parser().parse_args()
    # Peers on torch share the card; the longest sequences need nearly all of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

    import jax

    from pallas_kernels.bench import ceilings, timing

    benchmark = importlib.import_module(f"pallas_kernels.bench.{arguments.operation}")
    peers = _names(arguments.peers)
    known = getattr(benchmark, "PEERS", None)
    if known is not None and not set(peers) <= set(known):
        print(f"--peers {arguments.peers}: {arguments.operation} knows {', '.join(known)}", file=sys.stderr)
        return 2
    if jax.default_backend() != "gpu":
        print(f"benchmarks need a GPU; the default backend is {jax.default_backend()}", file=sys.stderr)
        return 1
    device = jax.devices()[0].device_kind
    copy, matmul = ceilings.copy_gbps(), ceilings.matmul_tflops()
    print(f"{device}, jax {jax.__version__}: copy {copy:.0f} GB/s, bf16 matmul {matmul:.0f} TFLOP/s", flush=True)
    rows = benchmark.run(peers, _names(arguments.only))
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench",
        description=__doc__,
        epilog="\n".join(f"{name:16}{what}" for name, what in OPERATIONS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("operation", choices=OPERATIONS, help="what to time, see below")
    parser.add_argument("--peers", default="", help="peers to time in the same run, by name, comma-separated")
    parser.add_argument("--only", default="", help="time cases whose name contains one of these, comma-separated")
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    sys.exit(main())
