"""Times lightning attention, forward and forward with backward, against the copy ceiling and its peers."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench import common, peers
from pallas_kernels.bench.timing import Row, milliseconds, turn
from pallas_kernels.lightning import lightning_attention

PEERS = peers.LIGHTNING
DIM = 128
CHUNK = 64
TENSORS = {"fwd": 4, "fwd+bwd": 11}
"""Tensors of q's size that are read or written: q, k, v, o; then q, k, v, do, dq, dk, dv."""
REPEATED = 8192 * 4 * 64
"""Largest number of tokens times heads at which repeats are compared bit by bit."""

Inputs = Sequence[Sequence[jax.Array]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape to time, with the number of segments of random lengths in each row when it is packed.

    Peers are not asked to run what takes most of the card's memory.
    """

    name: str
    batch: int
    length: int
    heads: int
    segments: int = 0
    backward: bool = True
    peers: bool = True

    @property
    def elements(self) -> int:
        """How many there are in one tensor."""
        return self.batch * self.length * self.heads * DIM

    @property
    def passes(self) -> tuple[str, ...]:
        return tuple(TENSORS)[: 1 + self.backward]


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
    Case("B1 T1048576 N16", 1, 1048576, 16, peers=False),
    Case("B1 T524288 N64", 1, 524288, 64, peers=False),
    Case("B1 T1048576 N64", 1, 1048576, 64, backward=False, peers=False),
)


def run(peer_names: list[str], only: list[str]) -> Iterator[Row]:
    """Measures the cases whose names contain one of `only` (all when empty), ours and the peers'; rows as they come."""
    for case in common.chosen(CASES, only):
        inputs, slopes, ids = _draw(case)
        yield from _ours(case, inputs, slopes, ids)
        for name in peer_names if case.peers else ():
            for what in case.passes:
                measure = functools.partial(peers.lightning, name, inputs, slopes, ids, backward=what != "fwd")
                yield common.peer(_row(case, what, name), name, measure)
        common.free(inputs)


def _row(case: Case, what: str, name: str) -> Row:
    nominal = 2 * CHUNK * DIM + 4 * DIM**2
    flops = {"fwd": 1.0, "fwd+bwd": 3.5}[what] * nominal * case.elements / DIM
    return Row(f"{case.name} {what}", name, bytes=TENSORS[what] * 2 * case.elements, flops=flops)


def _draw(case: Case) -> tuple[list[list[jax.Array]], jax.Array, jax.Array | None]:
    """Random inputs as the model has them: q, k, v past SiLU (and do), the slopes of the first layer.

    Piece by piece, since the longest sequences leave no room for a draw's temporaries.
    """
    pieces = math.gcd(case.length, max(1, case.elements // (8192 * 64 * DIM)))
    part = (case.batch, case.length // pieces, case.heads, DIM)

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key: jax.Array, gradient: bool) -> jax.Array:
        def place(i: jax.Array, x: jax.Array) -> jax.Array:
            piece = jax.random.normal(jax.random.fold_in(key, i), part, jnp.bfloat16)
            piece = piece if gradient else jax.nn.silu(piece)
            return jax.lax.dynamic_update_slice_in_dim(x, piece, i * part[1], axis=1)

        return jax.lax.fori_loop(0, pieces, place, jnp.zeros((case.batch, case.length, case.heads, DIM), jnp.bfloat16))

    tensors = 3 + case.backward
    keys = jax.random.split(jax.random.key(0), (common.sets(2 * tensors * case.elements), tensors))
    slopes = 2.0 ** (-8.0 * jnp.arange(1, case.heads + 1, dtype=jnp.float32) / case.heads)
    ids = None
    if case.segments:
        borders = jnp.sort(jax.random.randint(jax.random.key(1), (case.segments - 1,), 1, case.length))
        row = jnp.searchsorted(borders, jnp.arange(case.length), side="right") + 1
        ids = jnp.broadcast_to(row.astype(jnp.int32), (case.batch, case.length))
    return [[draw(key, i == 3) for i, key in enumerate(row)] for row in keys], slopes, ids


def _ours(case: Case, inputs: Inputs, slopes: jax.Array, ids: jax.Array | None) -> Iterator[Row]:
    def forward(q: jax.Array, k: jax.Array, v: jax.Array, *do: jax.Array) -> jax.Array:
        return lightning_attention(q, k, v, slopes, segment_ids=ids)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        o, pull = jax.vjp(lambda q, k, v: lightning_attention(q, k, v, slopes, segment_ids=ids), q, k, v)
        return o, pull(do)

    functions: dict[str, Callable[..., Any]] = {"fwd": forward, "fwd+bwd": both}
    for what in case.passes:
        row = _row(case, what, "ours")
        compiled = jax.jit(functions[what]).lower(*inputs[0]).compile()
        notes = [_memory(compiled, inputs[0])]
        row.ms = milliseconds(compiled, inputs)
        if what == "fwd+bwd":
            row.errors = _errors(inputs[0], slopes, ids)
            notes += [_repeats(compiled, inputs[0])] if case.elements <= REPEATED * DIM else []
        row.note = ", ".join(note for note in notes if note)
        yield row


def _memory(compiled: jax.stages.Compiled, arguments: Sequence[jax.Array]) -> str:
    """What a call takes beside its arguments and results, as a share of these: by the allocator, else the compiler."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return ""
    given, returned = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    extra, how = analysis.temp_size_in_bytes, "planned"
    (device,) = arguments[0].devices()
    if before := device.memory_stats():
        jax.block_until_ready(compiled(*arguments))
        after = device.memory_stats()
        # The peak has no reset: it is this call's only if it is a new one.
        if after["peak_bytes_in_use"] > before["peak_bytes_in_use"]:
            extra, how = after["peak_bytes_in_use"] - before["bytes_in_use"] - returned, "measured"
    return f"work space {100 * extra / (given + returned):.1f}% ({how})"


def _repeats(compiled: jax.stages.Compiled, arguments: Sequence[jax.Array], times: int = 20) -> str:
    """Says how many of these many calls gave the first one's bits."""

    @jax.jit
    def equal(a: Any, b: Any) -> jax.Array:
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return jnp.stack([jnp.all(x.view(jnp.uint16) == y.view(jnp.uint16)) for x, y in pairs]).all()

    with turn():
        first = compiled(*arguments)
        same = sum(bool(equal(first, compiled(*arguments))) for _ in range(times))
    return f"{same} of {times} repeats bit-identical"


def _errors(
    inputs: Sequence[jax.Array], slopes: jax.Array, ids: jax.Array | None, tokens: int = 8192
) -> dict[str, float]:
    """Relative L2 errors of the fastest and the slowest head over the first tokens against the fp32 recurrence."""
    heads = jnp.array([0, slopes.shape[0] - 1])
    q, k, v, do = (x[:1, :tokens][:, :, heads] for x in inputs)
    ids = None if ids is None else ids[:1, :tokens]

    def results(implementation: str | None, *arrays: jax.Array) -> dict[str, jax.Array]:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            return lightning_attention(
                q, k, v, slopes[heads], segment_ids=ids, return_state=True, implementation=implementation
            )

        (o, state), pull = jax.vjp(attend, *arrays[:3])
        dq, dk, dv = pull((arrays[3], jnp.zeros_like(state)))
        return {"o": o, "state": state, "dq": dq, "dk": dk, "dv": dv}

    wide = [x.astype(jnp.float32) for x in (q, k, v, do)]
    with jax.default_matmul_precision("highest"):
        right = jax.jit(functools.partial(results, "reference")).lower(*wide).compile()
    found = jax.jit(functools.partial(results, None)).lower(q, k, v, do).compile()
    with turn():
        return common.relative_errors(found(q, k, v, do), right(*wide))
