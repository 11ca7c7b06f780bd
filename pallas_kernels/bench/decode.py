"""Times one-token steps of lightning attention in a jitted loop of 100, beside XLA and fla's recurrent kernel.

States are donated and updated in place. With enough pools taking turns that no cache holds the next one's states, a
step's time is that of reading and writing its states; with one pool of one row it is mostly that of a launch.
"""

import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels.bench import common
from pallas_kernels.bench.timing import Row
from pallas_kernels.lightning import decode_step

PEERS = ("xla", "fla", "fla_graph")
"""Our portable form; fla, every step launched from Python; fla, 100 steps captured in one CUDA graph."""

DIM = 128
STEPS = 100
REPEATS = 9


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows advanced by a step, and how many pools of states take turns."""

    name: str
    batch: int
    pools: int
    heads: int = 64
    slots: bool = False

    @property
    def bytes(self) -> int:
        """The fewest bytes of a step: the states in and out, q, k, v and o."""
        return self.batch * self.heads * DIM * (2 * 4 * DIM + 4 * 2)


CASES = (
    Case("B1 N64", 1, 1),
    Case("B1 N64, states not in cache", 1, 50),
    Case("B16 N64", 16, 4),
    Case("B16 N64 slots", 16, 4, slots=True),
    Case("B64 N64", 64, 1),
    Case("B256 N64", 256, 1),
)


def run(peer_names: list[str], only: list[str]) -> Iterator[Row]:
    """Measures the cases whose names contain one of `only` (all when empty), ours and the peers'; rows as they come."""
    for case in common.chosen(CASES, only):
        for name in ("ours", *peer_names):
            row = Row(case.name, name, bytes=case.bytes)
            if name.startswith("fla"):
                yield common.peer(row, "fla", functools.partial(_fla, case, graph=name == "fla_graph"))
                continue
            row.ms, row.note = _ours(case, None if name == "ours" else "chunked")
            row.errors = _errors(case) if name == "ours" else {}
            yield row


def _draw(case: Case, seed: int = 0) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    """Random q, k, v in bf16 as after SiLU, and the fp32 states of each pool."""

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16 if len(shape) == 3 else jnp.float32)

    keys = jax.random.split(jax.random.key(seed), 3 + case.pools)
    tokens = [jax.nn.silu(draw(key, (case.batch, case.heads, DIM))) for key in keys[:3]]
    return tokens, tuple(draw(key, (case.batch, case.heads, DIM, DIM)) for key in keys[3:])


def _slopes(heads: int) -> jax.Array:
    return 2.0 ** (-8.0 * jnp.arange(1, heads + 1, dtype=jnp.float32) / heads)


def _slots(case: Case) -> jax.Array | None:
    return jnp.arange(case.batch, dtype=jnp.int32)[::-1] if case.slots else None


def _ours(case: Case, implementation: str | None) -> tuple[float, str]:
    """Milliseconds of one step, and what the device itself worked for, if the profiler says it."""
    slopes, slots = _slopes(case.heads), _slots(case)
    (q, k, v), states = _draw(case)

    def step(states: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], list[jax.Array]]:
        done = [decode_step(q, k, v, s, slopes, slots=slots, implementation=implementation) for s in states]
        return tuple(new for _, new in done), [o for o, _ in done]

    rounds = max(1, STEPS // case.pools)

    @functools.partial(jax.jit, donate_argnums=0)
    def loop(states: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], list[jax.Array]]:
        outputs = [jnp.zeros_like(q) for _ in states]
        return jax.lax.fori_loop(0, rounds, lambda _, carry: step(carry[0]), (states, outputs))

    def queue(calls: int, states: tuple[jax.Array, ...]) -> tuple[float, tuple[jax.Array, ...]]:
        start = time.perf_counter()
        for _ in range(calls):
            states, _ = loop(states)
        jax.block_until_ready(states)
        return time.perf_counter() - start, states

    # What two more loops cost in a queue: host round trips drop out.
    _, states = queue(2, states)
    times = []
    for _ in range(REPEATS):
        short, states = queue(1, states)
        long, states = queue(3, states)
        times.append((long - short) / 2)
    holder = [states]

    def once() -> None:
        holder[0] = jax.block_until_ready(loop(holder[0]))[0]

    device = _device_microseconds(once) if implementation is None else None
    note = "" if device is None else f"kernel {device:.2f} us"
    return statistics.median(times) / (rounds * case.pools) * 1e3, note


def _device_microseconds(call: Callable[[], None]) -> float | None:
    """Returns the median duration of our kernel on the device over one profiled call; None where nobody can say."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with jax.profiler.trace(folder):
                call()
        except Exception:  # a machine may refuse profiling
            return None
        files = list(Path(folder).rglob("*.xplane.pb"))
        if not files:
            return None
        profile = jax.profiler.ProfileData.from_file(str(files[0]))
        durations = [
            event.duration_ns / 1e3
            for plane in profile.planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            for event in line.events
            if "decode_kernel" in event.name
        ]
    return statistics.median(durations) if durations else None


def _errors(case: Case) -> dict[str, float]:
    """Relative L2 errors of one step's output and states against the XLA form in fp32."""
    (q, k, v), (state, *_) = _draw(dataclasses.replace(case, pools=1), seed=1)
    slopes, slots = _slopes(case.heads), _slots(case)
    o, new = decode_step(q, k, v, state, slopes, slots=slots)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    right_o, right = decode_step(q, k, v, state, slopes, slots=slots, implementation="chunked")
    return common.relative_errors({"o": o, "state": new}, {"o": right_o, "state": right})


def _fla(case: Case, graph: bool) -> float:
    """fla's recurrent kernel over one token of each row; it writes the new states to new memory."""
    import torch
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    tokens, states = _draw(case)
    q, k, v = (torch.utils.dlpack.from_dlpack(x).unsqueeze(1) for x in tokens)
    starts = [torch.utils.dlpack.from_dlpack(s) for s in states]
    gamma = -torch.utils.dlpack.from_dlpack(_slopes(case.heads))
    rounds = max(1, STEPS // case.pools)

    def steps() -> None:
        newest = list(starts)
        for _ in range(rounds):
            for i, state in enumerate(newest):
                _, newest[i] = fused_recurrent_simple_gla(
                    q, k, v, g_gamma=gamma, scale=1.0, initial_state=state, output_final_state=True
                )

    with torch.no_grad():
        steps()
        torch.cuda.synchronize()
        call = steps
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                steps()
            call = captured.replay
            call()
        times = []
        for _ in range(REPEATS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return statistics.median(times) / (rounds * case.pools) * 1e3
