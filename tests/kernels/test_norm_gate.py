"""The gated joint norm against numpy fp64, every implementation; gradients against central differences.

On a CPU the Triton kernels run in Triton's interpreter, in one process of its own, and are compiled to PTX; on a GPU
the compiled kernels run.
"""

import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.norm_gate import implementations, norm_gate, triton
from tests.kernels import cases, test_triton

SHAPE = (2, 5, 3, 8)
LONG = (2, 150, 4, 16)
"""More tokens than programs, and a power of two of channels."""
EPS = 1e-6
NAMES = ("x", "gate_logits", "weight")
INTERPRETED = jax.default_backend() == "cpu"
ALL = ("xla", "triton") if INTERPRETED else implementations()

compiled = test_triton.compiled

Results = tuple[np.ndarray, tuple[np.ndarray, ...]]
Run = Callable[..., Results]


def draw(dtype: Any, shape: tuple[int, ...] = SHAPE, weight_dtype: Any = None) -> tuple[np.ndarray, ...]:
    """x, gate_logits, weight and dy, all normal; the weight in a dtype of its own if it is given."""
    rng = np.random.default_rng(0)
    x, gate_logits, weight, dy = (rng.normal(size=size) for size in (shape, shape, shape[2:], shape))
    return (x.astype(dtype), gate_logits.astype(dtype), weight.astype(weight_dtype or dtype), dy.astype(dtype))


def definition(x: np.ndarray, gate_logits: np.ndarray, weight: np.ndarray) -> np.ndarray:
    x, gate_logits, weight = (a.astype(np.float64) for a in (x, gate_logits, weight))
    flat = x.reshape(*x.shape[:2], -1)
    rms = np.sqrt(np.sum(flat**2, axis=-1) / flat.shape[-1] + EPS)[..., None, None]
    return x / rms * weight / (1 + np.exp(-gate_logits))


def directional(arguments: tuple[np.ndarray, ...], position: int, along: np.ndarray) -> float:
    """The derivative of sum(dy * definition) as one argument moves along a direction: central differences in fp64."""
    *given, dy = (a.astype(np.float64) for a in arguments)
    sides = []
    for step in (1e-5, -1e-5):
        moved = list(given)
        moved[position] = moved[position] + step * along
        sides.append(np.sum(dy * definition(*moved)))
    return (sides[0] - sides[1]) / 2e-5


def loud() -> tuple[np.ndarray, ...]:
    """Gates so far from 0 that their exponentials overflow in fp32, and tiny activations beside large ones."""
    x, gate_logits, weight, dy = draw(np.float32)
    gate_logits = np.where(gate_logits > 0, 200.0, -200.0).astype(np.float32)
    x[:, 0] *= 1e-3
    x[:, 1] *= 1e3
    return x, gate_logits, weight, dy


CASES: dict[str, tuple[np.ndarray, ...]] = {
    "fp32": draw(np.float32),
    "bf16": draw(ml_dtypes.bfloat16),
    "bf16, fp32 weight, many tokens": draw(ml_dtypes.bfloat16, LONG, np.float32),
    "fp32, one token": draw(np.float32, (1, 1, 4, 16)),
    "loud gates": loud(),
}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Results]:
    """What the interpreted Triton kernels return for every case."""

    def run(jobs: list[Any]) -> list[Any]:
        done = subprocess.run(
            [sys.executable, "-m", "tests.kernels.triton_interpreter", "pallas_kernels.norm_gate.triton"],
            input=pickle.dumps(jobs),
            stdout=subprocess.PIPE,
            env={**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
            check=True,
        )
        return pickle.loads(done.stdout)

    forwards = run([("forward", (*arguments[:3], EPS)) for arguments in CASES.values()])
    backwards = run(
        [("backward", (*a[:3], inverse, a[3])) for a, (_, inverse) in zip(CASES.values(), forwards, strict=True)]
    )
    return {name: (y, b) for name, (y, _), b in zip(CASES, forwards, backwards, strict=True)}


@functools.cache
def compiled_results(implementation: str, name: str) -> Results:
    """What an implementation of the present platform returns for a case."""

    @jax.jit
    def both(x: jax.Array, gate_logits: jax.Array, weight: jax.Array, dy: jax.Array) -> Any:
        y, pull = jax.vjp(lambda *a: norm_gate(*a, EPS, implementation=implementation), x, gate_logits, weight)
        return y, pull(dy)

    return jax.tree.map(np.asarray, both(*map(jnp.asarray, CASES[name])))


@pytest.fixture(params=ALL)
def run(request: pytest.FixtureRequest) -> Run:
    """Gives a function from a case's name to the output and the gradients of one implementation."""
    if INTERPRETED and request.param == "triton":
        return request.getfixturevalue("interpreted").__getitem__
    return functools.partial(compiled_results, request.param)


@pytest.mark.parametrize("name", CASES)
def test_forward(name: str, run: Run) -> None:
    """INV-13: one statistic over all heads and channels, norm before gate, and the arguments' dtype comes back."""
    *given, _ = CASES[name]
    y, _ = run(name)
    assert y.dtype == given[0].dtype
    # bf16 is rounded twice; Triton's interpreter cuts off where a GPU rounds.
    assert cases.relative(y, definition(*given)) <= (8e-3 if y.dtype == ml_dtypes.bfloat16 else 2e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradients_point_the_right_way(name: str, run: Run) -> None:
    """INV-13: each gradient's product with its own direction and a random one equals central differences in fp64."""
    arguments = CASES[name]
    rng = np.random.default_rng(1)
    _, gradients = run(name)
    for position, gradient in enumerate(gradients):
        assert gradient.dtype == arguments[position].dtype
        wide = gradient.astype(np.float64)
        if not np.any(wide):
            assert (name, NAMES[position]) == ("loud gates", "gate_logits"), "only gates that are shut have no gradient"
            continue
        limit = 1e-2 if gradient.dtype == ml_dtypes.bfloat16 else 5e-3 if "bf16" in name else 1e-4
        for along in (wide / np.linalg.norm(wide), rng.normal(size=wide.shape) / np.sqrt(wide.size)):
            error = abs(np.sum(wide * along) - directional(arguments, position, along))
            assert error <= limit * np.linalg.norm(wide), NAMES[position]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_gradients_element_by_element(position: int) -> None:
    """Each element of each gradient of the portable form equals central differences of the definition, in fp64."""
    *arguments, dy = draw(np.float64)
    with jax.enable_x64(True):
        _, pullback = jax.vjp(lambda *a: norm_gate(*a, EPS, implementation="xla"), *map(jnp.asarray, arguments))
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


@pytest.mark.parametrize("name", [name for name in CASES if name != "loud gates"])
def test_gradients_equal_those_of_the_portable_form(name: str, run: Run) -> None:
    """Off by a few roundings of the fp64 ones, which the test above ties to the definition, in every element's sum."""
    arguments = CASES[name]
    with jax.enable_x64(True):
        wide = [jnp.asarray(a.astype(np.float64)) for a in arguments]
        expected = jax.vjp(lambda *a: norm_gate(*a, EPS, implementation="xla"), *wide[:3])[1](wide[3])
    for argument, a, b in zip(NAMES, run(name)[1], expected, strict=True):
        limit = 8e-3 if a.dtype == ml_dtypes.bfloat16 else 3e-6
        assert cases.relative(a, np.asarray(b)) <= limit, argument


def test_every_head_feels_every_other() -> None:
    """INV-13: a louder head makes all other heads quieter."""
    x, gate_logits, weight, _ = (jnp.asarray(a) for a in draw(np.float32))
    before = norm_gate(x, gate_logits, weight, EPS)
    after = norm_gate(x.at[:, :, 0].multiply(10), gate_logits, weight, EPS)
    assert np.all(np.abs(after[:, :, 1:]) < np.abs(before[:, :, 1:]))


def test_eps_counts_for_tiny_activations() -> None:
    """INV-13: with x = 1e-3 everywhere the mean square equals eps = 1e-6, and the norm halves it: 1 / sqrt(2)."""
    x = jnp.full(SHAPE, 1e-3)
    y = norm_gate(x, jnp.full(SHAPE, 100.0), jnp.ones(SHAPE[2:]), EPS)
    np.testing.assert_allclose(y, np.full(SHAPE, 2**-0.5), rtol=1e-6)


def gradients(implementation: str, x: Any, gate_logits: Any, weight: Any, dy: Any) -> Any:
    return jax.vjp(lambda *a: norm_gate(*a, EPS, implementation=implementation), x, gate_logits, weight)[1](dy)


def sharded(implementation: str) -> Callable[..., Any]:
    """The gradients with rows over two devices and one weight for both, replication checked."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices("cpu")[:2], axis_types=(jax.sharding.AxisType.Auto,))
    rows, all_rows = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    specs = (rows, rows, all_rows)
    call = functools.partial(gradients, implementation)
    return jax.jit(jax.shard_map(call, mesh=mesh, in_specs=(*specs, rows), out_specs=specs))


def test_inside_shard_map() -> None:
    """A weight that all devices share gets the sum of their gradients."""
    with jax.default_device(jax.devices("cpu")[0]):
        arguments = [jnp.asarray(a) for a in draw(np.float32)]
        for actual, expected in zip(sharded("xla")(*arguments), gradients("xla", *arguments), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def lowered(function: Callable[..., Any], *arguments: jax.ShapeDtypeStruct) -> str:
    return jax.jit(functools.partial(function)).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def shapes(dtype: Any) -> list[jax.ShapeDtypeStruct]:
    x = jax.ShapeDtypeStruct((2, 1024, 64, 128), dtype)
    return [x, x, jax.ShapeDtypeStruct(x.shape[2:], jnp.float32), x]


@pytest.mark.parametrize(("capability", "dtype"), [(9.0, "bfloat16"), (8.6, "bfloat16"), (8.0, "float32")])
def test_kernels_compile_for_cuda(capability: float, dtype: str, compiled: list[Any], tmp_path: Path) -> None:
    """A token of 64 heads becomes PTX with 16-byte accesses, within shared memory; in bf16 nothing spills."""
    with dispatch.target("gpu", capability):
        text = lowered(functools.partial(gradients, "triton"), *shapes(jnp.dtype(dtype)))
    assert text.count("triton_kernel_call") == 2
    assert len(compiled) == 2
    for kernel in compiled:
        assert f".target sm_{round(10 * capability)}" in kernel.binary
        assert kernel.shared_mem_bytes <= test_triton.SHARED_MEMORY
        assert "ld.global.v4" in kernel.binary
        assert "st.global.v4" in kernel.binary
        if dtype == "bfloat16":
            assert test_triton.spilled_bytes(kernel.binary, tmp_path) == 0


def test_chosen_by_platform(caplog: pytest.LogCaptureFixture) -> None:
    """One GPU gets the kernels, inside shard_map every GPU; where the compiler splits arrays XLA's form, and a word."""
    given = shapes(jnp.bfloat16)[:3]

    def call(x: jax.Array, gate_logits: jax.Array, weight: jax.Array) -> jax.Array:
        return norm_gate(x, gate_logits, weight, EPS)

    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices("cpu")[:2], axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    manual = jax.shard_map(call, mesh=mesh, in_specs=(rows, rows, jax.sharding.PartitionSpec()), out_specs=rows)
    with dispatch.target("gpu", 9.0):
        if jax.default_backend() == "cpu":
            assert "triton_kernel_call" in lowered(call, *given)
            assert "triton_kernel_call" in lowered(manual, *given)
        with jax.set_mesh(mesh):
            assert "triton_kernel_call" not in lowered(call, *given)
        assert "may split arrays" in caplog.text
    with dispatch.target("gpu", 7.5):
        assert "triton_kernel_call" not in lowered(call, *given)
    with dispatch.target("tpu"):
        assert implementations() == ("xla",)


def test_unsupported_calls_say_why() -> None:
    """Each refusal names what was found, and a forced implementation that cannot run raises."""
    with dispatch.target("cpu"):
        assert "no NVIDIA GPU" in str(triton.supports(8192, jnp.bfloat16))
        with pytest.raises(ValueError, match="'triton' cannot run this call: it needs an NVIDIA GPU"):
            norm_gate(jnp.zeros(SHAPE), jnp.zeros(SHAPE), jnp.zeros(SHAPE[2:]), EPS, implementation="triton")
    with dispatch.target("gpu", 9.0):
        assert triton.supports(8192, jnp.bfloat16, jnp.float32) is None
        assert "9216 channels" in str(triton.supports(9216, jnp.bfloat16))
        assert "float16" in str(triton.supports(8192, jnp.bfloat16, jnp.float16))
    with pytest.raises(ValueError, match="no implementation named 'cudnn'; there are triton, xla"):
        norm_gate(jnp.zeros(SHAPE), jnp.zeros(SHAPE), jnp.zeros(SHAPE[2:]), EPS, implementation="cudnn")


def test_errors_name_what_is_wrong() -> None:
    """A weight of another shape raises with both shapes."""
    x = jnp.zeros(SHAPE)
    with cases.annotations_unchecked(), pytest.raises(ValueError, match=r"weight \[3, 8\] for x"):
        norm_gate(x, x, jnp.zeros((24,)), EPS)
    with cases.annotations_unchecked(), pytest.raises(ValueError, match=r"x must be \[B, T, N, H\], got \[\d+, 3, 8\]"):
        norm_gate(x[0], x[0], jnp.zeros(SHAPE[2:]), EPS)
    with (
        cases.annotations_unchecked(),
        pytest.raises(ValueError, match="gate_logits must be floating point, got int32"),
    ):
        norm_gate(x, x.astype(jnp.int32), jnp.zeros(SHAPE[2:]), EPS)


def test_no_tokens() -> None:
    """An empty batch gives an empty output and a zero gradient of the weight, on a GPU too."""
    x = jnp.zeros((0, *SHAPE[1:]))
    with dispatch.target("gpu", 9.0):
        y, pullback = jax.vjp(lambda weight: norm_gate(x, x, weight, EPS), jnp.ones(SHAPE[2:]))
        (gradient,) = pullback(y)
    assert y.shape == x.shape
    np.testing.assert_array_equal(gradient, np.zeros(SHAPE[2:]))
