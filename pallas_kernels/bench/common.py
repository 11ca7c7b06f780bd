"""What every benchmark does: choose cases, draw enough inputs, name errors, and let no peer's failure end a run."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from pallas_kernels.bench.timing import Row

CACHE_BYTES = 200e6
"""Inputs take turns over at least this much memory, four times a Hopper card's cache."""


@runtime_checkable
class Named(Protocol):
    """A case to time."""

    @property
    def name(self) -> str: ...


def chosen[Case: Named](cases: Sequence[Case], only: Sequence[str]) -> list[Case]:
    """Returns the cases whose name contains one of `only`, all of them when it is empty."""
    return [case for case in cases if not only or any(part in case.name for part in only)]


def sets(bytes_each: int) -> int:
    """Returns how many sets of inputs of this size exceed the cache, 8 at most."""
    return max(1, min(8, round(CACHE_BYTES / bytes_each) + 1))


def draw(shapes: Sequence[tuple[int, ...]]) -> list[list[jax.Array]]:
    """Draws normal bf16 arrays of these shapes, as many sets as exceed the cache."""

    @jax.jit
    def one(key: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(key, len(shapes))
        return [jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True)]

    count = sets(sum(2 * math.prod(shape) for shape in shapes))
    return [one(jax.random.key(i)) for i in range(count)]


def free(arrays: Any) -> None:
    """Gives the memory of all arrays back."""
    for array in jax.tree.leaves(arrays):
        array.delete()


def relative_errors(found: Mapping[str, jax.Array], right: Mapping[str, jax.Array]) -> dict[str, float]:
    """Returns |found - right| / |right| in the 2-norm, by name."""
    return {
        name: float(jnp.linalg.norm(found[name].astype(x.dtype) - x) / jnp.linalg.norm(x)) for name, x in right.items()
    }


def peer(row: Row, module: str, measure: Callable[[], float]) -> Row:
    """Fills in a peer's time; a peer that is missing or fails leaves a row that says so, and the others still count."""
    if importlib.util.find_spec(module) is None:
        row.note = "not installed"
        return row
    try:
        row.ms = measure()
    except Exception as error:
        row.note = f"failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:80]}"
    return row
