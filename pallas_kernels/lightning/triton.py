"""Lightning attention in Triton through jax-triton, for GPUs before Hopper: simple, and correct.

The backward is three more walks of the forward kernel, two of them reversed (model.md 4.6). `triton` and `jax_triton`
are imported at the first call, so that this module can be asked `supports` anywhere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Int

from pallas_kernels import triton_launch
from pallas_kernels.lightning.implementation import Heads, Operation, SegmentIds, Slopes, State, Token
from pallas_kernels.triton_launch import launch as _launch

WIDTHS = (16, 32, 64, 128)
DECODE_COLUMNS, DECODE_WARPS = 64, 4


def supports(operation: Operation, shape: tuple[int, int, int, int], dtype: DTypeLike, *, packed: bool) -> str | None:
    """Says why a call cannot run on the current device, or None: see `implementation.Implementation.supports`."""
    if reason := triton_launch.obstacle((jnp.bfloat16, jnp.float32), dtype):
        return reason
    if shape[3] not in WIDTHS:
        return f"it is written for head dims {WIDTHS}, not {shape[3]}"
    return None


def forward(
    q: Heads, k: Heads, v: Heads, slopes: Slopes, segment_ids: SegmentIds | None, initial_state: State | None
) -> tuple[Heads, State]:
    """Returns the output [B, T, N, H] in q's dtype and the fp32 state [B, N, H, H] (model.md 4.5; INV-06, INV-36)."""
    return _scan(q, k, v, slopes, segment_ids, initial_state)


def backward(
    q: Heads,
    k: Heads,
    v: Heads,
    slopes: Slopes,
    segment_ids: SegmentIds | None,
    initial_state: State | None,
    do: Heads,
    dstate: State | None,
) -> tuple[Heads, Heads, Heads, State]:
    """Returns dq, dk, dv in q's dtype and the fp32 gradient of the initial state (model.md 4.6; INV-16, INV-36)."""
    dq, _ = _scan(do, v, k, slopes, segment_ids, _turned(initial_state))
    dk, _ = _scan(v, do, q, slopes, segment_ids, _turned(dstate), reverse=True)
    dv, dinitial = _scan(k, q, do, slopes, segment_ids, dstate, reverse=True)
    return dq, dk, dv, dinitial


def chunk_state(k: Heads, v: Heads, slopes: Slopes, segment_ids: SegmentIds | None, reverse: bool) -> State:
    """Returns the fp32 state [B, N, H, H] of these tokens alone; `reverse`, called on (q, do), its mirror image.

    See `implementation.Implementation.chunk_state` (model.md 4.9; INV-37, INV-38).
    """
    return _scan(None, k, v, slopes, segment_ids, None, reverse=reverse)[1]


def decode_step(
    q: Token, k: Token, v: Token, state: jax.Array, slopes: Slopes, slots: Int[Array, " B"] | None
) -> tuple[Token, jax.Array]:
    """Returns the output [B, N, H] and the fp32 state pool [rows, N, H, H], advanced in place (model.md 4.11; INV-31).

    `slots` [B] names each request's row of the pool, all different; a slot outside the pool is ignored, its output 0.
    """
    from pallas_kernels.lightning import triton_kernels

    batch, heads, width = q.shape
    columns = min(width, DECODE_COLUMNS)
    slopes = slopes.astype(jnp.float32)
    o, pool = _launch(
        triton_kernels.decode_kernel,
        (q, k, v, slopes, slopes if slots is None else slots, state),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(state.shape, state.dtype)),
        (batch * heads, width // columns),
        {"POOL": state.shape[0], "HEADS": heads, "WIDTH": width, "COLUMNS": columns, "SLOTS": slots is not None},
        aliases={5: 1},
        warps=DECODE_WARPS,
    )
    return o, pool


class _Tiling(NamedTuple):
    """Tokens per chunk, state columns per program, software pipeline stages; always four warps."""

    chunk: int
    columns: int
    stages: int

    @classmethod
    def of(cls, width: int, dtype: jnp.dtype) -> "_Tiling":
        # With 64 tokens the compiler runs out of registers for sm_80 (500 bytes a thread go to memory; with 32, at most
        # 60). fp32 tiles are twice as large: without pipelining they stay below the 99 KiB of sm_86 and sm_89.
        return cls(32, min(width, 64), 2 if dtype.itemsize == 2 else 1)


def _turned(state: State | None) -> State | None:
    return None if state is None else state.swapaxes(2, 3)


def _arriving(ids: Int[Array, "B T"], chunk: int) -> Int[Array, "B chunks"]:
    """Returns the id of the last real token before each chunk; before the first one, the first segment's."""
    batch, length = ids.shape
    ids = jnp.pad(ids, ((0, 0), (0, -length % chunk))).reshape(batch, -1, chunk)
    newest = jax.lax.cummax(jnp.maximum(ids.max(axis=2), 1), axis=1)
    return jnp.concatenate([jnp.ones_like(newest[:, :1]), newest[:, :-1]], axis=1)


def _scan(
    x: Heads | None,
    y: Heads,
    z: Heads,
    slopes: Slopes,
    ids: SegmentIds | None,
    start: State | None,
    *,
    reverse: bool = False,
) -> tuple[jax.Array, State]:
    """Runs `triton_kernels.scan_kernel`: see there. Without x only the state is meant, and the output is a scalar."""
    from pallas_kernels.lightning import triton_kernels

    batch, length, heads, width = y.shape
    tiling = _Tiling.of(width, y.dtype)
    slopes = slopes.astype(jnp.float32)
    # A kernel's arguments are all there or the kernel is another one: `slopes` stands in for those it will not read.
    optional = (
        slopes if ids is None else ids,
        slopes if ids is None else _arriving(ids, tiling.chunk),
        slopes if start is None else start,
    )
    out, end = _launch(
        triton_kernels.scan_kernel,
        (y if x is None else x, y, z, slopes, *optional),
        (
            jax.ShapeDtypeStruct(() if x is None else y.shape, y.dtype),
            jax.ShapeDtypeStruct((batch, heads, width, width), jnp.float32),
        ),
        (batch * heads, width // tiling.columns),
        {
            "LENGTH": length,
            "HEADS": heads,
            "WIDTH": width,
            "COLUMNS": tiling.columns,
            "CHUNK": tiling.chunk,
            "CHUNKS": -(-length // tiling.chunk),
            "REVERSE": reverse,
            "PACKED": ids is not None,
            "HAS_START": start is not None,
            "HAS_OUT": x is not None,
            "PRECISION": "ieee",
        },
        stages=tiling.stages,
    )
    return out, end
