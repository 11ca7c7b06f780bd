"""Lightning attention on Hopper (sm_90a) in Pallas Mosaic GPU: forward, backward and chunk states.

Every operation is a `scan` with the operands in other places (spec: the backward is three more forward calls):

    o = scan(q, k, v),   dq = scan(do, v, k),   dk = descending scan(v, do, q),   dv = descending scan(k, q, do).

Jobs may share a launch. With few heads the sequence is cut into pieces so that the multiprocessors are full: a first
launch takes each piece's own state, and each CTA of the second one sums those of the pieces before it. Which jobs
share, how wide a CTA is and how many pieces there are follows from the measured time of a step.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from pallas_kernels.lightning import mosaic_gpu_segments
from pallas_kernels.lightning.implementation import Heads, Operation, SegmentIds, Slopes, State
from pallas_kernels.lightning.mosaic_gpu_plan import HEAD_DIM, Job, Plan, Tuning
from pallas_kernels.lightning.mosaic_gpu_scan import scan

HALF = Tuning(tile=64, stages=4, outputs=2, registers=(168, 160, 24), terms=2)
WHOLE = Tuning(tile=128, stages=2, outputs=1, registers=(248, 224, 32), terms=2)
STATE = Tuning(tile=64, stages=4, outputs=0, terms=2)
# One term is exact enough for gradients (2e-3), not for a returned state (1.6e-3).
HALF_ONE, WHOLE_ONE, STATE_ONE = (dataclasses.replace(tuning, terms=1) for tuning in (HALF, WHOLE, STATE))

MULTIPROCESSORS = 132
# On an H100: microseconds of a step of a CTA where memory does not limit it, of a launch, of adding a piece's state;
# bytes that a microsecond moves, by columns a CTA (two of 64 columns read a and b twice, once of it from the cache).
STEP = {HALF: 1.25, HALF_ONE: 1.2, WHOLE: 1.95, WHOLE_ONE: 1.7, STATE: 0.86, STATE_ONE: 0.8}
LAUNCH = 4.0
ADD_PIECE = 1.0
BANDWIDTH = {64: 2.75e6, 128: 2.95e6}
MOST_PIECES = 16

# Positions of q, k, v, do among the operands.
_Q, _K, _V, _DO = range(4)
FORWARD = Job(_Q, _K, _V)
DQ = Job(_DO, _V, _K)
DK = Job(_V, _DO, _Q, descending=True)
DV = Job(_K, _Q, _DO, descending=True)
# The state of the first is that of the second, the other way round.
MIRROR = (DV, DK)


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
    initial = {} if initial_state is None else {FORWARD: _transposed(initial_state)}
    results = _run([[(FORWARD,)]], [HALF, WHOLE], [q, k, v], slopes, segment_ids, initial)
    o, state = results[FORWARD]
    return o, _transposed(state)


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
    # A job's state is indexed (c dim, b dim): that of dq (key, value), of dk (key, value), of dv (value, key).
    initial = {} if initial_state is None else {DQ: initial_state}
    if dstate is not None:
        initial |= {DK: dstate, DV: _transposed(dstate)}
    groupings: list[list[tuple[Job, ...]]] = [[(DK, DV, DQ)], [(DK, DV), (DQ,)]]
    tunings = [HALF_ONE, WHOLE_ONE] if initial_state is None else [HALF, WHOLE]
    results = _run(groupings, tunings, [q, k, v, do], slopes, segment_ids, initial)
    return results[DQ][0], results[DK][0], results[DV][0], results[DK][1]


def chunk_state(k: Heads, v: Heads, slopes: Slopes, segment_ids: SegmentIds | None, reverse: bool) -> State:
    """Returns the state that these tokens alone leave behind; see `implementation.Implementation`."""
    # Indexed (c dim, b dim), the state of b = v and c = k needs no transpose.
    job = Job(0, 1, 0, descending=reverse)
    batch, length, heads, _ = k.shape
    chunks = -(-length // STATE.chunk)
    pieces = min(range(1, MOST_PIECES + 1), key=lambda p: _cost(Plan((job,), p, STATE), batch * heads, chunks))
    operands, description = _prepare([k, v], segment_ids, STATE)
    _, (states,) = scan(Plan((job,), pieces, STATE), operands, slopes, length=length, description=description)
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
    operands: list[jax.Array], segment_ids: SegmentIds | None, tuning: Tuning
) -> tuple[list[jax.Array], jax.Array | None]:
    """Pads to the 8 tokens that a shared-memory tile needs, and describes the segments."""
    padding = -operands[0].shape[1] % 8
    if padding:
        operands = [jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in operands]
    description = None if segment_ids is None else mosaic_gpu_segments.describe(segment_ids, tuning.chunk)
    return operands, description


def _cost(plan: Plan, rows: int, chunks: int) -> float:
    """Estimates the microseconds of a plan over `rows` heads of all sequences, its state launch included."""
    steps = -(-chunks // plan.pieces)
    if steps * (plan.pieces - 1) >= chunks:
        return float("inf")  # a piece would be empty
    ctas = rows * len(plan.jobs) * (HEAD_DIM // plan.tuning.tile) * plan.pieces
    if plan.tuning.outputs and len(plan.jobs) > 2 and ctas > MULTIPROCESSORS:
        return float("inf")  # the jobs of a head drift apart and read the same operands from memory again
    busy = -(-ctas // MULTIPROCESSORS) * steps * STEP[plan.tuning]
    moved = _tensors(plan) * rows * chunks * plan.tuning.chunk * HEAD_DIM * 2 / BANDWIDTH[plan.tuning.tile]
    time = max(busy, moved) + LAUNCH + ADD_PIECE * (plan.pieces - 1)
    if plan.pieces > 1 and plan.tuning.outputs:
        states = _states_only(plan)
        time += _cost(states, rows, chunks) + LAUNCH * (len(states.jobs) < len(plan.jobs))
    return time


def _tensors(plan: Plan) -> int:
    """How many arrays a launch reads or writes whole."""
    outputs = len(plan.jobs) if plan.tuning.outputs else 0
    read = {x for job in plan.jobs for x in ((job.a, job.b, job.c) if outputs else (job.b, job.c))}
    return len(read) + outputs


def _states_only(plan: Plan) -> Plan:
    """The launch that takes the states which the pieces of a plan leave behind, without those that mirror another."""
    mirror, of = MIRROR
    jobs = tuple(job for job in plan.jobs if job != mirror or of not in plan.jobs)
    return Plan(jobs, plan.pieces, STATE if plan.tuning.terms == 2 else STATE_ONE)


def _plans(
    groupings: Sequence[Sequence[tuple[Job, ...]]], tunings: Sequence[Tuning], rows: int, chunks: int
) -> list[Plan]:
    """Chooses the launches that are estimated to take the shortest time, among the ways to group the jobs."""

    def best(jobs: tuple[Job, ...]) -> Plan:
        options = itertools.product(range(1, MOST_PIECES + 1), tunings)
        return min((Plan(jobs, pieces, tuning) for pieces, tuning in options), key=lambda p: _cost(p, rows, chunks))

    choices = [[best(jobs) for jobs in grouping] for grouping in groupings]
    return min(choices, key=lambda plans: sum(_cost(plan, rows, chunks) for plan in plans))


def _run(
    groupings: Sequence[Sequence[tuple[Job, ...]]],
    tunings: Sequence[Tuning],
    operands: list[Heads],
    slopes: Slopes,
    segment_ids: SegmentIds | None,
    initial: dict[Job, jax.Array],
) -> dict[Job, tuple[Heads, State]]:
    """Runs jobs over whole sequences; returns each one's output and the state it ends with, (c dim, b dim)."""
    batch, length, heads, dim = operands[0].shape
    operands, description = _prepare(operands, segment_ids, HALF)
    results = {}
    for plan in _plans(groupings, tunings, batch * heads, -(-length // HALF.chunk)):
        piece_states = None
        if plan.pieces > 1:
            states_only = _states_only(plan)
            _, found = scan(states_only, operands, slopes, length=length, description=description)
            by_job = dict(zip(states_only.jobs, found, strict=True))
            piece_states = jnp.stack([by_job[j] if j in by_job else _transposed(by_job[MIRROR[1]]) for j in plan.jobs])
        start = None
        if any(job in initial for job in plan.jobs):
            zeros = jnp.zeros((batch, heads, dim, dim), jnp.float32)
            start = jnp.stack([initial.get(job, zeros) for job in plan.jobs])
        outs, states = scan(
            plan,
            operands,
            slopes,
            length=length,
            description=description,
            initial=start,
            piece_states=piece_states,
        )
        for job, out, state in zip(plan.jobs, outs, states):
            results[job] = (out[:, :length], state)
    return results
