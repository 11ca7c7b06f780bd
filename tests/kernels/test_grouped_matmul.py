"""The grouped matmul against a loop over experts in numpy fp64.

On a CPU the Triton kernels run in Triton's interpreter, in one process of its own, and are compiled to PTX; on a GPU
the compiled kernels run.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.bench import common, timing
from pallas_kernels.bench import grouped_matmul as bench
from pallas_kernels.grouped_matmul import grouped_matmul, implementations, mosaic_gpu_rows, mosaic_gpu_weights, triton
from tests.kernels import cases, test_triton

# XLA's own ragged dot is TPU's default; it runs on a CPU too, and its shapes are tested there.
NAMES = tuple(dict.fromkeys((*implementations(), *(("ragged_dot",) if jax.default_backend() == "cpu" else ()))))

SHARED_MEMORY = {8.0: 99 * 1024, 9.0: 227 * 1024}  # sm_86 and sm_89 have the least of those that run sm_80's tiles
compiled = test_triton.compiled
KERNELS = ("mosaic_gpu", "triton")
FRONT, BACK = slice(0, 10), slice(10, 20)


def draw(rows: int, sizes: tuple[int, ...], width: int, hidden: int, dtype=np.float32) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng([rows, len(sizes)])
    shapes = ((rows, width), (len(sizes), width, hidden), (rows, hidden))
    return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


def definition(x, w, dy, sizes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Returns y, dx and dw by a loop over experts."""
    x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for expert, size in enumerate(sizes):
        own = slice(start, start + size)
        y[own], dx[own], dw[expert] = x[own] @ w[expert], dy[own] @ w[expert].T, x[own].T @ dy[own]
        start += size
    return y, dx, dw


@jax.jit(static_argnames="name")
def results(x, w, dy, sizes, name=None):
    y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=name), x, w)
    return y, *pullback(dy)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(300, (80, 0, 150, 70)), (37, (0, 5, 20, 0)), (3, (0, 0, 3, 0, 0, 0)), (64, (0, 0)), (130, (130,))],
)
def test_forward_and_gradients(name: str, rows: int, sizes: tuple[int, ...]) -> None:
    """INV-23: uneven and empty experts, one expert with everything, nothing at all, rows beyond the groups."""
    dtype, width, hidden, limit = (np.float32, 16, 24, 2e-6)
    if name in KERNELS:
        dtype, width, hidden, limit = ml_dtypes.bfloat16, 128, 256, 5e-3
    x, w, dy = draw(rows, sizes, width, hidden, dtype)
    actual = results(x, w, dy, np.asarray(sizes, np.int32), name)
    for result, a, b in zip(("y", "dx", "dw"), actual, definition(x, w, dy, sizes)):
        assert cases.relative(a, b) <= limit, result


def test_bf16() -> None:
    """bf16 rows are added up in fp32: results are off by one rounding."""
    x, w, dy = draw(512, (100, 300, 112), 64, 32, ml_dtypes.bfloat16)
    actual = results(x, w, dy, np.asarray((100, 300, 112), np.int32))
    for a, b in zip(actual, definition(x, w, dy, (100, 300, 112))):
        assert a.dtype == jnp.bfloat16
        assert cases.relative(a, b) <= 2e-3


@pytest.mark.parametrize("name", implementations())
def test_rows_beyond_the_groups_are_not_read(name: str) -> None:
    """Rows of no expert give 0 and get gradient 0, and what they hold reaches nothing: not even NaN."""
    dtype, width = (ml_dtypes.bfloat16, 256) if name in KERNELS else (np.float32, 16)
    x, w, dy = draw(40, (10, 12), width, width, dtype)
    clean = results(x, w, dy, np.asarray((10, 12), np.int32), name)
    x[22:] = np.nan
    dirty = results(x, w, dy, np.asarray((10, 12), np.int32), name)
    for a, b in zip(clean, dirty):
        np.testing.assert_array_equal(a, b)
    assert not np.any(dirty[0][22:])
    assert not np.any(dirty[1][22:])


@hypothesis.given(sizes=st.lists(st.integers(0, 40), min_size=5, max_size=5))
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_any_group_sizes(sizes: list[int]) -> None:
    """INV-23: every split of the rows, by one compiled program."""
    x, w, dy = draw(200, (0,) * 5, 8, 8)
    for a, b in zip(results(x, w, dy, np.asarray(sizes, np.int32)), definition(x, w, dy, tuple(sizes))):
        assert cases.relative(a, b) <= 2e-6


def test_work_is_not_experts_fold() -> None:
    """Compiled FLOPs stay within a quarter of the useful ones, for 16 experts as for one."""
    rows, experts, width = 4096, 16, 64
    x, w, dy = draw(rows, (rows // experts,) * experts, width, width)
    compiled = results.lower(x, w, dy, np.full(experts, rows // experts, np.int32)).compile()
    assert compiled.cost_analysis()["flops"] < 1.25 * 3 * 2 * rows * width * width


def test_inside_shard_map() -> None:
    """Rows split over devices that share the weights: the weights' gradient is the sum of all, replication checked."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sizes = np.asarray([[3, 5, 0], [1, 2, 4]], np.int32)
    x, w, dy = (jnp.asarray(a) for a in draw(20, (0, 0, 0), 8, 8))
    rows, shared = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def gradients(x, w, dy, sizes):
        return jax.vjp(lambda x, w: grouped_matmul(x, w, sizes[0]), x, w)[1](dy)

    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=(rows, shared, rows, rows), out_specs=(rows, shared))
    dx, dw = jax.jit(sharded)(x, w, dy, sizes)
    halves = [definition(*(np.asarray(a) for a in (x[h], w, dy[h])), tuple(n)) for h, n in zip((FRONT, BACK), sizes)]
    assert cases.relative(dx, np.concatenate([halves[0][1], halves[1][1]])) <= 2e-6
    assert cases.relative(dw, halves[0][2] + halves[1][2]) <= 2e-6


@pytest.mark.parametrize("shape", [(0, 2, 4, 6), (8, 0, 4, 6), (8, 2, 0, 6), (8, 2, 4, 0)], ids="MEDF")
def test_nothing_gives_nothing(shape: tuple[int, int, int, int]) -> None:
    """No rows, no experts or no width: results and gradients of the right shapes, all 0."""
    M, E, D, F = shape
    x, w, sizes = jnp.ones((M, D)), jnp.ones((E, D, F)), jnp.zeros(E, jnp.int32)
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    for got, wanted in zip((y, *pull(jnp.ones_like(y))), ((M, F), x.shape, w.shape)):
        np.testing.assert_array_equal(got, np.zeros(wanted))


def test_errors_name_what_is_wrong() -> None:
    """Arguments that do not fit raise with their shapes."""
    x, w, _ = draw(8, (4, 4), 4, 6)
    with (
        cases.annotations_unchecked(),
        pytest.raises(ValueError, match=r"must fit, got float32\[8, 4\], float32\[2, 4, 6\] and \[3\]"),
    ):
        grouped_matmul(jnp.asarray(x), jnp.asarray(w), jnp.zeros(3, jnp.int32))
    with cases.annotations_unchecked(), pytest.raises(ValueError, match="group_sizes must be integers, got float32"):
        grouped_matmul(jnp.asarray(x), jnp.asarray(w), jnp.zeros(2))
    with pytest.raises(ValueError, match="no implementation named 'cutlass'"):
        grouped_matmul(jnp.asarray(x), jnp.asarray(w), jnp.zeros(2, jnp.int32), implementation="cutlass")


# Experts with whole tiles, part of one, and no rows; rows of none; nothing at all; several tiles across.
INTERPRETED = [
    (200, (80, 0, 50, 20), 64, 96, np.float32),
    (37, (0, 5, 20, 0), 32, 32, np.float32),
    (64, (0, 0), 32, 64, np.float32),
    (70, (70,), 64, 32, np.float32),
    (300, (130, 170), 128, 128, ml_dtypes.bfloat16),
]


@pytest.fixture(scope="module")
def interpreted() -> list[tuple[Any, ...]]:
    """Expected and interpreted y, dx and dw of every case; rows of no expert hold NaN."""
    jobs, expected = [], []
    for rows, sizes, width, hidden, dtype in INTERPRETED:
        x, w, dy = draw(rows, sizes, width, hidden, dtype)
        expected.append(definition(x, w, dy, sizes))
        x[sum(sizes) :], dy[sum(sizes) :] = np.nan, np.nan
        groups = np.asarray(sizes, np.int32)
        jobs += [
            (triton.__name__, "matmul", (x, w, groups, False)),
            (triton.__name__, "matmul", (dy, w, groups, True)),
            (triton.__name__, "weight_gradient", (x, dy, groups)),
        ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.softmax_interpreter"],
        input=pickle.dumps(jobs),
        stdout=subprocess.PIPE,
        env={**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    results = pickle.loads(done.stdout)
    return [(e, results[3 * i : 3 * i + 3]) for i, e in enumerate(expected)]


@pytest.mark.parametrize("index", range(len(INTERPRETED)))
def test_triton_kernels_equal_the_definition(index: int, interpreted: list[tuple[Any, ...]]) -> None:
    """INV-23: the three products, whatever the groups."""
    # Where a GPU rounds bf16 to nearest the interpreter cuts off: twice the error.
    limit = 2e-6 if INTERPRETED[index][-1] is np.float32 else 1e-2
    for expected, actual in zip(*interpreted[index], strict=True):
        assert cases.relative(actual, expected) <= limit


@pytest.mark.parametrize("capability", [8.0, 9.0])
def test_triton_kernels_compile_for_cuda(capability: float, compiled: list[Any], tmp_path: Path) -> None:
    """Forward and gradients become three kernels in tensor-core dots, within the GPU's memories."""
    shapes = ((4096, 2048), (8, 2048, 3072), (4096, 3072))
    x, w, dy = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)

    def gradients(x, w, dy, sizes):
        y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation="triton"), x, w)
        return y, *pullback(dy)

    with dispatch.target("gpu", capability):
        traced = jax.jit(gradients).trace(x, w, dy, jax.ShapeDtypeStruct((8,), jnp.int32))
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("triton_kernel_call") == 3
    assert len(compiled) == 3
    for kernel in compiled:
        assert f".target sm_{round(10 * capability)}" in kernel.binary
        assert kernel.shared_mem_bytes <= SHARED_MEMORY[capability]
        assert ".local" not in kernel.binary, "an array went to local memory"
        assert ("wgmma" if capability == 9.0 else "mma.sync") in kernel.binary
        assert test_triton.spilled_bytes(kernel.binary, tmp_path) == 0


# No rows at an expert's start or end; fewer than 8 of both; one whole step and none; more than one step left over.
# With widths of 128 and 256, clusters of one CTA and of two.
HOPPER_CASES = [((128, 64, 0), 128), ((3, 9, 70), 256), ((20, 64, 127), 128), ((1, 70, 134), 256)]
on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="on a GPU, the compiled kernel runs in the tests above"
)


@pytest.fixture
def gpu_interpreter(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Interprets Mosaic GPU kernels and fails on a race."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    assert "RACE DETECTED" not in capfd.readouterr().out


@on_cpu
@pytest.mark.usefixtures("gpu_interpreter")
@pytest.mark.parametrize(("sizes", "width"), HOPPER_CASES)
def test_hopper_weight_gradient_equals_the_definition(sizes: tuple[int, ...], width: int) -> None:
    """INV-23: CTAs that walk from tile to tile, interpreted with race detection; what no expert owns is not read."""
    rows, owned = 210, sum(sizes)
    x, w, dy = draw(rows, sizes, width, 512, ml_dtypes.bfloat16)
    expected = definition(x, w, dy, sizes)[2]
    x[owned:], dy[owned:] = np.nan, np.nan
    gradient = jax.jit(mosaic_gpu_weights.weight_gradient, static_argnames="programs")
    actual = gradient(x, dy, np.asarray(sizes, np.int32), programs=4)
    assert cases.relative(actual, expected) <= 2e-3


# Several tiles for an expert; experts that share a block of 8 rows, one of them all within it; experts without rows and
# rows without an expert; fewer rows than a tile has. Clusters of one CTA and of two.
HOPPER_ROWS = [(600, (330, 0, 3, 2, 70, 130), 128), (100, (9, 0, 64), 256), (264, (264,), 128)]


@on_cpu
@pytest.mark.usefixtures("gpu_interpreter")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "sizes", "width"), HOPPER_ROWS)
def test_hopper_rows_equal_the_definition(rows: int, sizes: tuple[int, ...], width: int, transposed: bool) -> None:
    """INV-23: forward and rows' gradient, interpreted with race detection; what no expert owns is not read."""
    x, w, dy = draw(rows, sizes, width, 256, ml_dtypes.bfloat16)
    expected = definition(x, w, dy, sizes)[int(transposed)]
    given = dy if transposed else x
    given[sum(sizes) :] = np.nan
    product = jax.jit(mosaic_gpu_rows.matmul, static_argnums=3, static_argnames="programs")
    actual = product(given, w, np.asarray(sizes, np.int32), transposed, programs=4)
    assert cases.relative(actual, expected) <= 2e-3


def _drawn_groups(seed: int) -> tuple[int, np.ndarray]:
    random = np.random.default_rng(seed)
    sizes = random.integers(0, (4, 60, 900)[seed % 3], random.integers(1, 9))
    return max(256, int(-(-(sizes.sum() + random.integers(0, 300)) // 8) * 8)), sizes


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [*map(_drawn_groups, range(20)), (8_000_000, [7_500_001, 9]), (4_000_000, [8, 8]), (256, [300, 5])],
)
def test_hopper_tiles_cover_each_row_once(rows: int, sizes: Sequence[int]) -> None:
    """Of each expert, and of none; tiles fit their heights; bands keep to an expert, and lower tiles follow higher.

    Also where an expert has millions of rows; and no tile lies beyond the rows, whatever the sizes say.
    """
    sizes = np.asarray(sizes, np.int32)
    number, table = mosaic_gpu_rows._tiles(mosaic_gpu_rows._groups(jnp.asarray(sizes), rows), rows)
    tiles = [mosaic_gpu_rows._Tile(*map(int, tile)) for tile in np.asarray(table)[: int(number[0])]]
    owners = np.full(rows, -1)
    for index, tile in enumerate(tiles):
        assert tile.start % 8 == 0
        assert 0 <= tile.before < 8
        assert tile.before < tile.rows <= tile.height <= 256
        own = owners[tile.start + tile.before : tile.start + tile.rows]
        assert np.all(own == -1)
        own[:] = tile.owner
        assert tile.first <= index < tile.first + tile.band <= len(tiles)
        assert {tiles[i].owner for i in range(tile.first, tile.first + tile.band)} == {tile.owner}
    expected = np.repeat(np.arange(len(sizes) + 1), [*sizes, max(rows - sizes.sum(), 0)])[:rows]
    np.testing.assert_array_equal(owners, expected)
    greatest = {tile.owner: 0 for tile in tiles}
    for tile in tiles:
        greatest[tile.owner] = max(greatest[tile.owner], tile.height)
    heights = [height for owner, height in greatest.items() if owner < len(sizes)]
    assert heights == sorted(heights, reverse=True)


def test_public_function_lowers_for_hopper() -> None:
    """Three Mosaic GPU kernels; of Triton where widths do not fit them."""
    with dispatch.target("gpu", 9.0):
        for width, hidden, kernels in ((2048, 3072, (0, 3)), (1152, 3072, (0, 3)), (2048, 3136, (3, 0))):
            shapes = ((4096, width), (8, width, hidden), (4096, hidden))
            arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
            traced = results.trace(*arguments, jax.ShapeDtypeStruct((8,), jnp.int32))
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            found = [text.count(f"custom_call @{name}") for name in ("triton_kernel_call", "mosaic_gpu_v2")]
            assert tuple(found) == kernels


def test_triton_refuses_what_it_cannot_run() -> None:
    """Each refusal names what was found; dispatch then falls back."""
    x, w = jax.ShapeDtypeStruct((8, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 64, 48), jnp.bfloat16)
    with dispatch.target("cpu"):
        assert "no NVIDIA GPU" in str(triton.obstacle(x, w))
    with dispatch.target("gpu", 9.0):
        assert "48" in str(triton.obstacle(x, w))
        assert triton.obstacle(x, jax.ShapeDtypeStruct((2, 64, 96), jnp.bfloat16)) is None


def test_bench_yields_ours_and_every_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows carry times, operations and errors; a peer that fails or is missing leaves a row that says so."""
    monkeypatch.setattr(bench, "CASES", (bench.Case("small", 64, 4, 32, 64),))
    monkeypatch.setattr(common, "CACHE_BYTES", 0)
    monkeypatch.setattr(timing.milliseconds, "__kwdefaults__", {"repeats": 1})
    rows = list(bench.run(["einsum", "torch"], ["small"]))
    assert [(row.case, row.implementation) for row in rows] == [
        (f"small {what}", name) for what in ("fwd", "dx", "dw", "fwd+bwd") for name in ("ours", "einsum", "torch")
    ]
    for row in rows:
        assert (row.ms is not None) == (row.implementation != "torch" or row.note == "")
        assert row.flops == 2 * 64 * 32 * 64 * (3 if row.case.endswith("bwd") else 1)
    assert max(max(row.errors.values()) for row in rows if row.implementation == "ours") < 1e-2
    assert list(bench.run([], ["no such case"])) == []
