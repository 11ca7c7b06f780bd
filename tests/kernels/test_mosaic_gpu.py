"""The Hopper kernels with the plans that are named here: against the recurrence, and lowered for CUDA.

Without a GPU they are interpreted with race detection. The interpreter multiplies only from shared memory: it runs the
`staged` twins of the plans, which lay the left operands of products there. On a GPU the compiled kernels run, with
plans that `test_lightning.py`, where the fastest ones are taken, does not reach at its sizes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import lightning
from pallas_kernels.lightning import mosaic_gpu, mosaic_gpu_segments, mosaic_gpu_states
from pallas_kernels.lightning.mosaic_gpu import DK, DQ, DV, FORWARD, HALF, HALF_ONE, WHOLE, WHOLE_ONE
from pallas_kernels.lightning.mosaic_gpu_plan import Gather, Plan, Tuning
from tests.kernels import cases

BF16 = ml_dtypes.bfloat16
FAST_AND_SLOW = (0.917, 0.0039)
MIDDLE_AND_SLOWEST = (0.1, 5e-5)

Choose = Callable[..., None]


def compiled() -> bool:
    """Whether the kernels themselves run, on a GPU."""
    return jax.default_backend() == "gpu"


@pytest.fixture(autouse=True)
def interpreted(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Interprets the kernels and fails on a race, unless there is a GPU."""
    if compiled():
        yield
        return
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Sets the plans of the backward and of the forward, in place of those that would be fastest."""

    def runnable(plan: Plan) -> Plan:
        return dataclasses.replace(plan, tuning=dataclasses.replace(plan.tuning, staged=not compiled()))

    def set_plans(*backward: Plan, forward: tuple[int, Tuning] = (1, HALF)) -> None:
        def plans(groupings: list, *_: object, **__: object) -> list[Plan]:
            return list(map(runnable, [Plan((FORWARD,), *forward)] if groupings == [[(FORWARD,)]] else backward))

        monkeypatch.setattr(mosaic_gpu, "_plans", plans)

    return set_plans


def described(ids: Any) -> Any:
    return None if ids is None else mosaic_gpu.describe(ids)


def check(x: cases.Inputs, *, states: bool) -> None:
    """Compares forward and backward with the recurrence."""
    if not states:
        x = dataclasses.replace(x, initial_state=np.zeros_like(x.initial_state), dstate=np.zeros_like(x.dstate))
    expected = cases.recurrence(x)
    given = cases.as_jax(x)
    initial, dstate = (given.initial_state, given.dstate) if states else (None, None)
    arguments = (given.q, given.k, given.v, given.slopes, described(given.segment_ids), initial)
    o, state, saved = jax.jit(mosaic_gpu.forward_saving)(*arguments)
    dq, dk, dv, dinitial = jax.jit(mosaic_gpu.backward)(*arguments, given.do, dstate, saved)
    results = {"o": o, "dq": dq, "dk": dk, "dv": dv, "state": state}
    if states:
        results["dinitial_state"] = dinitial
    for name, result in results.items():
        error = cases.relative(result, getattr(expected, name))
        bound = cases.bound(BF16, state="state" in name)
        assert error <= bound, f"{name}: relative error {error:.2e} above {bound}"


@pytest.mark.parametrize(
    ("length", "slopes", "states", "plans", "forward"),
    [
        (1, FAST_AND_SLOW, True, [Plan((DK, DV, DQ), 1, HALF)], (1, HALF)),
        (257, MIDDLE_AND_SLOWEST, False, [Plan((DK, DV), 1, WHOLE_ONE), Plan((DQ,), 1, HALF_ONE)], (1, WHOLE)),
        (200, FAST_AND_SLOW, True, [Plan((DK, DV), 2, WHOLE), Plan((DQ,), 4, HALF)], (4, HALF)),
        pytest.param(
            *(320, MIDDLE_AND_SLOWEST, False, [Plan((DK, DV), 2, HALF_ONE), Plan((DQ,), 2, WHOLE_ONE)], (2, WHOLE)),
            marks=pytest.mark.full,
        ),
    ],
    ids=["one token", "ragged, whole width", "pieces", "pieces, one term"],
)
def test_forward_and_backward_equal_the_recurrence(
    length: int, slopes: tuple[float, ...], states: bool, plans: list[Plan], forward: tuple[int, Tuning], choose: Choose
) -> None:
    """INV-06, INV-07, INV-15, INV-16: lengths around the chunk, states in and out, shared launches, cut sequences."""
    choose(*plans, forward=forward)
    check(cases.inputs(length, batch=1, slopes=slopes, dim=128, dtype=BF16), states=states)


@pytest.mark.parametrize(
    ("plans", "forward", "states"),
    [
        ([Plan((DK, DV), 2, WHOLE_ONE), Plan((DQ,), 2, WHOLE_ONE)], (1, HALF), False),
        pytest.param([Plan((DK, DV), 1, HALF), Plan((DQ,), 1, HALF)], (2, WHOLE), True, marks=pytest.mark.full),
        pytest.param(
            [Plan((DK, DV), 2, HALF_ONE), Plan((DQ,), 2, WHOLE_ONE)], (2, WHOLE), False, marks=pytest.mark.full
        ),
    ],
)
def test_packed_rows_equal_the_recurrence(
    plans: list[Plan], forward: tuple[int, Tuning], states: bool, choose: Choose
) -> None:
    """INV-36: boundaries anywhere and at chunk edges, padding before, inside and after, whole chunks without either."""
    choose(*plans, forward=forward)
    ids = np.repeat(np.int32([0, 1, 0, 1, 2, 0, 3]), (3, 30, 4, 27, 130, 5, 57))
    x = cases.inputs(len(ids), batch=1, slopes=MIDDLE_AND_SLOWEST, dim=128, dtype=BF16, segment_ids=ids[None])
    check(x, states=states)


def test_packed_rows_without_a_boundary_equal_unpacked_ones(choose: Choose) -> None:
    """INV-36: a packed row of one segment runs the unpacked kernel's arithmetic, so every bit is the same."""
    choose()
    x = cases.as_jax(cases.inputs(128, batch=1, slopes=(0.1,), dim=128, dtype=BF16))
    ids = jnp.ones((1, 128), jnp.int32)
    run = jax.jit(mosaic_gpu.forward)
    plain, packed = (run(x.q, x.k, x.v, x.slopes, given, x.initial_state) for given in (None, described(ids)))
    for one, other in zip(plain, packed, strict=True):
        np.testing.assert_array_equal(one, other)


def test_warpgroups_cannot_ask_for_more_registers_than_the_launch_gets() -> None:
    """A warpgroup that asks for more waits for ever: 384 threads are launched with 168 each, not 65536 / 384."""
    dataclasses.replace(WHOLE, registers=(248, 224, 32))
    with pytest.raises(ValueError, match="512, more than 504"):
        dataclasses.replace(WHOLE, registers=(248, 224, 40))


@pytest.mark.parametrize(("reverse", "packed"), [(False, True), (True, False)])
def test_chunk_state_equals_the_recurrence(reverse: bool, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-37, INV-38: the state of a context-parallel chunk in pieces, forwards of (k, v) and backwards of (q, do)."""
    monkeypatch.setattr(mosaic_gpu, "_gather_cost", lambda plan, rows, chunks: 9 * abs(plan.pieces - 2))
    ids = np.repeat(np.int32([1, 2]), (20, 130))[None] if packed else None
    x = cases.inputs(150, batch=1, slopes=MIDDLE_AND_SLOWEST, dim=128, dtype=BF16, segment_ids=ids)
    x = dataclasses.replace(x, initial_state=np.zeros_like(x.initial_state), dstate=np.zeros_like(x.dstate))
    expected = cases.recurrence(x)
    given = cases.as_jax(x)
    pair, right = ((given.q, given.do), expected.dinitial_state) if reverse else ((given.k, given.v), expected.state)
    state = jax.jit(mosaic_gpu.chunk_state, static_argnums=4)(
        *pair, given.slopes, described(given.segment_ids), reverse
    )
    assert cases.relative(state, right) <= cases.bound(BF16, state=True)


@pytest.mark.parametrize(
    ("shape", "packed", "states"),
    [
        ((1, 8192, 64, 128), False, False),
        ((1, 8192, 64, 128), True, True),
        ((1, 8192, 8, 128), True, False),
        ((2, 64, 4, 128), False, True),
        ((2, 64, 4, 128), True, False),
        ((1, 1_048_576, 64, 128), False, True),
    ],
    ids=["64 heads", "64 heads packed", "8 heads packed", "one chunk", "one chunk packed", "8.6e9 elements"],
)
def test_kernels_lower_for_cuda(shape: tuple[int, int, int, int], packed: bool, states: bool) -> None:
    """Every launch passes layout and transform inference and fits in shared memory."""
    tokens = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    slopes = jax.ShapeDtypeStruct(shape[2:3], jnp.float32)
    ids = jax.eval_shape(mosaic_gpu.describe, jax.ShapeDtypeStruct(shape[:2], jnp.int32)) if packed else None
    state = jax.ShapeDtypeStruct((shape[0], shape[2], 128, 128), jnp.float32) if states else None
    given = (tokens, tokens, tokens, slopes, ids, state)
    _, _, saved = jax.eval_shape(mosaic_gpu.forward_saving, *given)
    assert (saved is not None) == (shape[2] == 8)
    with plgpu.force_gpu_interpret_mode(None):
        for function, arguments in (
            (mosaic_gpu.forward, given),
            (mosaic_gpu.backward, (*given, tokens, state, saved)),
            (functools.partial(mosaic_gpu.chunk_state, reverse=True), (tokens, tokens, slopes, ids)),
        ):
            text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
            assert "mosaic_gpu" in text


@pytest.mark.parametrize("heads", [1, 8, 16, 64, 256])
@pytest.mark.parametrize("length", [1, 64, 1000, 131_072])
def test_plans_cover_every_job_and_chunk(heads: int, length: int) -> None:
    """Whatever is estimated to be fastest runs each job once, leaves no piece without a chunk and has a finite cost."""
    chunks = -(-length // HALF.chunk)
    (forward,) = mosaic_gpu._plans(mosaic_gpu.FORWARDS, [HALF, WHOLE], heads, chunks)
    for tunings in ([HALF, WHOLE], [HALF_ONE, WHOLE_ONE]):
        plans = mosaic_gpu._plans(mosaic_gpu.BACKWARDS, tunings, heads, chunks, known=forward.pieces)
        assert sorted((job for plan in plans for job in plan.jobs), key=hash) == sorted((DK, DV, DQ), key=hash)
        for plan in (forward, *plans):
            per_piece = -(-chunks // plan.pieces)
            assert per_piece * (plan.pieces - 1) < chunks
            assert math.isfinite(mosaic_gpu._cost(plan, heads, chunks, forward.pieces))
            if plan.pieces > 1:
                split = mosaic_gpu._gather_plan(plan, heads, chunks).split
                last = chunks - per_piece * (plan.pieces - 1)
                assert -(-per_piece // split) * (split - 1) < min(per_piece, last)


def test_backward_gathers_no_states_that_the_forward_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both cut the sequence alike, dq begins with the states that entered the forward's pieces."""
    gathered = []

    def gather(plan: Gather, *arguments: Any, **keywords: Any) -> jax.Array:
        gathered.append(plan.jobs)
        return mosaic_gpu_states.gather(plan, *arguments, **keywords)

    monkeypatch.setattr(mosaic_gpu, "gather", gather)
    tokens = jax.ShapeDtypeStruct((1, 32_768, 8, 128), jnp.bfloat16)
    slopes = jax.ShapeDtypeStruct((8,), jnp.float32)

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array, do: jax.Array) -> Any:
        attention = functools.partial(lightning.lightning_attention, slopes=slopes, implementation="mosaic_gpu")
        return jax.vjp(attention, q, k, v)[1](do)

    jax.eval_shape(gradients, tokens, tokens, tokens, slopes, tokens)
    assert gathered == [(FORWARD,), (DK,)]
    gathered.clear()
    alone = functools.partial(lightning.lightning_backward, implementation="mosaic_gpu")
    jax.eval_shape(alone, tokens, tokens, tokens, slopes, tokens)
    assert {job for jobs in gathered for job in jobs} == {DK, DQ}


def test_description_of_packed_rows() -> None:
    """INV-36: a chunk is plain only where neither it nor the states at its ends meet a boundary or padding."""
    ids = np.repeat(np.int32([1, 2, 0, 2, 3]), (128, 100, 10, 18, 64))[None]
    facts = np.asarray(mosaic_gpu_segments.describe(jnp.asarray(ids), 64))[0, :, -mosaic_gpu_segments.FACTS :]
    fact = mosaic_gpu_segments.Fact
    # The second chunk is whole, yet the gradient of the state that arrives at its end is segment 2's.
    np.testing.assert_array_equal(facts[:, fact.PLAIN], [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(facts[:, fact.AGE_AFTER], [64, 128, 192, 246, 310])
    np.testing.assert_array_equal(facts[:, fact.LEAVE_ASCENDING], [1, 1, 2, 2, 3])
    np.testing.assert_array_equal(facts[:, fact.ENTER_DESCENDING], [1, 2, 2, 3, 3])
