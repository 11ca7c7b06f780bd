"""Lightning attention on Hopper (sm_90a) in Pallas Mosaic GPU: forward, backward and chunk states.

Every operation is a `scan` with the operands in other places (spec: the backward is three more forward calls):

    o = scan(q, k, v),   dq = scan(do, v, k),   dk = descending scan(v, do, q),   dv = descending scan(k, q, do).

With few heads the sequence is cut into pieces so that the multiprocessors are full: a first launch takes each piece's own
state, and each CTA of the second one sums those of the pieces before it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from pallas_kernels.lightning import mosaic_gpu_segments
from pallas_kernels.lightning.implementation import Heads, Operation, SegmentIds, Slopes, State
from pallas_kernels.lightning.mosaic_gpu_scan import HEAD_DIM, Job, Plan, Tuning, scan

MULTIPROCESSORS = 132
# Below this many chunks a piece does not pay for the launch that takes its state.
CHUNKS_PER_PIECE = 8

HALF = Tuning(tile=64, stages=4, outputs=2, registers=(168, 152, 32))
WHOLE = Tuning(tile=128, stages=2, outputs=1, registers=(240, 224, 40))
STATE = Tuning(tile=64, stages=4, outputs=0)

# Positions of q, k, v, do among the operands.
_Q, _K, _V, _DO = range(4)
FORWARD = Job(_Q, _K, _V)
DQ = Job(_DO, _V, _K)
DK = Job(_V, _DO, _Q, descending=True)
DV = Job(_K, _Q, _DO, descending=True)


def supports(operation: Operation, shape: tuple[int, int, int, int], dtype: DTypeLike, *, packed: bool) -> str | None:
    """Says why a call cannot run on these kernels, or None when it can; see `implementation.Implementation`."""
    del packed
    _, length, _, dim = shape
    if operation == "decode_step":
        return "decoding has no kernel here"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"q, k and v must be bfloat16, not {jnp.dtype(dtype).name}"
    if dim != HEAD_DIM:
        return f"the head dimension must be {HEAD_DIM}, not {dim}"
    if length >= 2**30:
        return f"{length} tokens are too many for 32-bit token indices"
    return None


def forward(
    q: Heads,
    k: Heads,
    v: Heads,
    slopes: Slopes,
    segment_ids: SegmentIds | None,
    initial_state: State | None,
) -> tuple[Heads, State]:
    """Runs lightning attention; see `implementation.Implementation`."""
    initial = None if initial_state is None else _transposed(initial_state)[None]
    (o,), state = _run((FORWARD,), HALF, [q, k, v], slopes, segment_ids, initial)
    return o, _transposed(state[0])


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
    """Runs the gradients of lightning attention; see `implementation.Implementation`."""
    operands = [q, k, v, do]
    # A scan's state is (c dim, b dim): of dq (k, v), of dk (q or key dim, value dim), of dv (value dim, key dim).
    ascending = None if initial_state is None else initial_state[None]
    descending = None if dstate is None else jnp.stack([dstate, _transposed(dstate)])
    (dk, dv), states = _run((DK, DV), WHOLE, operands, slopes, segment_ids, descending)
    (dq,), _ = _run((DQ,), HALF, operands, slopes, segment_ids, ascending)
    return dq, dk, dv, states[0]


def chunk_state(k: Heads, v: Heads, slopes: Slopes, segment_ids: SegmentIds | None, reverse: bool) -> State:
    """Returns the state that these tokens alone leave behind; see `implementation.Implementation`."""
    # Indexed (c dim, b dim), the state of b = v and c = k needs no transpose.
    job = Job(0, 1, 0, descending=reverse)
    batch, length, heads, _ = k.shape
    pieces = _pieces(batch * heads * (HEAD_DIM // STATE.tile), length)
    operands, description = _prepare([k, v], segment_ids, STATE)
    _, (states,) = scan(Plan((job,), pieces, STATE), operands, slopes, length=length, description=description)
    chunks = -(-length // STATE.chunk)
    per_piece = -(-chunks // pieces)
    total = jnp.zeros_like(states[:, :, 0])
    for piece in reversed(range(pieces)) if reverse else range(pieces):
        first, end = piece * per_piece, min((piece + 1) * per_piece, chunks)
        if description is None:
            age, crosses = jnp.full((batch,), min(end * STATE.chunk, length) - first * STATE.chunk), jnp.bool_(True)
        else:
            age, crosses = mosaic_gpu_segments.crossing(description, first, end, reverse)
        kept = jnp.exp(-slopes * age[:, None].astype(jnp.float32)) * crosses[..., None].astype(jnp.float32)
        total = total * kept[:, :, None, None] + states[:, :, piece]
    return total


def _transposed(state: jax.Array) -> jax.Array:
    return jnp.swapaxes(state, -1, -2)


def _prepare(
    operands: list[Heads], segment_ids: SegmentIds | None, tuning: Tuning
) -> tuple[list[Heads], jax.Array | None]:
    """Pads to the 8 tokens that a shared-memory tile needs, and describes the segments."""
    padding = -operands[0].shape[1] % 8
    if padding:
        operands = [jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in operands]
    description = None if segment_ids is None else mosaic_gpu_segments.describe(segment_ids, tuning.chunk)
    return operands, description


def _pieces(ctas: int, length: int) -> int:
    """Into how many pieces to cut sequences so that `ctas` CTAs a piece fill the multiprocessors once."""
    chunks = -(-length // STATE.chunk)
    pieces = max(1, min(MULTIPROCESSORS // ctas, chunks // CHUNKS_PER_PIECE))
    return -(-chunks // -(-chunks // pieces))  # no piece is empty


def _run(
    jobs: tuple[Job, ...],
    tuning: Tuning,
    operands: list[Heads],
    slopes: Slopes,
    segment_ids: SegmentIds | None,
    initial: jax.Array | None,
    pieces: int | None = None,
) -> tuple[list[Heads], jax.Array]:
    """Runs jobs over the whole sequence, cut into pieces when there are too few heads to fill the device."""
    batch, length, heads, _ = operands[0].shape
    operands, description = _prepare(operands, segment_ids, tuning)
    if pieces is None:
        pieces = _pieces(batch * heads * len(jobs) * (HEAD_DIM // tuning.tile), length)
    piece_states = None
    if pieces > 1:
        states = Plan(jobs, pieces, STATE)
        _, piece_states = scan(states, operands, slopes, length=length, description=description)
    outs, state = scan(
        Plan(jobs, pieces, tuning),
        operands,
        slopes,
        length=length,
        description=description,
        initial=initial,
        piece_states=piece_states,
    )
    return [out[:, :length] for out in outs], state
