"""Times the gated joint norm, forward and forward with backward, beside its XLA form and fla's gated RMSNorm."""

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench import peers
from pallas_kernels.bench.timing import Row, milliseconds
from pallas_kernels.norm_gate import norm_gate

PEERS = ("xla", "fla")
DIM = 128
EPS = 1e-6
CACHE_BYTES = 200e6
"""Inputs take turns over at least this much memory, four times a Hopper card's cache."""

TENSORS = {"fwd": 3, "fwd+bwd": 8}
"""Tensors of x's size that are read or written: x, gate, y; then x, gate, dy, dx, dgate."""

Inputs = Sequence[Sequence[jax.Array]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape to time."""

    name: str
    batch: int
    length: int
    heads: int


CASES = (
    Case("R: B1 T8192 N64", 1, 8192, 64),
    Case("B4 T8192 N64", 4, 8192, 64),
    Case("B1 T8192 N16", 1, 8192, 16),
)


def run(peer_names: list[str], only: list[str]) -> list[Row]:
    """Measures every case whose name contains one of `only` (all when empty), ours and the peers'.

    Times go to stderr as they come, so that a run that is cut short is not lost.
    """
    rows: list[Row] = []
    for case in CASES:
        if only and not any(part in case.name for part in only):
            continue
        inputs = _draw(case)
        found = [_timed(case, what, "ours", inputs) for what in TENSORS]
        for row in found:
            row.errors = _errors(inputs[0], backward=row.case.endswith("bwd"))
        found += [_timed(case, what, name, inputs) for name in peer_names for what in TENSORS]
        rows += found
        for array in jax.tree.leaves(inputs):
            array.delete()
    return rows


def _draw(case: Case) -> Inputs:
    """Random x, gate logits and dy in bf16 and an fp32 weight near 1, as often as they take to exceed the cache."""
    shape = (case.batch, case.length, case.heads, DIM)
    sets = max(1, min(8, round(CACHE_BYTES / (3 * 2 * case.batch * case.length * case.heads * DIM)) + 1))

    @jax.jit
    def draw(key: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(key, 4)
        x, gate, dy = (jax.random.normal(k, shape, jnp.bfloat16) for k in keys[:3])
        return [x, gate, 1 + 0.1 * jax.random.normal(keys[3], shape[2:], jnp.float32), dy]

    return [draw(jax.random.key(i)) for i in range(sets)]


def _call(implementation: str | None, backward: bool, *arguments: jax.Array) -> Any:
    """The output, and with `backward` the gradients of x, gate logits and weight."""
    x, gate, weight, dy = arguments
    y, pull = jax.vjp(
        lambda x, gate, weight: norm_gate(x, gate, weight, EPS, implementation=implementation), x, gate, weight
    )
    return (y, *pull(dy)) if backward else y


def _timed(case: Case, what: str, name: str, inputs: Inputs) -> Row:
    elements = case.batch * case.length * case.heads * DIM
    row = Row(f"{case.name} {what}", name, bytes=2 * TENSORS[what] * elements)
    backward = what == "fwd+bwd"
    if name == "fla" and importlib.util.find_spec("fla") is None:
        row.note = "not installed"
    elif name == "fla":
        try:
            row.ms = _fla(inputs, backward)
        except Exception as error:  # a peer's failure is a finding about the peer, and the other rows still count
            row.note = f"failed: {type(error).__name__}: {str(error)[:80].splitlines()[:1]}"
    else:
        row.ms = milliseconds(jax.jit(functools.partial(_call, None if name == "ours" else name, backward)), inputs)
    print(f"{row.case} {row.implementation}: {row.ms} ms {row.note}", file=sys.stderr, flush=True)
    return row


def _errors(inputs: Sequence[jax.Array], backward: bool, tokens: int = 1024) -> dict[str, float]:
    """Relative L2 errors over the first tokens, against the XLA form on the same numbers in fp32."""
    x, gate, weight, dy = inputs
    arguments = [x[:1, :tokens], gate[:1, :tokens], weight, dy[:1, :tokens]]
    found = jax.jit(functools.partial(_call, None, True))(*arguments)
    right = jax.jit(functools.partial(_call, "xla", True))(*(a.astype(jnp.float32) for a in arguments))
    names = ("y", "dx", "dgate", "dweight")[: 4 if backward else 1]
    return {
        name: float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
        for name, a, b in zip(names, found, right)
    }


def _fla(inputs: Inputs, backward: bool) -> float:
    """fla's RMSNorm with sigmoid gate over rows of all heads' channels."""
    import torch
    from fla.modules.norm.fused_norm_gate import rms_norm_gated

    def tensor(x: jax.Array) -> Any:
        flat = x.reshape(-1) if x.ndim == 2 else x.reshape(-1, x.shape[2] * x.shape[3])
        return torch.utils.dlpack.from_dlpack(flat).clone()

    sets = [[tensor(a).requires_grad_(i < 3 and backward) for i, a in enumerate(arguments)] for arguments in inputs]

    def call(x: Any, gate: Any, weight: Any, dy: Any) -> None:
        y = rms_norm_gated(x, gate, weight, None, activation="sigmoid", eps=EPS)
        if backward:
            torch.autograd.grad(y, (x, gate, weight), dy)

    return peers._torch_milliseconds(call, sets)
