"""How segment ids reach the kernels: Triton's description of packed rows, and who computes it when."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, lightning
from pallas_kernels.lightning import mosaic_gpu_segments
from tests.kernels import cases, test_triton

compiled = test_triton.compiled

CHUNK = 64


def row(*pieces: tuple[int, int]) -> np.ndarray:
    """A row of these (id, tokens)."""
    ids, lengths = zip(*pieces, strict=True)
    return np.repeat(np.int32(ids), lengths)


def random_rows(batch: int, length: int) -> np.ndarray:
    """Rows of a few ids that come again, with padding of several signs in stretches; every second row has holes."""
    draw = np.random.default_rng([batch, length])
    ids = np.zeros((batch, length), np.int32)
    for index, ids_of_row in enumerate(ids):
        borders = np.sort(draw.integers(0, length + 1, size=10))
        ids_of_row[:] = draw.permutation([7, -3, 7, 2, 0, 2, 9, 7, -1, 2, 4])[
            np.searchsorted(borders, np.arange(length), side="right")
        ]
        ids_of_row[(draw.random(length) < 0.2) & (index % 2 == 1)] = 0
    return ids


# Segment ids [B, T] and tokens a block.
CASES: dict[str, tuple[np.ndarray, int]] = {
    "one token": (np.int32([[3], [0]]), 128),
    "short of a chunk": (random_rows(2, 63), 64),
    "one chunk": (random_rows(2, 64), 128),
    "one token more": (random_rows(2, 65), 64),
    "blocks of two chunks": (random_rows(4, 600), 128),
    "blocks of one chunk": (random_rows(2, 330), 64),
    "one segment": (np.full((1, 256), 5, np.int32), 128),
    "ids that go on or come again after blocks of padding": (
        np.stack([
            row((0, 70), (4, 20), (0, 300), (4, 30), (9, 80)),
            row((4, 70), (0, 20), (9, 50), (-1, 300), (4, 60)),
            row((8, 64), (6, 64), (4, 64), (4, 64), (2, 64), (1, 180)),
            row((0, 500)),
        ]),
        128,
    ),
    "16-bit ids": (random_rows(1, 200).astype(np.int16), 64),
}  # fmt: skip


@pytest.fixture(scope="module")
def interpreted() -> dict[str, np.ndarray]:
    """The description of every case by the interpreted kernels, from one process of its own."""
    jobs = [("describe_by_triton", (ids, CHUNK, block)) for ids, block in CASES.values()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_interpreter", mosaic_gpu_segments.__name__],
        input=pickle.dumps(jobs),
        stdout=subprocess.PIPE,
        env={**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    return dict(zip(CASES, pickle.loads(done.stdout), strict=True))


@pytest.fixture(scope="module")
def defined() -> dict[str, np.ndarray]:
    """The same by XLA, of all rows at once: padding after a row changes nothing in its chunks."""
    longest = max(ids.shape[1] for ids, _ in CASES.values())
    rows = np.concatenate([np.pad(ids, ((0, 0), (0, longest - ids.shape[1]))) for ids, _ in CASES.values()])
    described = np.asarray(jax.jit(mosaic_gpu_segments.describe_by_xla, static_argnums=1)(rows, CHUNK))
    parts = np.split(described, np.cumsum([len(ids) for ids, _ in CASES.values()])[:-1])
    return dict(zip(CASES, parts, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_triton_describes_rows_as_the_definition_does(
    name: str, interpreted: dict[str, np.ndarray], defined: dict[str, np.ndarray]
) -> None:
    """INV-36: whatever lies before and after a block, every number is the same, the unused ones too."""
    chunks = -(-CASES[name][0].shape[1] // CHUNK)
    np.testing.assert_array_equal(interpreted[name], defined[name][:, :chunks])


@pytest.mark.parametrize("length", [1, 32_768, mosaic_gpu_segments.LONGEST])
def test_triton_kernels_compile_for_hopper(length: int, compiled: list[Any], tmp_path: Path) -> None:
    """Two kernels without local memory, however many blocks there are."""
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
    with dispatch.target("gpu", 9.0):
        traced = jax.jit(lambda ids: mosaic_gpu_segments.describe(ids, CHUNK)).trace(ids)
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count("triton_kernel_call") == 2
    assert len(compiled) == 2
    for kernel in compiled:
        assert ".target sm_90" in kernel.binary
        assert ".local" not in kernel.binary, "an array went to local memory"
        assert test_triton.spilled_bytes(kernel.binary, tmp_path) == 0


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_triton_describes_only_ids_that_it_can_hold(dtype: str) -> None:
    """Of a 64-bit id int32 may keep nothing but zeros: padding."""
    with jax.enable_x64(True), dispatch.target("gpu", 9.0):
        ids = jax.ShapeDtypeStruct((1, 100), dtype)
        jaxpr = str(jax.make_jaxpr(lambda ids: mosaic_gpu_segments.describe(ids, CHUNK))(ids))
    assert ("triton" in jaxpr) == (dtype == "int32")


def _loss(q: jax.Array, ids: jax.Array) -> jax.Array:
    return lightning.lightning_attention(q, q, q, jnp.full(2, 0.1), segment_ids=ids).astype(jnp.float32).sum()


def test_forward_and_backward_share_one_description() -> None:
    """On Hopper: two Triton kernels for both, and no scan of the ids in XLA."""
    q, ids = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1, 256), jnp.int32)
    with dispatch.target("gpu", 9.0):
        traced = jax.jit(jax.grad(_loss)).trace(q, ids)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @triton_kernel_call") == 2
    assert "custom_call @mosaic_gpu_v2" in text
    assert "cumsum" not in str(traced.jaxpr)
    assert "cummax" not in str(traced.jaxpr)


def test_the_backward_runs_where_the_forward_did() -> None:
    """What the forward keeps is its implementation's own; the pullback may be called under another target."""

    def gradient(q: jax.Array, ids: jax.Array) -> jax.Array:
        with dispatch.target("gpu", 9.0):
            loss, pull = jax.vjp(lambda q: _loss(q, ids), q)
        return pull(loss)[0]

    q, ids = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1, 256), jnp.int32)
    assert jax.eval_shape(gradient, q, ids).shape == q.shape


def test_hopper_kernels_are_not_traced_with_64_bit_indices() -> None:
    """Triton's run instead."""
    q, ids = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1, 256), jnp.int32)
    with jax.enable_x64(True), dispatch.target("gpu", 9.0):
        text = jax.jit(jax.grad(_loss)).trace(q, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton_kernel_call" in text
    assert "mosaic_gpu_v2" not in text


def test_ids_as_given_equal_canonical_ones() -> None:
    """INV-36, INV-37: results and transmission say the same of ids that come again, go down or are negative padding."""
    x = cases.as_jax(cases.inputs(70, batch=3, slopes=(0.1,)))
    ids = jnp.asarray(np.stack([row((5, 30), (-2, 10), (5, 30)), row((5, 30), (1, 20), (5, 20)), row((-7, 70))]))
    for state, kept in zip(
        lightning.chunk_state(x.k, x.v, x.slopes, segment_ids=ids),
        lightning.chunk_state(x.k, x.v, x.slopes, segment_ids=lightning.canonical_segment_ids(ids)),
        strict=True,
    ):
        np.testing.assert_array_equal(state, kept)
    _, transmission = lightning.chunk_state(x.k, x.v, x.slopes, segment_ids=ids)
    np.testing.assert_allclose(transmission[:, 0], [np.exp(-0.1 * 60), 0, 1], rtol=1e-6)
