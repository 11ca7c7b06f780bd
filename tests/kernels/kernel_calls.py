"""The calls on which an implementation's own functions are compared with the oracle of cases.py, and their results."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from tests.kernels import cases


class Case(NamedTuple):
    """One call: sizes (B, T, N), dtype, where each row's segments begin, which tokens are padding, states or none."""

    name: str
    shape: tuple[int, int, int]
    dtype: str = "float32"
    starts: tuple[tuple[int, ...], ...] | None = None
    padding: tuple[slice, ...] = ()
    states: bool = True

    def segment_ids(self) -> np.ndarray | None:
        """Canonical ids [B, T]: 1, 2, .. in order, 0 for padding; a segment swallowed by padding leaves no gap."""
        if self.starts is None:
            return None
        batch, length, _ = self.shape
        ids = np.zeros((batch, length), np.int32)
        for row, starts, padding in zip(ids, self.starts, self.padding or (slice(0),) * batch, strict=True):
            row[:] = np.searchsorted(starts, np.arange(length), side="right") + 1
            row[padding] = 0
            row[row > 0] = np.unique(row[row > 0], return_inverse=True)[1] + 1
        return ids

    def inputs(self, dim: int) -> cases.Inputs:
        """Draws the arguments; padding is poisoned with NaN, which must not spread."""
        batch, length, heads = self.shape
        slopes = tuple(np.resize(cases.SLOPES, heads))
        ids, dtype = self.segment_ids(), np.dtype(self.dtype)
        drawn = cases.inputs(length, batch=batch, slopes=slopes, dim=dim, dtype=dtype, segment_ids=ids)
        if ids is not None:
            for x in (drawn.q, drawn.k, drawn.v, drawn.do):
                x[ids == 0] = np.nan
        return drawn


def expected(case: Case, drawn: cases.Inputs) -> dict[str, np.ndarray]:
    """Returns what every call of `calls` should return, by name, in float64."""
    nothing = np.zeros_like(drawn.initial_state)
    alone = cases.recurrence(dataclasses.replace(drawn, initial_state=nothing, dstate=nothing))
    whole = cases.recurrence(drawn) if case.states else alone
    results = {name: getattr(whole, name) for name in ("o", "state", "dq", "dk", "dv", "dinitial_state")}
    return {**results, "chunk": alone.state, "chunk_reverse": alone.dinitial_state}


def calls(case: Case, drawn: cases.Inputs) -> list[tuple[str, tuple[Any, ...], tuple[str, ...]]]:
    """Returns what to call on an implementation's module, positionally, and the names of what it returns."""
    q, k, v, do, slopes, ids = drawn.q, drawn.k, drawn.v, drawn.do, drawn.slopes, drawn.segment_ids
    initial, dstate = (drawn.initial_state, drawn.dstate) if case.states else (None, None)
    return [
        ("forward", (q, k, v, slopes, ids, initial), ("o", "state")),
        ("backward", (q, k, v, slopes, ids, initial, do, dstate), ("dq", "dk", "dv", "dinitial_state")),
        ("chunk_state", (k, v, slopes, ids, False), ("chunk",)),
        ("chunk_state", (q, do, slopes, ids, True), ("chunk_reverse",)),
    ]


def decode_expected(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, pool: np.ndarray, slopes: np.ndarray, slots: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the outputs and the pool after one token of each request, one request after another."""
    q, k, v, pool = (x.astype(np.float64) for x in (q, k, v, pool))
    o = np.zeros_like(q)
    for request, slot in enumerate(range(len(q)) if slots is None else slots):
        if 0 <= slot < len(pool):
            pool[slot] *= np.exp(-slopes.astype(np.float64))[:, None, None]
            pool[slot] += k[request][:, :, None] * v[request][:, None, :]
            o[request] = np.einsum("nk,nkv->nv", q[request], pool[slot])
    return o, pool
