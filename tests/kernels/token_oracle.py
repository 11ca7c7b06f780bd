"""Lightning attention and its gradients token by token in float64, and the calls on which kernels are compared with it.

Forward is model.md 4.4; the backward is that recurrence run from the last token to the first, its state being the
gradient of the state. Nothing is chunked and no power of the decay is formed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SLOPES = (0.917, 5e-5, 0.1, 0.0039)


class Case(NamedTuple):
    """One call: sizes, dtype, where each row's segments begin, which tokens are padding, whether states come in."""

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

    def tensors(self, width: int) -> dict[str, np.ndarray]:
        """Random q, k, v, do, states; padding is poisoned with NaN, which must not spread."""
        batch, length, heads = self.shape
        random = np.random.default_rng(sum(map(ord, self.name)))
        tensors = {name: random.normal(size=(batch, length, heads, width)) for name in ("q", "k", "v", "do")}
        if (ids := self.segment_ids()) is not None:
            for x in tensors.values():
                x[ids == 0] = np.nan
        tensors = {name: np.asarray(jnp.asarray(x, self.dtype)) for name, x in tensors.items()}
        for name in ("initial_state", "dstate"):
            tensors[name] = random.normal(size=(batch, heads, width, width)).astype(np.float32)
        return tensors

    def slopes(self) -> np.ndarray:
        return np.resize(np.array(SLOPES, np.float32), self.shape[2])


def expected(case: Case, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns o, state, dq, dk, dv, dinitial, and chunk_state's results `chunk` and `chunk_reverse`, all float64."""
    batch, length, heads = case.shape
    q, k, v, do = (np.nan_to_num(tensors[name].astype(np.float64)) for name in ("q", "k", "v", "do"))
    ids = case.segment_ids()
    ids = np.ones((batch, length), int) if ids is None else ids
    decay = np.exp(-case.slopes().astype(np.float64))[None, :, None, None]
    zeros = np.zeros((batch, heads, q.shape[3], q.shape[3]))
    initial = tensors["initial_state"].astype(np.float64) if case.states else zeros
    out = {name: np.zeros_like(q) for name in ("o", "dq", "dk", "dv")}

    def pick(where: np.ndarray, x: Any, y: Any) -> np.ndarray:
        return np.where(where[:, None, None, None], x, y)

    def add(state: np.ndarray, same: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return pick(same, state, 0) + x[..., :, None] * y[..., None, :]

    state, chunk, current, history = initial, zeros, np.ones(batch, int), []
    for t in range(length):
        real, same = ids[:, t] > 0, ids[:, t] == current
        current = np.where(real, ids[:, t], current)
        state = pick(real, add(decay * state, same, k[:, t], v[:, t]), state)
        chunk = pick(real, add(decay * chunk, same, k[:, t], v[:, t]), chunk)
        history.append(state)
        out["o"][:, t] = np.einsum("bnk,bnkv->bnv", q[:, t], state) * real[:, None, None]
    # The gradient of the state after token t is complete once token t's own output has been added.
    gradient = tensors["dstate"].astype(np.float64) if case.states else zeros
    reverse, later = zeros, current
    for t in range(length - 1, -1, -1):
        real, same = ids[:, t] > 0, ids[:, t] == later
        later = np.where(real, ids[:, t], later)
        gradient = pick(real, add(gradient, same, q[:, t], do[:, t]), gradient)
        reverse = pick(real, add(reverse, same, q[:, t], do[:, t]), reverse)
        out["dq"][:, t] = np.einsum("bnkv,bnv->bnk", history[t], do[:, t]) * real[:, None, None]
        out["dk"][:, t] = np.einsum("bnkv,bnv->bnk", gradient, v[:, t]) * real[:, None, None]
        out["dv"][:, t] = np.einsum("bnk,bnkv->bnv", k[:, t], gradient) * real[:, None, None]
        gradient, reverse = pick(real, decay * gradient, gradient), pick(real, decay * reverse, reverse)
    first = later == 1
    out |= {"state": state, "chunk": chunk}
    return out | {"dinitial": pick(first, gradient, 0), "chunk_reverse": pick(first, reverse, 0)}


def calls(case: Case, tensors: dict[str, np.ndarray]) -> list[tuple[str, tuple[Any, ...], tuple[str, ...]]]:
    """Returns what to call on an implementation's module, positionally, and the names of what it returns."""
    q, k, v, do = (tensors[name] for name in ("q", "k", "v", "do"))
    initial, dstate = (tensors["initial_state"], tensors["dstate"]) if case.states else (None, None)
    slopes, ids = case.slopes(), case.segment_ids()
    return [
        ("forward", (q, k, v, slopes, ids, initial), ("o", "state")),
        ("backward", (q, k, v, slopes, ids, initial, do, dstate), ("dq", "dk", "dv", "dinitial")),
        ("chunk_state", (k, v, slopes, ids, False), ("chunk",)),
        ("chunk_state", (q, do, slopes, ids, True), ("chunk_reverse",)),
    ]


def decode_expected(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, pool: np.ndarray, slopes: np.ndarray, slots: np.ndarray | None
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


def relative(actual: Any, wanted: np.ndarray) -> float:
    """Relative L2 distance; infinite where one is not finite or a wanted zero tensor is not zero."""
    actual = np.asarray(jax.device_get(actual)).astype(np.float64)
    if not np.isfinite(actual).all():
        return float("inf")
    distance, size = np.linalg.norm(actual - wanted), np.linalg.norm(wanted)
    return float(distance / size) if size else (0.0 if distance == 0 else float("inf"))
