"""`jax.vmap` of the operations that have kernels on GPUs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.lightning import decode_step, lightning_attention
from pallas_kernels.norm_gate import norm_gate
from pallas_kernels.softmax import softmax_attention

DRAW = np.random.default_rng(5)


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(DRAW.normal(size=shape), jnp.bfloat16)


def _softmax(q: jax.Array) -> jax.Array:
    first, last = jnp.zeros((1, 64), jnp.int32), jnp.arange(1, 65)[None]
    return softmax_attention(q, q[:, :, :2], q[:, :, 2:], scale=0.1, k_start=first, k_end=last)


def _gradient(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return jax.grad(lambda x: jnp.square(function(x).astype(jnp.float32)).sum())


def _norm_gate(x: jax.Array) -> jax.Array:
    return norm_gate(x, -x, jnp.ones(x.shape[2:], jnp.float32), 1e-6)


CALLS: dict[str, tuple[Callable[[jax.Array], Any], jax.Array, int]] = {
    "softmax": (_gradient(_softmax), _normal(3, 1, 64, 4, 64), 3),
    "norm_gate": (_gradient(_norm_gate), _normal(3, 1, 32, 4, 64), 2),
    "grouped_matmul": (
        lambda x: grouped_matmul(x, jnp.ones((2, 64, 64), x.dtype), jnp.array([3, 5], jnp.int32)),
        _normal(3, 8, 64),
        1,
    ),
    "grouped_matmul, wide": (
        lambda x: grouped_matmul(x, jnp.ones((2, 128, 256), x.dtype), jnp.array([3, 5], jnp.int32)),
        _normal(3, 8, 128),
        1,
    ),
    "packed lightning": (
        lambda x: lightning_attention(x, x, x, jnp.full(2, 0.1), segment_ids=jnp.arange(96)[None] // 40),
        _normal(3, 1, 96, 2, 128) / 10,
        3,
    ),
    "decode_step": (
        lambda x: decode_step(x, x, x, jnp.ones((2, 4, 128, 128)), jnp.full(4, 0.1)),
        _normal(3, 2, 4, 128),
        1,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_vmapped_calls_equal_calls_one_by_one(name: str) -> None:
    """On the platform at hand; and all kernels are there in what is lowered for a GPU."""
    call, x, launches = CALLS[name]
    together = jax.vmap(call)(x)
    each = jax.tree.map(lambda *parts: jnp.stack(parts), *(call(part) for part in x))
    for found, expected in zip(jax.tree.leaves(together), jax.tree.leaves(each), strict=True):
        np.testing.assert_allclose(np.float32(found), np.float32(expected), rtol=2e-2, atol=2e-2)
    with dispatch.target("gpu", 9.0):
        text = jax.jit(jax.vmap(call)).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton_kernel_call") + text.count("@mosaic_gpu_v2") == launches
