"""Lightning attention on Hopper (sm_90a) in Pallas Mosaic GPU: forward, backward and chunk states.

Every operation is a `scan` with the operands in other places (spec: the backward is three more forward calls):

    o = scan(q, k, v),   dq = scan(do, v, k),   dk = descending scan(v, do, q),   dv = descending scan(k, q, do).

Jobs may share a launch. With few heads the sequence is cut into pieces so that the multiprocessors are full: one
launch gathers the states that parts of pieces leave behind, a second one sums those before each piece. The states that
enter the forward's pieces are, transposed, those of dq; dk and dv begin with each other's. Which jobs share, how wide a
CTA is and how many pieces there are follows from the measured time of a step.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Int

from pallas_kernels import hopper
from pallas_kernels.lightning import mosaic_gpu_segments
from pallas_kernels.lightning.implementation import Heads, Operation, Slopes, State
from pallas_kernels.lightning.mosaic_gpu_plan import HEAD_DIM, Gather, Job, Plan, Tuning
from pallas_kernels.lightning.mosaic_gpu_scan import scan
from pallas_kernels.lightning.mosaic_gpu_segments import Description
from pallas_kernels.lightning.mosaic_gpu_states import enter, gather

HALF = Tuning(tile=64, stages=4, outputs=2, registers=(136, 176, 24), terms=2)
WHOLE = Tuning(tile=128, stages=2, outputs=1, registers=(216, 248, 40), terms=2)
# One term is exact enough for gradients (2e-3), not for a returned state (1.6e-3).
HALF_ONE, WHOLE_ONE = (dataclasses.replace(tuning, terms=1) for tuning in (HALF, WHOLE))

# On an H100: microseconds of a step of a CTA where memory does not limit it, of a launch; bytes that a microsecond
# moves, by columns a CTA (two of 64 columns read a and b twice, once of it from the cache).
STEP = {HALF: 1.08, HALF_ONE: 0.87, WHOLE: 1.8, WHOLE_ONE: 1.44}
LAUNCH = 2.5
BANDWIDTH = {64: 2.9e6, 128: 2.95e6}
# A step of a CTA that gathers states, with so many products of the matrix units for each warpgroup.
GATHER_STEP = {1: 0.7, 2: 1.05, 4: 2.0}
MOST_PIECES = 16
MOST_PARTS = 4

# Positions of q, k, v, do among the operands.
_Q, _K, _V, _DO = range(4)
FORWARD = Job(_Q, _K, _V)
DQ = Job(_DO, _V, _K)
DK = Job(_V, _DO, _Q, descending=True)
DV = Job(_K, _Q, _DO, descending=True)
FORWARDS: list[list[tuple[Job, ...]]] = [[(FORWARD,)]]
BACKWARDS: list[list[tuple[Job, ...]]] = [[(DK, DV, DQ)], [(DK, DV), (DQ,)]]


def supports(operation: Operation, shape: tuple[int, int, int, int], dtype: DTypeLike, *, packed: bool) -> str | None:
    """Says why a call cannot run on these kernels, or None when it can; see `implementation.Implementation`."""
    del packed
    _, length, _, dim = shape
    if operation == "decode_step":
        return "decoding has no kernel here"
    if reason := hopper.obstacle():
        return reason
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"q, k and v must be bfloat16, not {jnp.dtype(dtype).name}"
    if dim != HEAD_DIM:
        return f"the head dimension must be {HEAD_DIM}, not {dim}"
    if length >= 2**30:
        return f"{length} tokens are too many for 32-bit token indices"
    return None


def describe(segment_ids: Int[Array, "B T"]) -> Description:
    """Describes packed rows, in place of canonical segment ids; see `implementation.Implementation`."""
    return mosaic_gpu_segments.describe(segment_ids, HALF.chunk)


def forward(
    q: Heads,
    k: Heads,
    v: Heads,
    slopes: Slopes,
    description: Description | None,
    initial_state: State | None,
) -> tuple[Heads, State]:
    """Runs lightning attention; see `implementation.Implementation`."""
    o, state, _ = forward_saving(q, k, v, slopes, description, initial_state)
    return o, state


def forward_saving(
    q: Heads,
    k: Heads,
    v: Heads,
    slopes: Slopes,
    description: Description | None,
    initial_state: State | None,
) -> tuple[Heads, State, jax.Array | None]:
    """Runs lightning attention and returns also what spares `backward` a launch, if anything; see `Implementation`."""
    initial = {} if initial_state is None else {FORWARD: _transposed(initial_state)}
    batch, length, heads, _ = q.shape
    rows, chunks = batch * heads, -(-length // HALF.chunk)
    (plan,) = _plans(FORWARDS, [HALF, WHOLE], rows, chunks)
    results, entering = _run([plan], [q, k, v], slopes, description, initial)
    o, state = results[FORWARD]
    backwards = _plans(BACKWARDS, _gradient_tunings(initial_state), rows, chunks, known=plan.pieces)
    useful = any(other.jobs == (DQ,) and 1 < other.pieces == plan.pieces for other in backwards)
    return o, _transposed(state), entering if useful else None


def _gradient_tunings(initial_state: State | None) -> list[Tuning]:
    return [HALF_ONE, WHOLE_ONE] if initial_state is None else [HALF, WHOLE]


def backward(
    q: Heads,
    k: Heads,
    v: Heads,
    slopes: Slopes,
    description: Description | None,
    initial_state: State | None,
    do: Heads,
    dstate: State | None,
    saved: jax.Array | None = None,
) -> tuple[Heads, Heads, Heads, State]:
    """Runs the gradients of lightning attention; see `implementation.Implementation`."""
    # A job's state is indexed (c dim, b dim): that of dq (key, value), of dk (key, value), of dv (value, key).
    initial = {} if initial_state is None else {DQ: initial_state}
    if dstate is not None:
        initial |= {DK: dstate, DV: _transposed(dstate)}
    batch, length, heads, _ = q.shape
    known = 0 if saved is None else saved.shape[3]
    tunings = _gradient_tunings(initial_state)
    plans = _plans(BACKWARDS, tunings, batch * heads, -(-length // HALF.chunk), known=known)
    results, _ = _run(plans, [q, k, v, do], slopes, description, initial, saved)
    return results[DQ][0], results[DK][0], results[DV][0], results[DK][1]


def chunk_state(k: Heads, v: Heads, slopes: Slopes, description: Description | None, reverse: bool) -> State:
    """Returns the state that these tokens alone leave behind; see `implementation.Implementation`."""
    # Indexed (c dim, b dim), the state of b = v and c = k needs no transpose.
    job = Job(0, 1, 0, descending=reverse)
    batch, length, heads, _ = k.shape
    chunks = -(-length // HALF.chunk)
    options = [Gather((job,), pieces, skip_last=False) for pieces in range(1, MOST_PIECES + 1)]
    plan = min(options, key=lambda option: _gather_cost(option, batch * heads, chunks) + option.pieces)
    pieces = plan.pieces
    (states,) = gather(plan, _padded([k, v]), slopes, length=length, description=description)
    per_piece = -(-chunks // pieces)
    total = jnp.zeros_like(states[:, :, 0])
    for piece in reversed(range(pieces)) if reverse else range(pieces):
        first, end = piece * per_piece, min((piece + 1) * per_piece, chunks)
        if description is None:
            age, crosses = jnp.full((batch,), min(end * HALF.chunk, length) - first * HALF.chunk), jnp.bool_(True)
        else:
            age, crosses = mosaic_gpu_segments.crossing(description, first, end, reverse)
        kept = jnp.exp(-slopes * age[:, None].astype(jnp.float32)) * crosses[..., None].astype(jnp.float32)
        total = total * kept[:, :, None, None] + states[:, :, piece]
    return total


def _transposed(state: jax.Array) -> jax.Array:
    return jnp.swapaxes(state, -1, -2)


def _padded(operands: list[jax.Array]) -> list[jax.Array]:
    """Pads to the 8 tokens that a shared-memory tile needs."""
    padding = -operands[0].shape[1] % 8
    return [jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in operands] if padding else operands


def _cost(plan: Plan, rows: int, chunks: int, known: int = 0) -> float:
    """Estimates the microseconds of a plan over `rows` heads of all sequences, that of its entering states included.

    The states that enter `known` pieces of dq are at hand.
    """
    steps = -(-chunks // plan.pieces)
    if steps * (plan.pieces - 1) >= chunks:
        return float("inf")  # a piece would be empty
    ctas = rows * len(plan.jobs) * (HEAD_DIM // plan.tuning.tile) * plan.pieces
    if len(plan.jobs) > 2 and (plan.pieces > 1 or ctas > hopper.MULTIPROCESSORS):
        return float("inf")  # cut they need states of both ways; too many drift apart and read operands again
    if len(plan.jobs) == 2 and plan.tuning.tile < HEAD_DIM and ctas > hopper.MULTIPROCESSORS:
        return float("inf")  # four CTAs read what two could, and drift apart: at R 0.402 ms instead of 0.282
    busy = -(-ctas // hopper.MULTIPROCESSORS) * steps * STEP[plan.tuning]
    # Jobs that walk the other way are elsewhere in the sequence: they find little of what the others read in the cache.
    read = {(x, job.descending) for job in plan.jobs for x in (job.a, job.b, job.c)}
    tensors = len(read) + len(plan.jobs)
    moved = tensors * rows * chunks * plan.chunk * HEAD_DIM * 2 / BANDWIDTH[plan.tuning.tile]
    time = _both(busy, moved) + LAUNCH
    if plan.pieces == 1:
        return time
    states = rows * HEAD_DIM**2 * 4 / BANDWIDTH[HEAD_DIM]
    if plan.jobs == (DQ,) and plan.pieces == known:
        return time + plan.pieces * states
    launch = _gather_plan(plan, rows, chunks)
    # Those of the parts are written and read, then those that enter the pieces.
    count = 2 * launch.orientations * ((plan.pieces - 1) * launch.split + plan.pieces)
    return time + LAUNCH + count * states + _gather_cost(launch, rows, chunks)


def _both(busy: float, moved: float) -> float:
    """The time of two things that go on together: about the longer one's, more where they are near."""
    return (busy**8 + moved**8) ** (1 / 8)


def _gather_cost(plan: Gather, rows: int, chunks: int) -> float:
    """Estimates the microseconds of gathering states."""
    per_piece = -(-chunks // plan.pieces)
    steps = -(-per_piece // plan.split)
    if per_piece * (plan.pieces - 1) + steps * (plan.split - 1) >= chunks or steps * (plan.split - 1) >= per_piece:
        return float("inf")  # a part would be empty
    ctas = rows * (plan.pieces - plan.skip_last) * plan.split
    busy = -(-ctas // hopper.MULTIPROCESSORS) * steps * GATHER_STEP[plan.orientations * plan.terms]
    moved = 2 * ctas * steps * plan.chunk * HEAD_DIM * 2 / BANDWIDTH[HEAD_DIM]
    return _both(busy, moved) + LAUNCH


def _gather_plan(plan: Plan, rows: int, chunks: int) -> Gather:
    """The launch that gathers the states before the pieces of a plan."""
    job, orientations, terms = plan.jobs[0], 1 + (DV in plan.jobs), plan.tuning.terms
    options = (Gather((job,), plan.pieces, n + 1, orientations, terms=terms) for n in range(MOST_PARTS))
    return min(options, key=lambda option: _gather_cost(option, rows, chunks))


def _plans(
    groupings: Sequence[Sequence[tuple[Job, ...]]],
    tunings: Sequence[Tuning],
    rows: int,
    chunks: int,
    known: int = 0,
) -> list[Plan]:
    """Chooses the launches that are estimated to take the shortest time, among the ways to group the jobs."""

    def cost(plan: Plan) -> float:
        return _cost(plan, rows, chunks, known)

    def best(jobs: tuple[Job, ...]) -> Plan:
        options = itertools.product(range(1, MOST_PIECES + 1), tunings)
        return min((Plan(jobs, pieces, tuning) for pieces, tuning in options), key=cost)

    choices = [[best(jobs) for jobs in grouping] for grouping in groupings]
    return min(choices, key=lambda plans: sum(map(cost, plans)))


def _run(
    plans: Sequence[Plan],
    operands: list[Heads],
    slopes: Slopes,
    description: Description | None,
    initial: dict[Job, jax.Array],
    saved: jax.Array | None = None,
) -> tuple[dict[Job, tuple[Heads, State]], jax.Array | None]:
    """Runs jobs over whole sequences.

    Returns each job's output and the state it ends with, (c dim, b dim), and the states that enter the pieces of the
    last plan. `saved` are those that entered the forward's pieces; transposed they enter dq's.
    """
    batch, length, heads, dim = operands[0].shape
    operands = _padded(operands)
    rows, chunks = batch * heads, -(-length // HALF.chunk)
    results = {}
    entering = None
    for plan in plans:
        reused = plan.jobs == (DQ,) and saved is not None and saved.shape[3] == plan.pieces > 1
        start = None
        if any(job in initial for job in plan.jobs):
            zeros = jnp.zeros((batch, heads, dim, dim), jnp.float32)
            start = jnp.stack([initial.get(job, zeros) for job in plan.jobs])
        if plan.pieces == 1:
            entering = None if start is None else start[:, :, :, None]
        elif reused:
            entering = saved
        else:
            launch = _gather_plan(plan, rows, chunks)
            states = gather(launch, operands, slopes, length=length, description=description)
            entering = enter(launch, plan.jobs, states, slopes, length=length, description=description, initial=start)
        outs, ends = scan(
            plan, operands, slopes, length=length, description=description, entering=entering, transposed=reused
        )
        for job, out, end in zip(plan.jobs, outs, ends, strict=True):
            results[job] = (out[:, :length], end)
    return results, entering
