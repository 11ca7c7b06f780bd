"""Oracles in numpy fp64 and inputs that the kernels' tests share.

Nothing here is taken from the implementations: `recurrence` follows model.md 4.4 token by token, with segments and
padding as its words say, and its gradients come from walking the recurrence backwards.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np

SLOPES = (0.917, 0.1, 0.0039, 5e-5)
"""The slopes of issue and specification: Text-01's fastest head, two between, and its slowest. One head each."""

LENGTHS = (1, 7, 63, 64, 65, 255, 257, 1000, 4096)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arguments of lightning attention and the gradients arriving at its results, as numpy arrays.

    q, k, v, do: [B, T, N, H] in the dtype under test. slopes: [N]. segment_ids: [B, T] int32 or None.
    initial_state, dstate: [B, N, H, H].
    """

    q: Any
    k: Any
    v: Any
    do: Any
    slopes: np.ndarray
    segment_ids: np.ndarray | None
    initial_state: np.ndarray
    dstate: np.ndarray


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the recurrence gives, in fp64."""

    o: np.ndarray
    state: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dinitial_state: np.ndarray


def inputs(
    length: int,
    *,
    batch: int = 2,
    slopes: tuple[float, ...] = SLOPES,
    dim: int = 16,
    dtype: Any = np.float32,
    segment_ids: np.ndarray | None = None,
    seed: int = 0,
) -> Inputs:
    """Draws inputs of the given dtype; q, k and v have passed SiLU, so that slow heads' states grow as in the model."""
    rng = np.random.default_rng([seed, length, batch, dim])
    heads = len(slopes)
    q, k, v, do = rng.normal(size=(4, batch, length, heads, dim))
    q, k, v = (x / (1 + np.exp(-x)) for x in (q, k, v))
    wide = np.float64 if np.dtype(dtype) == np.float64 else np.float32
    initial_state, dstate = (rng.normal(size=(batch, heads, dim, dim)).astype(wide) for _ in range(2))
    tokens = (x.astype(dtype) for x in (q, k, v, do))
    return Inputs(*tokens, np.asarray(slopes, wide), segment_ids, initial_state, dstate)


def recurrence(x: Inputs) -> Expected:
    """Walks S_t = exp(-slope) S_{t-1} + k_t v_t^T, o_t = q_t^T S_t forwards, and its gradient backwards."""
    q, k, v, do = (np.asarray(a, np.float64) for a in (x.q, x.k, x.v, x.do))
    ids = np.ones(q.shape[:2], int) if x.segment_ids is None else x.segment_ids
    decay = np.exp(-x.slopes.astype(np.float64))[:, None, None]
    keep = _kept(ids)[..., None, None, None]
    o, dq, dk, dv = (np.zeros_like(q) for _ in range(4))

    state = x.initial_state.astype(np.float64)
    for t in range(q.shape[1]):
        real = (ids[:, t] > 0)[:, None, None]
        new = keep[:, t] * decay * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        state = np.where(real[..., None], new, state)
        o[:, t] = np.where(real, np.einsum("bnh,bnhv->bnv", q[:, t], state), 0)
        dq[:, t] = np.where(real, np.einsum("bnv,bnhv->bnh", do[:, t], state), 0)

    dstate = x.dstate.astype(np.float64)
    for t in reversed(range(q.shape[1])):
        real = (ids[:, t] > 0)[:, None, None]
        arriving = dstate + q[:, t, :, :, None] * do[:, t, :, None, :]
        dk[:, t] = np.where(real, np.einsum("bnv,bnhv->bnh", v[:, t], arriving), 0)
        dv[:, t] = np.where(real, np.einsum("bnh,bnhv->bnv", k[:, t], arriving), 0)
        dstate = np.where(real[..., None], keep[:, t] * decay * arriving, dstate)
    return Expected(o, state, dq, dk, dv, dstate)


def _kept(ids: np.ndarray) -> np.ndarray:
    """Says for each token whether the state before it reaches it [B, T]: 0 where a segment starts after another."""
    keep = np.ones(ids.shape)
    for row, kept in zip(ids, keep):
        previous = 0
        for t, segment in enumerate(row):
            if segment > 0:
                kept[t] = previous in (0, segment)
                previous = segment
    return keep


def packed(batch: int, length: int, *, seed: int = 0) -> np.ndarray:
    """Draws segment ids [B, T]: segments of many lengths, ids that come again, padding on both sides and within.

    Row 0 is one segment without padding, so that a state passes through; the last row, if not the first, is all padding
    but for one token.
    """
    rng = np.random.default_rng([seed, batch, length])
    ids = np.ones((batch, length), np.int32)
    for b in range(1, batch):
        borders = np.sort(rng.integers(0, length + 1, size=rng.integers(0, 5)))
        ids[b] = rng.permutation([3, 1, 2, 1, 4])[np.searchsorted(borders, np.arange(length), side="right")]
        ids[b, rng.random(length) < 0.1] = 0
        ids[b, : rng.integers(0, length // 4 + 1)] = 0
        ids[b, length - rng.integers(0, length // 4 + 1) :] = 0
    if batch > 1:
        ids[-1] = 0
        ids[-1, length // 2] = 7
    return ids


def segments(lengths: tuple[int, ...], *, multiple: int = 1) -> np.ndarray:
    """Returns one row [1, T] of segments 1, 2, .. of these lengths, each padded with 0 to a multiple."""
    parts = []
    for index, length in enumerate(lengths):
        padding = -length % multiple
        parts += [np.full(length, index + 1, np.int32), np.zeros(padding, np.int32)]
    return np.concatenate(parts)[None]


def relative(actual: Any, expected: np.ndarray) -> float:
    """Returns |actual - expected| / |expected| in the 2-norm; infinity where something is not finite."""
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    if not np.all(np.isfinite(actual)):
        return float("inf")
    scale = np.linalg.norm(expected)
    error = np.linalg.norm(actual - expected)
    return float(error / scale if scale else error)


def bound(dtype: Any, *, state: bool = False, length: int = 4096) -> float:
    """Returns the largest relative error allowed: for bf16 3e-3 (1.5e-3 in the state), else rounding with room to grow.

    The gradients of a few bf16 tokens are products of two rounded numbers that nothing averages: 2^-8.
    """
    if np.dtype(dtype) == ml_dtypes.bfloat16:
        return 1.5e-3 if state else 3e-3 if length >= 8 else 2.0**-8
    return {np.dtype(np.float32): 3e-6, np.dtype(np.float64): 1e-12}[np.dtype(dtype)]


def as_jax(x: Inputs) -> Inputs:
    """Moves the inputs to the default device."""
    return Inputs(
        **{
            field.name: None if (value := getattr(x, field.name)) is None else jnp.asarray(value)
            for field in dataclasses.fields(x)
        }
    )


@contextlib.contextmanager
def annotations_unchecked() -> Iterator[None]:
    """Lets wrong shapes through to the functions' own checks, as outside tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
