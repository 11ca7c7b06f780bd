"""Times the grouped matmul: forward, gradient of the rows, gradient of the weights, beside torch and a batched einsum.

The einsum is the capacity form of a mixture of experts: as many rows for each expert, whose gather is not counted.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench import common
from pallas_kernels.bench.timing import Row, milliseconds, torch_milliseconds
from pallas_kernels.grouped_matmul import grouped_matmul

PEERS = ("torch", "einsum")
PRODUCTS = ("fwd", "dx", "dw", "fwd+bwd")

Inputs = Sequence[Sequence[jax.Array]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape to time: `rows` rows of `width` channels over `experts` matrices [width, hidden]."""

    name: str
    rows: int
    experts: int
    width: int
    hidden: int

    def group_sizes(self) -> np.ndarray:
        """Returns how many rows each expert has: within about a third of their mean, all rows together."""
        share = np.random.default_rng(0).dirichlet(np.full(self.experts, 8.0))
        sizes = np.floor(share * self.rows).astype(np.int32)
        sizes[0] += self.rows - sizes.sum()
        return sizes


CASES = (
    Case("M32768 E32 D2048 F3072", 32768, 32, 2048, 3072),
    Case("M16384 E32 D6144 F9216", 16384, 32, 6144, 9216),
)


def run(peer_names: list[str], only: list[str]) -> Iterator[Row]:
    """Measures the cases whose names contain one of `only` (all when empty), ours and the peers'; rows as they come."""
    for case in common.chosen(CASES, only):
        inputs = common.draw(
            [(case.rows, case.width), (case.experts, case.width, case.hidden), (case.rows, case.hidden)]
        )
        sizes = jnp.asarray(case.group_sizes())
        errors = _errors(case)
        for what in PRODUCTS:
            row = _row(case, what, "ours")
            row.ms = milliseconds(_ours(what, sizes), inputs)
            row.errors = {"fwd": {"y": errors["y"]}, "fwd+bwd": errors}.get(what) or {what: errors[what]}
            yield row
            for name in peer_names:
                measure = functools.partial({"einsum": _einsum, "torch": _torch}[name], case, what, inputs)
                yield common.peer(_row(case, what, name), "jax" if name == "einsum" else name, measure)
        common.free(inputs)


def _row(case: Case, what: str, name: str) -> Row:
    x, w, y = case.rows * case.width, case.experts * case.width * case.hidden, case.rows * case.hidden
    elements = x + w + y if what != "fwd+bwd" else 3 * (x + w) + 2 * y
    flops = 2.0 * case.rows * case.width * case.hidden * (3 if what == "fwd+bwd" else 1)
    return Row(f"{case.name} {what}", name, bytes=2 * elements, flops=flops)


def _results(product: Callable[..., jax.Array], what: str, x: jax.Array, w: jax.Array, dy: jax.Array) -> Any:
    """Returns one of the products alone, or all three."""
    y, pull = jax.vjp(product, x, w)
    return {"fwd": lambda: y, "dx": lambda: pull(dy)[0], "dw": lambda: pull(dy)[1], "fwd+bwd": lambda: (y, *pull(dy))}[
        what
    ]()


def _ours(what: str, sizes: jax.Array) -> Callable[..., Any]:
    return jax.jit(functools.partial(_results, lambda x, w: grouped_matmul(x, w, sizes), what))


def _errors(case: Case, rows: int = 1000, experts: int = 4) -> dict[str, float]:
    """Relative L2 errors of a smaller problem, one expert of which is empty, against fp32 expert by expert."""
    width, hidden = min(case.width, 2048), min(case.hidden, 2048)
    sizes = np.asarray([rows - 600, 0, 333, 267], np.int32)
    shapes = ((rows, width), (experts, width, hidden), (rows, hidden))
    x, w, dy = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))
    found = _ours("fwd+bwd", jnp.asarray(sizes))(x, w, dy)
    wide = [np.asarray(a, np.float32) for a in (x, w, dy)]
    right = [np.zeros((rows, hidden), np.float32), np.zeros((rows, width), np.float32), np.zeros_like(wide[1])]
    for expert, end in enumerate(np.cumsum(sizes)):
        own = slice(end - sizes[expert], end)
        right[0][own] = wide[0][own] @ wide[1][expert]
        right[1][own] = wide[2][own] @ wide[1][expert].T
        right[2][expert] = wide[0][own].T @ wide[2][own]
    return {
        name: float(np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b))
        for name, a, b in zip(("y", "dx", "dw"), found, right)
    }


def _einsum(case: Case, what: str, inputs: Inputs) -> float:
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum("ecd,edf->ecf", x.reshape(case.experts, -1, case.width), w).reshape(case.rows, case.hidden)

    return milliseconds(jax.jit(functools.partial(_results, product, what)), inputs)


def _torch(case: Case, what: str, inputs: Inputs) -> float:
    import torch

    ends = torch.tensor(np.cumsum(case.group_sizes()), dtype=torch.int32, device="cuda")
    sets = [[torch.utils.dlpack.from_dlpack(x) for x in arrays] for arrays in inputs]
    products = {
        "fwd": lambda x, w, dy: torch._grouped_mm(x, w, offs=ends),
        "dx": lambda x, w, dy: torch._grouped_mm(dy, w.transpose(1, 2), offs=ends),
        "dw": lambda x, w, dy: torch._grouped_mm(x.t(), dy, offs=ends),
    }

    def call(x: Any, w: Any, dy: Any) -> None:
        for name in products if what == "fwd+bwd" else (what,):
            products[name](x, w, dy)

    return torch_milliseconds(call, sets)
