"""The gated joint norm against numpy fp64; gradients against central differences."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.norm_gate import norm_gate
from tests.kernels import cases

SHAPE = (2, 5, 3, 8)
NAMES = ("x", "gate_logits", "weight")


def draw(dtype=np.float64) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=shape).astype(dtype) for shape in (SHAPE, SHAPE, SHAPE[2:]))


def definition(x: np.ndarray, gate_logits: np.ndarray, weight: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    x, gate_logits, weight = (a.astype(np.float64) for a in (x, gate_logits, weight))
    flat = x.reshape(*x.shape[:2], -1)
    rms = np.sqrt(np.sum(flat**2, axis=-1) / flat.shape[-1] + eps)[..., None, None]
    return x / rms * weight / (1 + np.exp(-gate_logits))


@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 1e-6), (ml_dtypes.bfloat16, 5e-3)])
def test_forward(dtype, limit: float) -> None:
    """INV-13: one statistic over all heads and channels, norm before gate, and the arguments' dtype comes back."""
    arguments = draw(dtype)
    y = jax.jit(norm_gate, static_argnums=3)(*map(jnp.asarray, arguments), 1e-6)
    assert y.dtype == dtype
    assert cases.relative(y, definition(*arguments)) <= limit


@pytest.mark.parametrize("position", [0, 1, 2])
def test_gradients(position: int) -> None:
    """Each gradient equals central differences of the definition, element by element, in fp64."""
    arguments = draw()
    dy = np.random.default_rng(1).normal(size=SHAPE)
    with jax.enable_x64(True):
        _, pullback = jax.vjp(lambda *a: norm_gate(*a, 1e-6), *map(jnp.asarray, arguments))
        actual = np.asarray(pullback(jnp.asarray(dy))[position])
    expected = np.zeros_like(actual)
    for index in np.ndindex(actual.shape):
        sides = []
        for step in (1e-6, -1e-6):
            moved = [a.copy() for a in arguments]
            moved[position][index] += step
            sides.append(np.sum(dy * definition(*moved)))
        expected[index] = (sides[0] - sides[1]) / 2e-6
    assert cases.relative(actual, expected) <= 1e-7, NAMES[position]


def test_gradients_in_bf16() -> None:
    """bf16 arguments: gradients come in their own dtypes, off by a few roundings of the fp64 ones."""
    arguments = [jnp.asarray(a) for a in draw(ml_dtypes.bfloat16)]
    arguments[2] = arguments[2].astype(jnp.float32)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE), jnp.bfloat16)
    gradients = jax.vjp(lambda *a: norm_gate(*a, 1e-6), *arguments)[1](dy)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a).astype(np.float64)) for a in (*arguments, dy)]
        expected = jax.vjp(lambda *a: norm_gate(*a, 1e-6), *wide[:3])[1](wide[3])
    for name, argument, a, b in zip(NAMES, arguments, gradients, expected):
        assert a.dtype == argument.dtype
        assert cases.relative(a, np.asarray(b)) <= 5e-3, name


def test_every_head_feels_every_other() -> None:
    """INV-13: a louder head makes all other heads quieter."""
    x, gate_logits, weight = (jnp.asarray(a, jnp.float32) for a in draw())
    before = norm_gate(x, gate_logits, weight, 1e-6)
    after = norm_gate(x.at[:, :, 0].multiply(10), gate_logits, weight, 1e-6)
    assert np.all(np.abs(after[:, :, 1:]) < np.abs(before[:, :, 1:]))


def test_eps_counts_for_tiny_activations() -> None:
    """INV-13: with x = 1e-3 everywhere the mean square equals eps = 1e-6, and the norm halves it: 1 / sqrt(2)."""
    x = jnp.full(SHAPE, 1e-3)
    y = norm_gate(x, jnp.full(SHAPE, 100.0), jnp.ones(SHAPE[2:]), 1e-6)
    np.testing.assert_allclose(y, np.full(SHAPE, 2**-0.5), rtol=1e-6)


def test_inside_shard_map() -> None:
    """A weight that all devices share gets the sum of their gradients, replication checked."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    arguments = [jnp.asarray(a, jnp.float32) for a in draw()]
    dy = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE), jnp.float32)

    def gradients(x, gate_logits, weight, dy):
        return jax.vjp(lambda *a: norm_gate(*a, 1e-6), x, gate_logits, weight)[1](dy)

    rows, all_rows = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    specs = (rows, rows, all_rows)
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=(*specs, rows), out_specs=specs)
    for actual, expected in zip(jax.jit(sharded)(*arguments, dy), gradients(*arguments, dy)):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_errors_name_what_is_wrong() -> None:
    """A weight of another shape raises with both shapes."""
    x = jnp.zeros(SHAPE)
    with cases.annotations_unchecked(), pytest.raises(ValueError, match=r"weight \[3, 8\] for x"):
        norm_gate(x, x, jnp.zeros((24,)), 1e-6)
