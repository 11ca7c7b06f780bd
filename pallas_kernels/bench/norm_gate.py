"""Times the gated joint norm, forward and forward with backward, beside its XLA form and fla's gated RMSNorm."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench import common, peers
from pallas_kernels.bench.timing import Row, milliseconds, torch_milliseconds
from pallas_kernels.norm_gate import norm_gate

PEERS = ("xla", "fla")
DIM = 128
EPS = 1e-6
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


def run(peer_names: list[str], only: list[str]) -> Iterator[Row]:
    """Measures the cases whose names contain one of `only` (all when empty), ours and the peers'; rows as they come."""
    for case in common.chosen(CASES, only):
        shape = (case.batch, case.length, case.heads, DIM)
        # The weight is near 1 and fp32.
        weight = 1 + 0.1 * jax.random.normal(jax.random.key(0), shape[2:], jnp.float32)
        inputs = [[x, gate, weight, dy] for x, gate, dy in common.draw([shape] * 3)]
        for name in ("ours", *peer_names):
            for what in TENSORS:
                yield _timed(case, what, name, inputs)
        common.free([arrays[:2] + arrays[3:] for arrays in inputs])


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
    if name == "fla":
        return common.peer(row, "fla", functools.partial(_fla, inputs, backward))
    row.ms = milliseconds(jax.jit(functools.partial(_call, None if name == "ours" else name, backward)), inputs)
    if name == "ours":
        row.errors = _errors(inputs[0], backward=backward)
    return row


def _errors(inputs: Sequence[jax.Array], backward: bool, tokens: int = 1024) -> dict[str, float]:
    """Relative L2 errors over the first tokens, against the XLA form on the same numbers in fp32."""
    x, gate, weight, dy = inputs
    arguments = [x[:1, :tokens], gate[:1, :tokens], weight, dy[:1, :tokens]]
    found = jax.jit(functools.partial(_call, None, True))(*arguments)
    right = jax.jit(functools.partial(_call, "xla", True))(*(a.astype(jnp.float32) for a in arguments))
    names = ("y", "dx", "dgate", "dweight")[: 4 if backward else 1]
    return common.relative_errors(dict(zip(names, found)), dict(zip(names, right)))


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

    with peers.configurations_compiled_together():
        return torch_milliseconds(call, sets)
