"""The Hopper kernels without a GPU: interpreted with race detection against the recurrence, and lowered for CUDA.

The interpreter runs the same kernel as the hardware: all left operands of its matrix products lie in shared memory.
On a GPU the parametrised tests of `test_lightning.py` run the compiled kernels.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lightning import mosaic_gpu
from tests.kernels import cases

SLOPES = {"fast and slow": (0.917, 0.0039), "middle and slowest": (0.1, 5e-5)}


@pytest.fixture(autouse=True)
def interpreted(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Interprets the kernels and fails on a race."""
    if jax.default_backend() != "cpu":
        pytest.skip("on a GPU, test_lightning.py runs the compiled kernels")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    assert "RACE DETECTED" not in capfd.readouterr().out


def check(x: cases.Inputs, *, states: bool) -> None:
    """Compares forward and backward with the recurrence."""
    if not states:
        x = dataclasses.replace(x, initial_state=np.zeros_like(x.initial_state), dstate=np.zeros_like(x.dstate))
    expected = cases.recurrence(x)
    given = cases.as_jax(x)
    initial, dstate = (given.initial_state, given.dstate) if states else (None, None)
    o, state = jax.jit(mosaic_gpu.forward)(given.q, given.k, given.v, given.slopes, given.segment_ids, initial)
    dq, dk, dv, dinitial = jax.jit(mosaic_gpu.backward)(
        given.q, given.k, given.v, given.slopes, given.segment_ids, initial, given.do, dstate
    )
    results = {"o": o, "dq": dq, "dk": dk, "dv": dv, "state": state, "dinitial_state": dinitial}
    for name, result in results.items():
        error = cases.relative(result, getattr(expected, name))
        bound = cases.bound(ml_dtypes.bfloat16, state="state" in name)
        assert error <= bound, f"{name}: relative error {error:.2e} above {bound}"


@pytest.mark.parametrize(
    ("length", "slopes", "states", "pieces"),
    [
        (1, "fast and slow", True, 1),
        (64, "middle and slowest", False, 1),
        (65, "middle and slowest", True, 1),
        (257, "fast and slow", False, 1),
        (320, "fast and slow", True, 3),
        (200, "middle and slowest", True, 4),
    ],
)
def test_forward_and_backward_equal_the_recurrence(
    length: int, slopes: str, states: bool, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-06, INV-07, INV-15, INV-16: lengths around the chunk, states in and out, and cut sequences."""
    monkeypatch.setattr(mosaic_gpu, "_pieces", lambda ctas, length: pieces)
    x = cases.inputs(length, batch=1, slopes=SLOPES[slopes], dim=128, dtype=ml_dtypes.bfloat16)
    check(x, states=states)


@pytest.mark.parametrize("pieces", [1, 2])
def test_packed_rows_equal_the_recurrence(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-36: boundaries anywhere and at chunk edges, padding before, inside and after, whole chunks without either."""
    monkeypatch.setattr(mosaic_gpu, "_pieces", lambda ctas, length: pieces)
    ids = np.concatenate([np.zeros(3), np.full(61, 1), np.full(130, 2), np.zeros(5), np.full(57, 3)]).astype(np.int32)
    x = cases.inputs(
        256, batch=1, slopes=SLOPES["middle and slowest"], dim=128, dtype=ml_dtypes.bfloat16, segment_ids=ids[None]
    )
    check(x, states=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_chunk_state_of_pieces_equals_the_recurrence(
    reverse: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INV-37, INV-38: the state of a context-parallel chunk, forwards of (k, v) and backwards of (q, do)."""
    monkeypatch.setattr(mosaic_gpu, "_pieces", lambda ctas, length: 2)
    ids = np.repeat(np.int32([1, 2]), (100, 50) if reverse else (20, 130))[None] if packed else None
    x = cases.inputs(
        150, batch=1, slopes=SLOPES["middle and slowest"], dim=128, dtype=ml_dtypes.bfloat16, segment_ids=ids
    )
    x = dataclasses.replace(x, initial_state=np.zeros_like(x.initial_state), dstate=np.zeros_like(x.dstate))
    expected = cases.recurrence(x)
    given = cases.as_jax(x)
    pair, right = ((given.q, given.do), expected.dinitial_state) if reverse else ((given.k, given.v), expected.state)
    state = jax.jit(mosaic_gpu.chunk_state, static_argnums=4)(*pair, given.slopes, given.segment_ids, reverse)
    assert cases.relative(state, right) <= cases.bound(ml_dtypes.bfloat16, state=True)


@pytest.mark.parametrize("shape", [(1, 8192, 64, 128), (1, 8192, 8, 128), (2, 1_000_003, 2, 128)])
@pytest.mark.parametrize("packed", [False, True])
def test_kernels_lower_for_cuda(shape: tuple[int, int, int, int], packed: bool) -> None:
    """Every launch passes layout and transform inference: 64 heads, few heads cut into pieces, a million ragged tokens."""
    tokens = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    slopes = jax.ShapeDtypeStruct(shape[2:3], jnp.float32)
    ids = jax.ShapeDtypeStruct(shape[:2], jnp.int32) if packed else None
    state = jax.ShapeDtypeStruct((shape[0], shape[2], 128, 128), jnp.float32)
    with plgpu.force_gpu_interpret_mode(None):
        for function, arguments in (
            (mosaic_gpu.forward, (tokens, tokens, tokens, slopes, ids, state)),
            (mosaic_gpu.backward, (tokens, tokens, tokens, slopes, ids, state, tokens, state)),
            (functools.partial(mosaic_gpu.chunk_state, reverse=True), (tokens, tokens, slopes, ids)),
        ):
            text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
            assert "mosaic_gpu" in text
