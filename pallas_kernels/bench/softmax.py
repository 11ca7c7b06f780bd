"""Times softmax attention over key ranges, forward and forward with backward, beside cuDNN through JAX and torch.

Neither peer has key ranges: packed rows are timed for them as a batch of rows of the segments' mean length, which needs
fewer operations than segments of mixed lengths do.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench import common
from pallas_kernels.bench.timing import Row, milliseconds, torch_milliseconds
from pallas_kernels.softmax import softmax_attention

PEERS = ("cudnn", "torch")
DIM = 128
SCALE = DIM**-0.5
PASSES = {"fwd": 1.0, "fwd+bwd": 3.5}
"""Nominal operations by those of the forward, whose two products the backward's five follow."""

Inputs = Sequence[Sequence[jax.Array]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape to time: plainly causal, packed with segments of the given lengths, or the last queries of many keys.

    Attributes:
        name: what is printed.
        batch, queries, keys, heads, key_heads: the shape.
        segments: lengths in each row, () when it is not packed.
        peers: whether these can run it, or its like.
    """

    name: str
    batch: int
    queries: int
    keys: int
    heads: int = 16
    key_heads: int = 2
    segments: tuple[int, ...] = ()
    peers: bool = True

    @property
    def pairs(self) -> int:
        """How many pairs of query and key there are a row and head."""
        if self.segments:
            return sum(length * (length + 1) // 2 for length in self.segments)
        return self.queries * (2 * self.keys - self.queries + 1) // 2


def mixed_lengths(count: int, mean: int) -> tuple[int, ...]:
    """Returns lengths between half and one and a half times the mean, in an order without system."""
    lengths = np.linspace(mean // 2, 3 * mean // 2, count).astype(int)
    lengths[-1] += count * mean - lengths.sum()
    return tuple(int(n) for n in np.random.default_rng(0).permutation(lengths))


CASES = (
    Case("causal B2 T8192", 2, 8192, 8192),
    Case("causal B1 T32768", 1, 32768, 32768),
    Case("packed 16 mixed T32768", 1, 32768, 32768, segments=mixed_lengths(16, 2048)),
    Case("packed 16 equal T32768", 1, 32768, 32768, segments=(2048,) * 16),
    Case("packed 64 mixed T32768", 1, 32768, 32768, segments=mixed_lengths(64, 512)),
    Case("offset T8192 of S65536", 1, 8192, 65536, peers=False),
)


def run(peer_names: list[str], only: list[str]) -> Iterator[Row]:
    """Measures the cases whose names contain one of `only` (all when empty), ours and the peers'; rows as they come.

    Rows named "triton" force that implementation where another would be chosen.
    """
    for case in common.chosen(CASES, only):
        queries = (case.batch, case.queries, case.heads, DIM)
        keys = (case.batch, case.keys, case.key_heads, DIM)
        inputs = common.draw([queries, keys, keys, queries])
        start, end = key_ranges(case)
        plain = not case.segments and case.queries == case.keys
        for row in _ours(case, "ours", inputs, *((None, None) if plain else (start, end))):
            row.errors = _errors(inputs[0], start, end, backward=row.case.endswith("bwd"))
            yield row
        if plain and jax.default_backend() == "gpu":
            yield from _ours(case, "triton", inputs, start, end)
        for name in peer_names if case.peers else ():
            yield from _peer(case, name, inputs)
        common.free(inputs)


def key_ranges(case: Case) -> tuple[jax.Array, jax.Array]:
    """Returns k_start and k_end [B, T] of a case."""
    end = np.arange(case.keys - case.queries, case.keys) + 1
    lengths = case.segments
    start = np.repeat(np.cumsum(lengths) - lengths, lengths) if lengths else np.zeros_like(end)
    shape = (case.batch, case.queries)
    return jnp.asarray(np.broadcast_to(start, shape), jnp.int32), jnp.asarray(np.broadcast_to(end, shape), jnp.int32)


def _row(case: Case, what: str, name: str, *, pairs: int) -> Row:
    queries, keys = (case.batch * case.queries * case.heads, case.batch * case.keys * case.key_heads)
    tensors = 2 * queries + 2 * keys if what == "fwd" else 5 * queries + 6 * keys
    flops = PASSES[what] * 4 * DIM * case.batch * case.heads * pairs
    return Row(f"{case.name} {what}", name, bytes=2 * DIM * tensors, flops=flops)


def _both(attend: Any) -> Any:
    def run(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        o, pull = jax.vjp(attend, q, k, v)
        return o, pull(do)

    return run


def _ours(case: Case, name: str, inputs: Inputs, start: jax.Array | None, end: jax.Array | None) -> Iterator[Row]:
    attend = functools.partial(
        softmax_attention, scale=SCALE, k_start=start, k_end=end, implementation=None if name == "ours" else name
    )
    for what in PASSES:
        row = _row(case, what, name, pairs=case.pairs)
        function = _both(attend) if what == "fwd+bwd" else lambda q, k, v, do: attend(q, k, v)
        row.ms = milliseconds(jax.jit(function), inputs)
        yield row


def _errors(
    inputs: Sequence[jax.Array], start: jax.Array, end: jax.Array, *, backward: bool, tokens: int = 2048
) -> dict[str, float]:
    """Relative L2 errors of the first queries of one key head's first two heads against all scores at once in fp32."""
    q, do = (x[:1, :tokens, :2] for x in (inputs[0], inputs[3]))
    k, v = (x[:1, : 2 * tokens, :1] for x in inputs[1:3])
    start, end = (jnp.minimum(x[:1, :tokens], k.shape[1]) for x in (start, end))

    def results(implementation: str | None, q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        o, pull = jax.vjp(
            lambda q, k, v: softmax_attention(
                q, k, v, scale=SCALE, k_start=start, k_end=end, implementation=implementation
            ),
            q,
            k,
            v,
        )
        return dict(zip(("o", "dq", "dk", "dv"), (o, *pull(do)) if backward else (o,)))

    found = jax.jit(functools.partial(results, None))(q, k, v, do)
    right = jax.jit(functools.partial(results, "dense"))(*(x.astype(jnp.float32) for x in (q, k, v, do)))
    return common.relative_errors(found, right)


def _peer(case: Case, name: str, inputs: Inputs) -> Iterator[Row]:
    """Times a peer on the case, or on its like: a batch of rows of the segments' mean length."""
    rows_each = max(1, len(case.segments))
    length = case.queries // rows_each
    batches = [[x.reshape(-1, length, *x.shape[2:]) for x in arrays] for arrays in inputs]
    for what in PASSES:
        row = _row(case, what, name, pairs=rows_each * length * (length + 1) // 2)
        row.note = f"as a batch of {case.batch * rows_each} x {length}" if case.segments else ""
        measure = functools.partial({"cudnn": _cudnn, "torch": _torch}[name], batches, backward=what == "fwd+bwd")
        yield common.peer(row, "jax" if name == "cudnn" else name, measure)


def _cudnn(inputs: Inputs, *, backward: bool) -> float:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, scale=SCALE, is_causal=True, implementation="cudnn")

    return milliseconds(jax.jit(_both(attend) if backward else lambda q, k, v, do: attend(q, k, v)), inputs)


def _torch(inputs: Inputs, *, backward: bool) -> float:
    import torch
    from torch.nn import attention, functional

    def tensor(x: jax.Array, leaf: bool) -> Any:
        return torch.utils.dlpack.from_dlpack(x).clone().transpose(1, 2).requires_grad_(leaf)

    sets = [[tensor(x, i < 3 and backward) for i, x in enumerate(arrays)] for arrays in inputs]

    def call(q: Any, k: Any, v: Any, do: Any) -> None:
        with attention.sdpa_kernel(attention.SDPBackend.CUDNN_ATTENTION):
            o = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
        if backward:
            torch.autograd.grad(o, (q, k, v), do)

    return torch_milliseconds(call, sets)
