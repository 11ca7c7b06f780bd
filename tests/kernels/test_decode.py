"""One-token steps of lightning attention: they continue a prefill and touch only the slots that they are given."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import dispatch, lightning
from tests.kernels import cases, test_triton

PORTABLE = ("chunked", "dense", "reference")
attention = jax.jit(lightning.lightning_attention, static_argnames="return_state")
step = jax.jit(lightning.decode_step, static_argnames="implementation")

compiled = test_triton.compiled


def profile(name: str) -> dict:
    return {"dim": 16} if name in PORTABLE else {"dim": 128, "dtype": ml_dtypes.bfloat16}


@pytest.mark.parametrize("name", lightning.implementations("decode_step"))
@pytest.mark.parametrize("prefill", [1, 64, 70])
def test_decode_continues_a_prefill(name: str, prefill: int) -> None:
    """INV-08, INV-31: the state of a prefill of any length, then one step a token, equals the whole row at once."""
    length = 75
    x = cases.inputs(length, **profile(name))
    expected = cases.recurrence(x)
    y = cases.as_jax(x)
    front = (a[:, :prefill] for a in (y.q, y.k, y.v))
    _, state = attention(*front, y.slopes, initial_state=y.initial_state, return_state=True)
    outputs = []
    for t in range(prefill, length):
        o, state = step(y.q[:, t], y.k[:, t], y.v[:, t], state, y.slopes, implementation=name)
        outputs.append(o)
    assert state.dtype == jnp.float32
    assert cases.relative(jnp.stack(outputs, axis=1), expected.o[:, prefill:]) <= cases.bound(x.q.dtype)
    assert cases.relative(state, expected.state) <= cases.bound(x.q.dtype, state=True)


@pytest.mark.parametrize("name", lightning.implementations("decode_step"))
def test_slots_of_a_pool(name: str) -> None:
    """INV-35: rows go to their slots in any order; those of slots outside the pool give 0; others keep every bit."""
    slots = np.asarray([5, -1, 0, 3, 7], np.int32)
    x = cases.inputs(1, batch=5, **profile(name))
    y = cases.as_jax(x)
    pool = cases.inputs(1, batch=7, seed=1, **profile(name)).initial_state
    o, new = step(y.q[:, 0], y.k[:, 0], y.v[:, 0], jnp.asarray(pool), y.slopes, slots=slots, implementation=name)
    alone, advanced = step(
        y.q[:, 0], y.k[:, 0], y.v[:, 0], jnp.asarray(pool[np.clip(slots, 0, 6)]), y.slopes, implementation=name
    )
    for row, slot in enumerate(slots):
        if slot < 0 or slot >= 7:
            assert not np.any(o[row])
        else:
            np.testing.assert_allclose(o[row], alone[row], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(new[slot], advanced[row], rtol=1e-5, atol=1e-5)
    untouched = np.setdiff1d(np.arange(7), slots)
    np.testing.assert_array_equal(np.asarray(new)[untouched], pool[untouched])


@pytest.mark.parametrize("pooled", [False, True])
def test_donated_states_are_updated_in_place(pooled: bool) -> None:
    """INV-32: the step's new state is the donated buffer, so that decoding needs no second copy of the states."""
    x = cases.as_jax(cases.inputs(1, batch=3))
    slots = jnp.asarray([2, 0, -1]) if pooled else None

    def donated(q, k, v, state):
        return lightning.decode_step(q, k, v, state, x.slopes, slots=slots)

    compiled = jax.jit(donated, donate_argnums=3).lower(x.q[:, 0], x.k[:, 0], x.v[:, 0], x.initial_state).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == x.initial_state.nbytes


def lowered_for_hopper(pooled: bool, implementation: str | None = None) -> str:
    token = jax.ShapeDtypeStruct((4, 64, 128), jnp.bfloat16)
    states = jax.ShapeDtypeStruct((4, 64, 128, 128), jnp.float32)
    slopes, slots = jax.ShapeDtypeStruct((64,), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)

    def call(q, k, v, state, slopes, slots):
        return lightning.decode_step(
            q, k, v, state, slopes, slots=slots if pooled else None, implementation=implementation
        )

    with dispatch.target("gpu", 9.0):
        traced = jax.jit(functools.partial(call), donate_argnums=3).trace(token, token, token, states, slopes, slots)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("pooled", [False, True])
def test_hopper_has_a_kernel_of_its_own(
    pooled: bool, compiled: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One kernel, its states aliased, read and written 16 bytes at a time and held in registers; nothing to warn of."""
    text = lowered_for_hopper(pooled)
    assert text.count("triton_kernel_call") == 1
    assert "output_operand_alias" in text
    assert not caplog.records
    (kernel,) = compiled
    assert "ld.global.v4.b32" in kernel.binary
    assert "st.global.v4.b32" in kernel.binary
    assert test_triton.spilled_bytes(kernel.binary, tmp_path) == 0


def test_the_portable_form_can_be_forced_anywhere() -> None:
    """By name, also where a kernel would have been chosen; a name without a decode step says so."""
    assert "triton_kernel_call" not in lowered_for_hopper(False, "chunked")
    with pytest.raises(ValueError, match="'mosaic_gpu' cannot run this call"):
        lowered_for_hopper(False, "mosaic_gpu")
