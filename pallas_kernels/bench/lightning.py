"""Times lightning attention, forward and forward with backward, against the copy ceiling and its peers."""

import dataclasses
import sys

import jax
import jax.numpy as jnp

from pallas_kernels.bench import peers
from pallas_kernels.bench.timing import Row, milliseconds
from pallas_kernels.lightning import lightning_attention

DIM = 128
CHUNK = 64
CACHE_BYTES = 200e6
"""Inputs take turns over at least this much memory, four times a Hopper card's cache."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape to time, with the number of segments of random lengths in each row when it is packed."""

    name: str
    batch: int
    length: int
    heads: int
    segments: int = 0
    backward: bool = True


CASES = (
    Case("R: B1 T8192 N64", 1, 8192, 64),
    Case("B4 T8192 N64", 4, 8192, 64),
    Case("B1 T32768 N64", 1, 32768, 64),
    Case("B1 T32768 N64 packed 16", 1, 32768, 64, segments=16),
    Case("B1 T131072 N64", 1, 131072, 64),
    Case("B1 T8192 N16", 1, 8192, 16),
    Case("B1 T32768 N16", 1, 32768, 16),
    Case("B1 T131072 N16", 1, 131072, 16),
    Case("B1 T8192 N8", 1, 8192, 8),
    Case("B1 T32768 N8", 1, 32768, 8),
    Case("B1 T131072 N8", 1, 131072, 8),
    Case("B1 T1048576 N16", 1, 1048576, 16),
    Case("B1 T524288 N64", 1, 524288, 64),
    Case("B1 T1048576 N64", 1, 1048576, 64, backward=False),
)


def run(peer_names: list[str], only: list[str]) -> list[Row]:
    """Measures every case whose name contains one of `only` (all when empty), ours and the peers'.

    Times go to stderr as they come, so that a run that is cut short is not lost.
    """
    rows: list[Row] = []
    for case in CASES:
        if only and not any(part in case.name for part in only):
            continue
        inputs, slopes, ids = _draw(case)
        found = _ours(case, inputs, slopes, ids)
        for name in peer_names:
            found += _peer(name, case, inputs, slopes, ids)
        for row in found:
            print(f"{row.case} {row.implementation}: {row.ms} ms {row.note}", file=sys.stderr, flush=True)
        rows += found
        for array in jax.tree.leaves(inputs):
            array.delete()
    return rows


def _draw(case: Case) -> tuple[list[list[jax.Array]], jax.Array, jax.Array | None]:
    """Random inputs as the model has them: q, k, v past SiLU (and do), the slopes of the first layer."""
    shape = (case.batch, case.length, case.heads, DIM)
    tensor_bytes = 2 * case.batch * case.length * case.heads * DIM
    sets = max(1, min(8, round(CACHE_BYTES / (4 * tensor_bytes)) + 1))

    @jax.jit
    def draw(key: jax.Array) -> list[jax.Array]:
        arrays = [jax.random.normal(k, shape, jnp.bfloat16) for k in jax.random.split(key, 3 + case.backward)]
        return [*map(jax.nn.silu, arrays[:3]), *arrays[3:]]

    slopes = 2.0 ** (-8.0 * jnp.arange(1, case.heads + 1, dtype=jnp.float32) / case.heads)
    ids = None
    if case.segments:
        borders = jnp.sort(jax.random.randint(jax.random.key(1), (case.segments - 1,), 1, case.length))
        row = jnp.searchsorted(borders, jnp.arange(case.length), side="right") + 1
        ids = jnp.broadcast_to(row.astype(jnp.int32), (case.batch, case.length))
    return [draw(jax.random.key(i)) for i in range(sets)], slopes, ids


def _ours(case: Case, inputs: list[list[jax.Array]], slopes: jax.Array, ids: jax.Array | None) -> list[Row]:
    def forward(q: jax.Array, k: jax.Array, v: jax.Array, *do: jax.Array) -> jax.Array:
        return lightning_attention(q, k, v, slopes, segment_ids=ids)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        o, pull = jax.vjp(lambda q, k, v: lightning_attention(q, k, v, slopes, segment_ids=ids), q, k, v)
        return o, pull(do)

    tokens = case.batch * case.length * case.heads
    nominal = float(2 * CHUNK * DIM + 4 * DIM**2)
    errors = _errors(inputs[0], slopes, ids) if case.backward else {}
    rows = []
    for suffix, function, tensors, factor in (("fwd", forward, 4, 1.0), ("fwd+bwd", both, 11, 3.5))[
        : 1 + case.backward
    ]:
        compiled = jax.jit(function).lower(*inputs[0]).compile()
        rows.append(
            Row(
                f"{case.name} {suffix}",
                "ours",
                milliseconds(compiled, inputs),
                tensors * 2 * DIM * tokens,
                factor * nominal * tokens,
                {"o": errors["o"]} if errors and tensors == 4 else errors,
                _memory(compiled),
            )
        )
    return rows


def _memory(compiled: jax.stages.Compiled) -> str:
    """What a call holds beside its arguments and results, as a share of these."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return ""
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return f"work space {100 * analysis.temp_size_in_bytes / held:.1f}%"


def _errors(inputs: list[jax.Array], slopes: jax.Array, ids: jax.Array | None, tokens: int = 8192) -> dict[str, float]:
    """Relative L2 errors of the fastest and the slowest head over the first tokens against the fp32 recurrence."""
    heads = jnp.array([0, slopes.shape[0] - 1])
    q, k, v, do = (x[:1, :tokens, heads] for x in inputs)
    ids = None if ids is None else ids[:1, :tokens]

    def results(implementation: str | None, *arrays: jax.Array) -> dict[str, jax.Array]:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            return lightning_attention(
                q, k, v, slopes[heads], segment_ids=ids, return_state=True, implementation=implementation
            )

        (o, state), pull = jax.vjp(attend, *arrays[:3])
        dq, dk, dv = pull((arrays[3], jnp.zeros_like(state)))
        return {"o": o, "state": state, "dq": dq, "dk": dk, "dv": dv}

    with jax.default_matmul_precision("highest"):
        right = jax.jit(lambda *x: results("reference", *x))(*(x.astype(jnp.float32) for x in (q, k, v, do)))
    found = jax.jit(lambda *x: results(None, *x))(q, k, v, do)
    return {
        name: float(jnp.linalg.norm(found[name].astype(jnp.float32) - x) / jnp.linalg.norm(x))
        for name, x in right.items()
    }


def _peer(name: str, case: Case, inputs: list[list[jax.Array]], slopes: jax.Array, ids: jax.Array | None) -> list[Row]:
    tokens = case.batch * case.length * case.heads
    rows = []
    for suffix, tensors in (("fwd", 4), ("fwd+bwd", 11))[: 1 + case.backward]:
        row = Row(f"{case.name} {suffix}", name, bytes=tensors * 2 * DIM * tokens)
        if not peers.available(name):
            row.note = "not installed"
        else:
            try:
                row.ms = peers.lightning(name, inputs, slopes, ids, backward=suffix != "fwd")
            except Exception as error:  # a peer's failure is a finding about the peer, and the other rows still count
                row.note = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
        rows.append(row)
    return rows
