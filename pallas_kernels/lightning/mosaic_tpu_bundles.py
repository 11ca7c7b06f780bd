"""What the TPU compiler made of the kernels: instruction bundles of a steady grid step, set against memory bandwidth.

    python -m pallas_kernels.lightning.mosaic_tpu_bundles --chip v5p --heads 64 --length 8192

needs libtpu, not a TPU. A bundle issues in one cycle at best, so bundles over the clock bound a kernel's time from
below, as bytes over bandwidth do; neither is a timing, stalls and DMA latency come on top (spec kernels.md 7.3, 9.9).
"""

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.lightning import mosaic_tpu

TOPOLOGIES = {"v5p": "v5p:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2"}
CLOCK_HZ = 1.75e9  # v5p's; v6e's is not published and assumed equal (kernels.md 9.9)
WIDTH = mosaic_tpu.WIDTH
TENSORS = {"lightning_o": 4, "lightning_dk_dv": 6, "lightning_state": 2}
"""Tensors of [B, T, N, H] that each kernel reads or writes."""


class Call(NamedTuple):
    """One operation with flat [B, T, N*H] tensors, ready to be jitted: the layout in which no copy is needed."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()


def chip_mesh(chip: str) -> Mesh:
    """A mesh of one device of a TPU that need not exist; `chip` is a key of TOPOLOGIES."""
    topology = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu")
    return Mesh(np.array(topology.devices[:1]), ("x",))


def calls(mesh: Mesh, batch: int, length: int, heads: int, dtype: Any, packed: bool) -> dict[str, Call]:
    """Every operation on shapes of this size, with states in and out, placed on the mesh's one device."""

    def shape(*dims: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(batch, length, heads, WIDTH)

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(batch, length, heads * WIDTH)

    def forward(q: Any, k: Any, v: Any, slopes: Any, ids: Any, start: Any) -> Any:
        o, end = mosaic_tpu.forward(split(q), split(k), split(v), slopes, ids, start)
        return flat(o), end

    def backward(q: Any, k: Any, v: Any, slopes: Any, ids: Any, start: Any, do: Any, dend: Any) -> Any:
        out = mosaic_tpu.backward(split(q), split(k), split(v), slopes, ids, start, split(do), dend)
        return (*map(flat, out[:3]), out[3])

    def chunk_state(k: Any, v: Any, slopes: Any, ids: Any, *, reverse: bool) -> Any:
        return mosaic_tpu.chunk_state(split(k), split(v), slopes, ids, reverse)

    x, slopes = shape(batch, length, heads * WIDTH), shape(heads, dtype=jnp.float32)
    ids = shape(batch, length, dtype=jnp.int32) if packed else None
    state = shape(batch, heads, WIDTH, WIDTH, dtype=jnp.float32)
    token = shape(batch, heads, WIDTH)
    slots = shape(batch, dtype=jnp.int32) if packed else None
    return {
        "forward": Call(forward, (x, x, x, slopes, ids, state)),
        "backward": Call(backward, (x, x, x, slopes, ids, state, x, state)),
        "chunk_state": Call(functools.partial(chunk_state, reverse=False), (x, x, slopes, ids)),
        "chunk_state reverse": Call(functools.partial(chunk_state, reverse=True), (x, x, slopes, ids)),
        "decode_step": Call(mosaic_tpu.decode_step, (token, token, token, state, slopes, slots), donated=(3,)),
    }


def compile_call(call: Call) -> jax.stages.Compiled:
    """Compiles for the mesh that is set; raises what the TPU compiler raises."""
    return jax.jit(call.function, donate_argnums=call.donated).trace(*call.arguments).lower().compile()


def steady_bundles(text: str) -> int:
    """Counts the bundles of one grid step that is neither a row's first nor its last, in a dump of final bundles.

    The grid is the outermost loop. In its body, what a branch can skip is left out: building tables and reading a state
    at the first chunk, writing it at the last. Kernels for unpacked input skip nothing else. Branches nest, and each
    comes out at a bundle marked PF; the one around everything is the pipeline's own prologue test.
    """
    start = stop = None
    pending: list[int] = []
    skipped: list[int] = []
    for line in text.splitlines():
        if not (found := re.match(r"\s*(0x[0-9a-f]+|0)\s+(LB|PF)?\s*:", line)):
            continue
        address = int(found[1], 16)
        if found[2] == "LB" and start is None:
            start = address
        if found[2] == "PF" and pending:
            skipped.append(address - pending.pop())
        if start is not None and "sbr.rel" in line:
            stop = address
            pending.append(address)
    if start is None or stop is None:
        raise ValueError("no loop in this dump: the grid has a single step")
    whole = stop - start
    return whole - sum(size for size in skipped if size < whole // 2)


def estimate(chip: str, batch: int, length: int, heads: int, dump: Path) -> list[str]:
    """Compiles forward, backward and chunk_state, dumping into `dump`, and returns the lines of a table."""
    lines = [f"{chip} B{batch} T{length} N{heads} H{WIDTH} bf16: bundles a step and a head, ms by issue and by memory"]
    mesh = chip_mesh(chip)
    with jax.set_mesh(mesh):
        made, info = calls(mesh, batch, length, heads, jnp.bfloat16, False), pltpu.get_tpu_info()
        plan = mosaic_tpu.plan(batch, heads)
        for name in ("forward", "backward", "chunk_state"):
            compile_call(made[name])
            for path in sorted(dump.glob("*lightning*-final_bundles.txt")):
                kernel = re.sub(r".*?(lightning_[a-z_]+).*", r"\1", path.name)
                bundles = steady_bundles(path.read_text())
                steps = batch * (heads // plan.heads) * -(-length // plan.chunk) / info.num_cores
                issue = 1e3 * steps * bundles / CLOCK_HZ
                moved = 2 * TENSORS[kernel] * batch * length * heads * WIDTH
                memory = 1e3 * moved / (info.mem_bw_bytes_per_second * info.num_cores)
                title = f"{name}: {kernel}"
                lines.append(f"{title:32}{bundles:>8}{bundles / plan.heads:>8.0f}{issue:>10.3f}{memory:>11.3f}")
            for path in dump.iterdir():
                path.unlink()
    return lines


def main() -> None:
    """Prints the table; the compiler reads its dump options from the environment, hence the second process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=TOPOLOGIES, default="v5p")
    for name, default in (("batch", 1), ("length", 8192), ("heads", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.dump is None:
        with tempfile.TemporaryDirectory() as dump:
            environment = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
            }
            command = [sys.executable, "-m", "pallas_kernels.lightning.mosaic_tpu_bundles", *sys.argv[1:]]
            sys.exit(subprocess.run([*command, "--dump", dump], env=environment).returncode)
    print("\n".join(estimate(given.chip, given.batch, given.length, given.heads, given.dump)))


if __name__ == "__main__":
    main()
