"""Times lightning attention, forward and forward with backward, against the copy ceiling and its peers."""

import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench import common, peers
from pallas_kernels.bench.timing import Row, milliseconds
from pallas_kernels.lightning import lightning_attention

PEERS = peers.LIGHTNING
DIM = 128
CHUNK = 64
AHEAD = 4
"""So many cases are being compiled while another is timed."""
TOGETHER = 4
"""Calls of one program where a call of its own would be over before the host has queued the next one."""
SHORT = 8192 * 16 * DIM
"""Elements of a tensor up to which that is so."""
TENSORS = {"fwd": 4, "fwd+bwd": 11}
"""Tensors of q's size that are read or written: q, k, v, o; then q, k, v, do, dq, dk, dv."""

Inputs = Sequence[Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape to time.

    Attributes:
        name: what is printed.
        batch, length, heads: the shape.
        segments: of random lengths in each row, 0 when it is not packed.
        backward: whether the gradients are timed too.
        peers: whether these are asked to run it: not where it takes most of the card's memory.
        checked: whether its results are compared with the recurrence and with those of repeated calls.
    """

    name: str
    batch: int
    length: int
    heads: int
    segments: int = 0
    backward: bool = True
    peers: bool = True
    checked: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, T, N, H] of every tensor."""
        return self.batch, self.length, self.heads, DIM

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def together(self) -> int:
        """Calls in a program that is timed."""
        return TOGETHER if self.elements <= SHORT else 1

    @property
    def passes(self) -> tuple[str, ...]:
        return tuple(TENSORS)[: 1 + self.backward]


CASES = (
    Case("R: B1 T8192 N64", 1, 8192, 64, checked=True),
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
    """Measures the cases whose names contain one of `only` (all when empty), ours and the peers'; rows as they come.

    Compiling takes up to half a minute for a function: the next cases' begins before a case is timed.
    """
    cases = common.chosen(CASES, only)
    compiling: dict[tuple[Case, str, str], concurrent.futures.Future[jax.stages.Compiled]] = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as executor:
        for index, case in enumerate(cases):
            for later in cases[index + AHEAD if index else 0 : index + AHEAD + 1]:
                for name, what in _asked(later, peer_names):
                    if name in ATTEND:
                        compiling[later, name, what] = _compiling(executor, later, name, what)
            concurrent.futures.wait([future for call, future in compiling.items() if call[0] is case])
            tokens = _draw(case)
            for name, what in _asked(case, peer_names):
                yield _timed(case, name, what, compiling.get((case, name, what)), tokens)
            common.free(tokens)


def _asked(case: Case, peer_names: list[str]) -> list[tuple[str, str]]:
    """Whose and which of their passes are timed."""
    return [(name, what) for name in ("ours", *(peer_names if case.peers else ())) for what in case.passes]


def _compiling(
    executor: concurrent.futures.Executor, case: Case, name: str, what: str
) -> concurrent.futures.Future[jax.stages.Compiled]:
    """Lowers here, since that is Python, and compiles on another thread; what fails raises when it is asked for."""
    tensor = jax.ShapeDtypeStruct(case.shape, jnp.bfloat16)
    arguments = (*[tensor] * 3, tensor if case.backward else None, *jax.eval_shape(lambda: _shared(case, name)))
    try:
        lowered = jax.jit(functools.partial(_calls, name, what)).lower(*[arguments] * case.together)
    except Exception as error:
        failed: concurrent.futures.Future[jax.stages.Compiled] = concurrent.futures.Future()
        failed.set_exception(error)
        return failed
    return executor.submit(lowered.compile)


def _timed(
    case: Case,
    name: str,
    what: str,
    compiling: concurrent.futures.Future[jax.stages.Compiled] | None,
    tokens: Inputs,
) -> Row:
    row, shared = _row(case, what, name), _shared(case, name)
    if compiling is None:
        return common.peer(row, name, functools.partial(peers.fla, tokens, *shared, backward=what != "fwd"))
    sets = [(*arrays, *shared) for arrays in tokens]
    starts = range(0, case.together * len(sets), case.together)
    inputs = [[sets[(start + i) % len(sets)] for i in range(case.together)] for start in starts]
    if name != "ours":
        return common.peer(row, name, lambda: milliseconds(compiling.result(), inputs) / case.together)
    compiled = compiling.result()
    notes = [_memory(compiled, inputs[0]) if case.together == 1 else f"{case.together} calls a program"]
    row.ms = milliseconds(compiled, inputs) / case.together
    if case.checked and what == "fwd+bwd":
        row.errors = _errors(*sets[0])
        notes.append(_repeats(compiled, inputs[0]))
    row.note = ", ".join(note for note in notes if note)
    return row


def _row(case: Case, what: str, name: str) -> Row:
    nominal = 2 * CHUNK * DIM + 4 * DIM**2
    flops = {"fwd": 1.0, "fwd+bwd": 3.5}[what] * nominal * case.elements / DIM
    return Row(f"{case.name} {what}", name, bytes=TENSORS[what] * 2 * case.elements, flops=flops)


def _draw(case: Case) -> Inputs:
    """Random inputs as the model has them: q, k and v past SiLU, and do.

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

        return jax.lax.fori_loop(0, pieces, place, jnp.zeros(case.shape, jnp.bfloat16))

    tensors = 3 + case.backward
    keys = jax.random.split(jax.random.key(0), (common.sets(2 * tensors * case.elements), 4))
    return [[draw(key, i == 3) if i < tensors else None for i, key in enumerate(row)] for row in keys]


def _shared(case: Case, name: str) -> tuple[jax.Array, jax.Array | None]:
    """The decay as an implementation takes it, of the first layer, and the segment ids [B, T] of packed rows.

    Both are arguments of what is timed: nothing that follows from them is computed by the compiler.
    """
    decay = 2.0 ** (-8.0 * jnp.arange(1, case.heads + 1, dtype=jnp.float32) / case.heads)
    if name == "jla":
        decay = jnp.broadcast_to(-decay, case.shape[:3])
    if not case.segments:
        return decay, None
    borders = jnp.sort(jax.random.randint(jax.random.key(1), (case.segments - 1,), 1, case.length))
    row = jnp.searchsorted(borders, jnp.arange(case.length), side="right") + 1
    return decay, jnp.broadcast_to(row.astype(jnp.int32), (case.batch, case.length))


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array, ids: jax.Array | None) -> jax.Array:
    return lightning_attention(q, k, v, slopes, segment_ids=ids)


ATTEND: dict[str, Callable[..., jax.Array]] = {"ours": _attend, "jla": peers.jla}
"""Those in JAX; fla is not."""


def _call(
    name: str,
    what: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array | None,
    decay: jax.Array,
    ids: jax.Array | None,
) -> Any:
    """The output, and forward and backward also the gradients of q, k and v."""
    if what == "fwd":
        return ATTEND[name](q, k, v, decay, ids)
    o, pull = jax.vjp(lambda q, k, v: ATTEND[name](q, k, v, decay, ids), q, k, v)
    return o, pull(do)


def _calls(name: str, what: str, *sets: Sequence[Any]) -> list[Any]:
    """What calls on several sets of arguments return, each after the other."""
    call = jax.jit(functools.partial(_call, name, what))
    results: list[Any] = []
    for arguments in sets:
        if results:
            arguments, results[-1] = jax.lax.optimization_barrier((arguments, results[-1]))
        results.append(call(*arguments))
    return results


def _memory(compiled: jax.stages.Compiled, arguments: Sequence[Any]) -> str:
    """What a call takes beside its arguments and results, as a share of these: by the allocator, else the compiler."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return ""
    given, returned = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    extra, how = analysis.temp_size_in_bytes, "planned"
    (device,) = jax.tree.leaves(arguments)[0].devices()
    if before := device.memory_stats():
        jax.block_until_ready(compiled(*arguments))
        after = device.memory_stats()
        # The peak has no reset: it is this call's only if it is a new one.
        if after["peak_bytes_in_use"] > before["peak_bytes_in_use"]:
            extra, how = after["peak_bytes_in_use"] - before["bytes_in_use"] - returned, "measured"
    return f"work space {100 * extra / (given + returned):.1f}% ({how})"


def _repeats(compiled: jax.stages.Compiled, arguments: Sequence[Any], times: int = 20) -> str:
    """Says how many of these many calls gave the first one's bits."""

    @jax.jit
    def equal(a: Any, b: Any) -> jax.Array:
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return jnp.stack([jnp.all(x.view(jnp.uint16) == y.view(jnp.uint16)) for x, y in pairs]).all()

    first = compiled(*arguments)
    same = sum(bool(equal(first, compiled(*arguments))) for _ in range(times))
    return f"{same} of {times} repeats bit-identical"


def _errors(
    q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, slopes: jax.Array, ids: jax.Array | None
) -> dict[str, float]:
    """Relative L2 errors of the fastest and the slowest head over the first tokens against the fp32 recurrence.

    All heads are computed, since how the work is cut depends on their number.
    """
    tokens, heads = 8192, jnp.array([0, slopes.shape[0] - 1])
    given = [x[:1, :tokens] for x in (q, k, v, do)]
    ids = None if ids is None else ids[:1, :tokens]

    def results(
        implementation: str | None, slopes: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array
    ) -> dict[str, jax.Array]:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            return lightning_attention(
                q, k, v, slopes, segment_ids=ids, return_state=True, implementation=implementation
            )

        (o, state), pull = jax.vjp(attend, q, k, v)
        dq, dk, dv = pull((do, jnp.zeros_like(state)))
        return {"o": o, "state": state, "dq": dq, "dk": dk, "dv": dv}

    found = jax.jit(functools.partial(results, None))(slopes, *given)
    found = {name: jnp.take(x, heads, axis=1 if name == "state" else 2) for name, x in found.items()}
    with jax.default_matmul_precision("highest"):
        two = [x[:, :, heads].astype(jnp.float32) for x in given]
        right = jax.jit(functools.partial(results, "reference"))(slopes[heads], *two)
    return common.relative_errors(found, right)
