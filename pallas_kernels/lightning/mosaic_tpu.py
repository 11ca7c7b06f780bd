"""Lightning attention on TPU (Pallas Mosaic TPU): forward, backward, states and decode as `implementation.py` asks.

Forward moves each of q, k, v, o once (1024 bytes per token and head in bf16); the backward makes two walks, dq forward
with the forward kernel itself and dk with dv in reverse (2560 bytes). Nothing but q, k, v is read for the backward:
states are recomputed on chip. Source: model.md 4.5-4.6, 4.11; spec kernels.md 9.1, 9.4, 9.9.

Arrays enter the kernels as [B, T, N*H]: code around the call that keeps that layout until here pays no copy.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, DTypeLike, Int

from pallas_kernels import dispatch
from pallas_kernels.lightning import mosaic_tpu_decode as decode
from pallas_kernels.lightning import mosaic_tpu_kernels as kernels
from pallas_kernels.lightning.implementation import Heads, Operation, SegmentIds, Slopes, State, Token
from pallas_kernels.lightning.mosaic_tpu_segments import ChunkRuns, chunk_runs

WIDTH = 128
HEADS_PER_STEP = 8
MAX_PACKED_CHUNKS = 1 << 17  # one int32 each in a core's scalar memory of 1 MiB
VMEM_LIMIT = 48 << 20

_interpreting: ContextVar[bool] = ContextVar("mosaic_tpu_interpreting", default=False)


@contextmanager
def interpreted() -> Iterator[None]:
    """Runs the kernels in Pallas' TPU interpreter, as on two cores, so that a CPU can check them.

    A race prints "RACE DETECTED"; memory that nobody wrote reads as NaN.
    """
    token = _interpreting.set(True)
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)):
            yield
    finally:
        _interpreting.reset(token)


class Plan(NamedTuple):
    """How a call is cut: tokens per chunk and heads per grid step."""

    chunk: int
    heads: int


def _chip() -> pltpu.TpuInfo:
    """Describes the TPU that calls traced now will run on; without one at hand (interpreter, lowering), a v5p."""
    if pltpu.is_tpu_device():
        return pltpu.get_tpu_info()
    return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5P, 2)


def plan(batch: int, heads: int) -> Plan:
    """Chooses chunk and heads per step.

    Chunks are 128 where the matrix unit is 128 wide and 256 where it is 256 wide or memory is slow (kernels.md 9.9);
    steps take up to 8 heads, fewer where a second core would otherwise idle.
    """
    info = _chip()
    chunk, cores = 256 if info.is_lite or info.mxu_column_size >= 256 else 128, info.num_cores
    divisors = [d for d in range(1, HEADS_PER_STEP + 1) if heads % d == 0]
    busy = [d for d in divisors if batch * heads // d >= cores]
    return Plan(chunk, max(busy or [1]))


def supports(operation: Operation, shape: tuple[int, int, int, int], dtype: DTypeLike, *, packed: bool) -> str | None:
    """Says why a call cannot run on the current device, or None: see `implementation.Implementation.supports`."""
    batch, length, _, width = shape
    if not (_interpreting.get() or pltpu.is_tpu_device() or dispatch.platform() == "tpu"):
        return "the device is not a TPU"
    if (generation := _chip().generation) < 5:
        return f"it needs a TPU v5 or newer, not one of generation {generation}"
    if width != WIDTH:
        return f"it is written for head dim {WIDTH}, not {width}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"it is written for bfloat16 and float32, not {jnp.dtype(dtype).name}"
    if operation != "decode_step" and packed and batch * pl.cdiv(length, 128) > MAX_PACKED_CHUNKS:
        return f"a packed batch may hold at most {MAX_PACKED_CHUNKS} chunks, not {batch * pl.cdiv(length, 128)}"
    return None


def forward(
    q: Heads, k: Heads, v: Heads, slopes: Slopes, segment_ids: SegmentIds | None, initial_state: State | None
) -> tuple[Heads, State]:
    """Returns the output [B, T, N, H] in q's dtype and the fp32 state [B, N, H, H] (model.md 4.5; INV-06, INV-36)."""
    call = _Call.of(q, slopes, segment_ids)
    o, state = call.walk(kernels.forward_kernel, {"q": q, "k": k, "v": v}, ("o",), state=initial_state)
    return o["o"], state


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
    """Returns dq, dk, dv in q's dtype and the fp32 gradient of the initial state (model.md 4.6; INV-16, INV-36).

    dq is the forward itself, on (do, v, k) and the transposed initial state.
    """
    call = _Call.of(q, slopes, segment_ids)
    turned = None if initial_state is None else initial_state.swapaxes(2, 3)
    dq, _ = call.walk(kernels.forward_kernel, {"q": do, "k": v, "v": k}, ("o",), state=turned, keep_state=False)
    given = {"q": q, "k": k, "v": v, "do": do}
    grads, dinitial = call.walk(kernels.reverse_kernel, given, ("dk", "dv"), state=dstate, reverse=True)
    return dq["o"], grads["dk"], grads["dv"], dinitial


def chunk_state(k: Heads, v: Heads, slopes: Slopes, segment_ids: SegmentIds | None, reverse: bool) -> State:
    """Returns the fp32 state [B, N, H, H] of these tokens alone; `reverse`, called on (q, do), its mirror image.

    See `implementation.Implementation.chunk_state` (model.md 4.9; INV-37, INV-38).
    """
    call = _Call.of(k, slopes, segment_ids)
    kernel = functools.partial(kernels.state_kernel, reverse=reverse)
    return call.walk(kernel, {"k": k, "v": v}, (), reverse=reverse, weighted=False)[1]


def decode_step(
    q: Token, k: Token, v: Token, state: jax.Array, slopes: Slopes, slots: Int[Array, " B"] | None
) -> tuple[Token, jax.Array]:
    """Returns the output [B, N, H] and the fp32 state pool [rows, N, H, H], advanced in place (model.md 4.11; INV-31).

    `slots` [B] names each request's row of the pool, all different; a slot outside the pool is ignored, its output 0.
    """
    # Every step moves whole states whatever the batch, so a second core is fed by heads, not by requests.
    return decode.decode_step(q, k, v, state, slopes, slots, plan(1, q.shape[1]).heads, VMEM_LIMIT)


class _Call(NamedTuple):
    """What every walk over the chunks of one call shares."""

    shape: tuple[int, int, int, int]
    dtype: jnp.dtype
    plan: Plan
    slopes: Slopes
    runs: ChunkRuns | None

    @classmethod
    def of(cls, x: Heads, slopes: Slopes, segment_ids: SegmentIds | None) -> "_Call":
        batch, length, heads, width = x.shape
        cut = plan(batch, heads)
        if segment_ids is None and length % cut.chunk:
            segment_ids = jnp.ones((batch, length), jnp.int32)
        runs = None if segment_ids is None else chunk_runs(segment_ids, cut.chunk)
        return cls((batch, length, heads, width), x.dtype, cut, slopes.astype(jnp.float32), runs)

    def walk(
        self,
        kernel: Callable[..., None],
        tensors: dict[str, Heads],
        results: tuple[str, ...],
        *,
        state: State | None = None,
        reverse: bool = False,
        keep_state: bool = True,
        weighted: bool = True,
    ) -> tuple[dict[str, Heads], Any]:
        """Runs one kernel over all chunks; returns its [B, T, N, H] results by name and, if kept, the last state."""
        (batch, length, heads, width), (chunk, step) = self.shape, self.plan
        count = pl.cdiv(length, chunk)
        padded = max(length, chunk)  # a block may hang over the end of an array, but not be longer than it

        def flat(x: Heads) -> jax.Array:
            x = x.reshape(batch, length, heads * width)
            return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0)))

        def at(c: Any) -> Any:
            return count - 1 - c if reverse else c

        block = pl.BlockSpec((1, chunk, step * width), lambda b, g, c, *_: (b, at(c), g))
        states = pl.BlockSpec((1, step, width, width), lambda b, g, c, *_: (b, g, 0, 0))
        run = pl.BlockSpec((1, 2, chunk), lambda b, g, c, *_: (b, 0, at(c)))
        modes, runs = (None, None) if self.runs is None else self.runs
        scalars = {"slopes": self.slopes, "modes": modes}
        inputs = {**{name: flat(x) for name, x in tensors.items()}, "runs": runs, "state": state}
        specs = {**dict.fromkeys(tensors, block), "runs": run, "state": states}
        out_shape = {name: jax.ShapeDtypeStruct((batch, padded, heads * width), self.dtype) for name in results}
        end = jax.ShapeDtypeStruct((batch, heads, width, width), jnp.float32)

        def vmem(*shape: int) -> Any:
            return pltpu.VMEM(shape, jnp.float32)

        tables = {"enter": vmem(step, chunk, width), "leave": vmem(step, chunk, width)}
        tables["weights"] = vmem(step, chunk, chunk) if weighted else None
        out = pl.pallas_call(
            kernel,
            out_shape={**out_shape, "state": end if keep_state else None},
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(batch, heads // step, count),
                in_specs=[{name: None if inputs[name] is None else spec for name, spec in specs.items()}],
                out_specs={**dict.fromkeys(results, block), "state": states if keep_state else None},
                scratch_shapes=[{"state": vmem(step, width, width), "tables": tables}],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
            ),
            cost_estimate=self._cost(len(tensors), len(results)),
            name=f"lightning_{'_'.join(results) or 'state'}",
        )(scalars, inputs)
        final = out.pop("state")
        return {name: x[:, :length].reshape(self.shape) for name, x in out.items()}, final

    def _cost(self, read: int, written: int) -> pl.CostEstimate:
        """Tells XLA's scheduler what one walk costs: `read` tensors in, `written` out, a state product per output."""
        tokens = math.prod(self.shape[:3])
        per_token = 2 * WIDTH * (2 * self.plan.chunk * written + WIDTH * (written + 1))
        moved = tokens * WIDTH * self.dtype.itemsize * (read + written)
        return pl.CostEstimate(flops=tokens * per_token, bytes_accessed=moved, transcendentals=0)
