"""Softmax attention over key ranges against its definition in numpy fp64, gradients from each row's full Jacobian.

On a CPU the Triton kernels run in Triton's interpreter, in one process of its own, and are compiled to PTX, and the TPU
kernels are interpreted and compiled; on a GPU the compiled kernels run.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import dispatch, softmax
from pallas_kernels.bench import common, timing
from pallas_kernels.bench import softmax as bench
from pallas_kernels.lightning import mosaic_tpu as mosaic_tpu_lightning
from pallas_kernels.lightning import mosaic_tpu_bundles
from pallas_kernels.softmax import chunked, mosaic_tpu, triton
from pallas_kernels.softmax.chunked import Ranges
from tests.kernels import cases, test_triton

RESULTS = ("o", "lse", "dq", "dk", "dv")
SHARED_MEMORY = {8.0: 99 * 1024, 9.0: 227 * 1024}  # sm_86 and sm_89 have the least of those that run sm_80's tiles
compiled = test_triton.compiled


def draw(batch: int, queries: int, keys: int, heads: int, key_heads: int, dim: int, dtype=np.float32) -> dict:
    rng = np.random.default_rng([batch, queries, keys])
    shapes = {"q": (batch, queries, heads, dim), "k": (batch, keys, key_heads, dim), "v": (batch, keys, key_heads, dim)}
    shapes |= {"do": shapes["q"], "dlse": (batch, queries, heads)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def definition(x: dict, start: np.ndarray, end: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """Each row alone: weights over its own keys, gradient by the Jacobian diag(p) - p p^T."""
    q, k, v, do, dlse = (x[name].astype(np.float64) for name in ("q", "k", "v", "do", "dlse"))
    group = q.shape[2] // k.shape[2]
    o, dq, dk, dv = (np.zeros_like(a) for a in (q, q, k, v))
    lse = np.full(q.shape[:3], -np.inf)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen, g = slice(start[b, t], end[b, t]), n // group
        if start[b, t] >= end[b, t]:
            continue
        scores = scale * k[b, seen, g] @ q[b, t, n]
        lse[b, t, n] = np.logaddexp.reduce(scores)
        p = np.exp(scores - lse[b, t, n])
        o[b, t, n] = p @ v[b, seen, g]
        ds = (np.diag(p) - np.outer(p, p)) @ (v[b, seen, g] @ do[b, t, n]) + dlse[b, t, n] * p
        dq[b, t, n] = scale * ds @ k[b, seen, g]
        dk[b, seen, g] += scale * np.outer(ds, q[b, t, n])
        dv[b, seen, g] += np.outer(p, do[b, t, n])
    return dict(zip(RESULTS, (o, lse, dq, dk, dv)))


def run(x: dict, start, end, scale: float, implementation: str | None = None) -> dict[str, jax.Array]:
    @jax.jit
    def results(x, start, end):
        def forward(q, k, v):
            return softmax.softmax_attention(
                q, k, v, scale=scale, k_start=start, k_end=end, return_lse=True, implementation=implementation
            )

        (o, lse), pullback = jax.vjp(forward, x["q"], x["k"], x["v"])
        return o, lse, *pullback((x["do"], x["dlse"].astype(lse.dtype)))

    return dict(zip(RESULTS, results(jax.tree.map(jnp.asarray, x), start, end)))


def compare(actual: dict, expected: dict, limit: float) -> None:
    some = np.isfinite(expected["lse"])
    np.testing.assert_array_equal(np.isfinite(actual["lse"]), some)
    for name in RESULTS:
        a, b = (np.asarray(side[name]).astype(np.float64) for side in (actual, expected))
        if name == "lse":
            a, b = a[some], b[some]
        assert cases.relative(a, b) <= limit, name


def ranges(kind: str, batch: int, queries: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Key ranges of every use: packed rows with padding, chunked prefill, decoding, arbitrary windows, nothing."""
    position = np.arange(queries)
    rng = np.random.default_rng(queries + keys)
    if kind == "packed":
        ids = cases.packed(batch, queries)
        ids[:, : queries // 8] = 0
        changed = np.diff(ids, axis=1, prepend=-1) != 0
        start = np.maximum.accumulate(np.where(changed, position, 0), axis=1)
        start, end = start, np.where(ids > 0, position + 1, 0)
    elif kind == "offset":
        start, end = np.zeros((batch, queries)), np.broadcast_to(keys - queries + position + 1, (batch, queries))
    elif kind == "stripes":  # the first and the last quarter of the keys' row, causal
        place = np.where(position < queries // 2, position, keys - queries + position)
        start, end = np.zeros((batch, queries)), np.broadcast_to(place + 1, (batch, queries))
    elif kind == "windows":
        start, end = rng.integers(0, keys + 1, size=(2, batch, queries))
    else:
        start, end = np.full((2, batch, queries), keys // 2)
    return np.asarray(start, np.int32), np.asarray(end, np.int32)


CASES = [
    ("packed", 65, 65),
    ("offset", 20, 130),
    ("offset", 1, 130),
    ("windows", 65, 40),
    ("nothing", 9, 12),
]


@pytest.mark.parametrize("blocks", [None, (16, 24)])
@pytest.mark.parametrize(("kind", "queries", "keys"), CASES)
def test_ranges(monkeypatch: pytest.MonkeyPatch, kind: str, queries: int, keys: int, blocks: tuple | None) -> None:
    """INV-17, INV-21, INV-36: output, log-sum-exp and gradients through both, for one block and for many."""
    if blocks:
        monkeypatch.setattr(chunked, "block_lengths", lambda b, t, s, n: (min(blocks[0], t), min(blocks[1], s)))
    x = draw(3, queries, keys, 4, 2, 8)
    start, end = ranges(kind, 3, queries, keys)
    compare(run(x, start, end, 0.3), definition(x, start, end, 0.3), 2e-6)


@pytest.mark.parametrize("name", [n for n in softmax.implementations() if n != "cudnn"])
def test_plain_causal(name: str) -> None:
    """INV-17: without ranges the mask is causal; the oracle form agrees with the definition as well."""
    x = draw(2, 33, 33, 4, 1, 8)
    end = np.broadcast_to(np.arange(1, 34, dtype=np.int32), (2, 33))
    compare(run(x, None, None, 8**-0.5, name), definition(x, 0 * end, end, 8**-0.5), 2e-6)


@pytest.mark.parametrize("name", softmax.implementations())
def test_bf16(name: str) -> None:
    """Scores and softmax are fp32: bf16 results are off by the rounding of operands and weights alone."""
    x = draw(2, 128, 128, 4, 2, 64, ml_dtypes.bfloat16)
    end = np.broadcast_to(np.arange(1, 129, dtype=np.int32), (2, 128))
    expected = definition(x | {"dlse": 0 * x["dlse"]}, 0 * end, end, 0.125)

    @jax.jit
    def results(q, k, v, do):
        o, pullback = jax.vjp(
            lambda *tokens: softmax.softmax_attention(*tokens, scale=0.125, implementation=name), q, k, v
        )
        return o, *pullback(do)

    actual = dict(zip(("o", "dq", "dk", "dv"), results(*(x[n] for n in ("q", "k", "v", "do")))))
    for n, value in actual.items():
        assert value.dtype == jnp.bfloat16
        assert cases.relative(value, expected[n]) <= 5e-3, n


def test_queries_without_keys_have_no_gradient() -> None:
    """An empty range gives 0, its log-sum-exp is -inf, and NaN or infinite gradients arriving there do no harm."""
    x = draw(1, 6, 6, 2, 1, 8)
    end = np.asarray([[1, 2, 0, 4, 0, 6]], np.int32)
    x["dlse"][0, [2, 4]] = np.nan
    actual = run(x, 0 * end, end, 0.3)
    x["dlse"][0, [2, 4]] = 0
    compare(actual, definition(x, 0 * end, end, 0.3), 2e-6)
    assert not np.any(actual["o"][0, [2, 4]])
    assert not np.any(actual["dq"][0, [2, 4]])
    assert np.all(np.isneginf(actual["lse"][0, [2, 4]]))


def test_partial_results_merge() -> None:
    """INV-39: two parts of the keys merged by their log-sum-exp equal all keys, and so do autodiff's gradients."""
    x = {name: jnp.asarray(a) for name, a in draw(2, 40, 40, 2, 2, 8).items()}
    end = jnp.broadcast_to(jnp.arange(1, 41, dtype=jnp.int32), (2, 40))

    def merged(q, k, v):
        parts = [
            softmax.softmax_attention(
                q, k[:, cut], v[:, cut], scale=0.3, k_start=0 * end, k_end=end - cut.start, return_lse=True
            )
            for cut in (slice(0, 15), slice(15, 40))
        ]
        (first, first_lse), (second, second_lse) = parts
        share = jax.nn.sigmoid(jnp.where(jnp.isfinite(second_lse), second_lse, -1e9) - first_lse)[..., None]
        return (1 - share) * first + share * second

    def whole(q, k, v):
        return softmax.softmax_attention(q, k, v, scale=0.3)

    tokens = (x["q"], x["k"], x["v"])

    @jax.jit(static_argnums=0)
    def results(function, do):
        o, pullback = jax.vjp(function, *tokens)
        return o, *pullback(do)

    for a, b in zip(results(merged, x["do"]), results(whole, x["do"])):
        assert cases.relative(a, np.asarray(b, np.float64)) <= 2e-6


def test_memory_has_no_score_matrix() -> None:
    """Forward and backward over T = S = 4096 hold far less than one [T, S] array of a head."""
    x = {name: jnp.asarray(a) for name, a in draw(1, 4096, 4096, 1, 1, 8).items()}

    def loss(q, k, v):
        return jnp.sum(softmax.softmax_attention(q, k, v, scale=0.3) ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x["q"], x["k"], x["v"]).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 4096 * 4 / 4


def test_inside_shard_map() -> None:
    """Batch and heads split over a mesh, replication checked: the same numbers as on one device."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = {name: jnp.asarray(a) for name, a in draw(2, 300, 300, 4, 2, 8).items()}

    def gradients(q, k, v, do):
        o, pullback = jax.vjp(lambda *x: softmax.softmax_attention(*x, scale=0.3), q, k, v)
        return o, *pullback(do)

    tokens = jax.sharding.PartitionSpec("data", None, "tensor")
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=(tokens,) * 4, out_specs=(tokens,) * 4)
    arguments = (x["q"], x["k"], x["v"], x["do"])
    for actual, expected in zip(jax.jit(sharded)(*arguments), jax.jit(gradients)(*arguments)):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_errors_name_what_is_wrong() -> None:
    """Shapes that do not fit raise with the argument's name."""
    q, k, v = (jnp.asarray(a) for a in list(draw(1, 4, 6, 4, 2, 8).values())[:3])
    end = jnp.ones((1, 4), jnp.int32)
    wrong = [
        ("without k_start and k_end T and S must agree, got 4 and 6", q, {}),
        ("k_start and k_end come together", q, {"k_end": end}),
        ("3 query heads are no multiple of 2 key heads", q[:, :, :3], {"k_start": end, "k_end": end}),
        (r"k_end must be integers \[B, T\]", q, {"k_start": end, "k_end": end[:, :2]}),
        ("k_start must be integers .* got float32", q, {"k_start": end / 2, "k_end": end}),
        ("must share one of .*, got q bfloat16, k float32", q.astype(jnp.bfloat16), {"k_start": end, "k_end": end}),
        (r"q must have four axes, .* got \[4, 4, 8\]", q[0], {}),
        (r"q must have four axes, none of them empty, got \[1, 0, 4, 8\]", q[:, :0], {}),
        ("'cudnn' cannot run this call: the platform is", q, {"k_start": end, "k_end": end, "implementation": "cudnn"}),
        ("'mosaic_tpu' cannot run this call", q, {"k_start": end, "k_end": end, "implementation": "mosaic_tpu"}),
    ]
    for message, query, arguments in wrong:
        with cases.annotations_unchecked(), pytest.raises(ValueError, match=message):
            softmax.softmax_attention(query, k, v, scale=0.3, **arguments)
    with dispatch.target("gpu", 9.0), pytest.raises(ValueError, match="'cudnn' cannot run this call: key ranges"):
        softmax.softmax_attention(q, k, v, scale=0.3, k_start=end, k_end=end, implementation="cudnn")


# What the Triton kernels must do: several tiles each way, segments within, across and at the edges of tiles, tiles that
# are seen whole, rows that see nothing, lengths that no tile divides.
INTERPRETED = [
    ("packed", 100, 100, 4, 2, np.float32),
    ("offset", 40, 130, 2, 1, np.float32),
    ("windows", 65, 70, 2, 2, np.float32),
    ("nothing", 9, 12, 2, 1, np.float32),
    ("packed", 140, 140, 2, 1, ml_dtypes.bfloat16),
]


@pytest.fixture(scope="module")
def interpreted() -> list[tuple[dict, dict]]:
    """Expected and interpreted results of every case; the backward starts from the definition's output."""
    jobs, expected = [], []
    for kind, queries, keys, heads, key_heads, dtype in INTERPRETED:
        x = draw(2, queries, keys, heads, key_heads, 16, dtype)
        x["dlse"] = x["dlse"].astype(np.float32)
        seen = Ranges(*ranges(kind, 2, queries, keys))
        expected.append(definition(x, *seen, 0.3))
        o, lse = expected[-1]["o"].astype(dtype), expected[-1]["lse"].astype(np.float32)
        tokens = (x["q"], x["k"], x["v"], seen, 0.3)
        jobs.append((triton.__name__, "forward", tokens))
        jobs.append((triton.__name__, "backward", (*tokens, o, lse, x["do"], x["dlse"])))
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.softmax_interpreter"],
        input=pickle.dumps(jobs),
        stdout=subprocess.PIPE,
        env={**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    results = pickle.loads(done.stdout)
    actual = [dict(zip(RESULTS, (*results[i], *results[i + 1]))) for i in range(0, len(results), 2)]
    return list(zip(expected, actual, strict=True))


@pytest.mark.parametrize("index", range(len(INTERPRETED)))
def test_triton_kernels_equal_the_definition(index: int, interpreted: list[tuple[dict, dict]]) -> None:
    """INV-17, INV-21, INV-36, INV-39: output, log-sum-exp and gradients through both."""
    expected, actual = interpreted[index]
    # Where a GPU rounds bf16 to nearest the interpreter cuts off: twice the error.
    compare(actual, expected, 2e-6 if INTERPRETED[index][-1] is np.float32 else 1e-2)


def abstract(
    queries: int, keys: int, dim: int, dtype: Any = jnp.bfloat16, sharding: Any = None
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """q, k, v, k_start, k_end and do of eight heads that read two."""
    shapes = ((1, queries, 8, dim), *[(1, keys, 2, dim)] * 2, *[(1, queries)] * 2, (1, queries, 8, dim))
    dtypes = (dtype,) * 3 + (jnp.int32,) * 2 + (dtype,)
    return tuple(jax.ShapeDtypeStruct(*x, sharding=sharding) for x in zip(shapes, dtypes))


def gradients(q, k, v, start, end, do):
    def attend(q, k, v):
        return softmax.softmax_attention(q, k, v, scale=0.1, k_start=start, k_end=end)

    o, pullback = jax.vjp(attend, q, k, v)
    return o, *pullback(do)


@pytest.mark.parametrize("capability", [8.0, 9.0])
def test_triton_kernels_compile_for_cuda(capability: float, compiled: list[Any], tmp_path: Path) -> None:
    """The public function and its gradient become three kernels in tensor-core dots, within the GPU's memories."""
    with dispatch.target("gpu", capability):
        # A new function each time: a trace that jax remembers would still hold the kernel of another GPU.
        lowered = (
            jax.jit(lambda *x: gradients(*x)).trace(*abstract(1000, 1300, 128)).lower(lowering_platforms=("cuda",))
        )
    text = lowered.as_text()
    assert text.count("triton_kernel_call") == 3
    assert "stablehlo.while" not in text, "the chunked form was lowered"
    assert len(compiled) == 3
    for kernel in compiled:
        assert f".target sm_{round(10 * capability)}" in kernel.binary
        assert kernel.shared_mem_bytes <= SHARED_MEMORY[capability]
        assert ".local" not in kernel.binary, "an array went to local memory"
        assert ("wgmma" if capability == 9.0 else "mma.sync") in kernel.binary
        assert test_triton.spilled_bytes(kernel.binary, tmp_path) <= 128


def test_triton_refuses_what_it_cannot_run() -> None:
    """Each refusal names what was found; dispatch then falls back."""
    q, k, *_ = abstract(64, 64, 128)
    assert "no NVIDIA GPU" in str(triton.supports(q, k, 0.1))
    with dispatch.target("gpu", 7.5):
        assert "sm_75" in str(triton.supports(q, k, 0.1))
    with dispatch.target("gpu", 9.0):
        assert triton.supports(q, k, 0.1) is None
        assert "-1" in str(triton.supports(q, k, -1.0))
        assert "96" in str(triton.supports(*abstract(64, 64, 96)[:2], 0.1))


# What the TPU kernels must do: several tiles each way and in each piece, rows of a batch in one list, segments within,
# across and at the edges of tiles, tiles that are seen whole, queries and whole rows that see nothing, a ragged end.
TPU_CASES = [
    ("packed", 384, 384, 4, 2, np.float32, {}),
    ("offset", 100, 300, 2, 2, np.float32, {}),
    ("windows", 300, 200, 2, 1, np.float32, {"MAX_HELD": 128}),
    ("nothing", 20, 12, 2, 1, np.float32, {}),
    ("stripes", 256, 512, 4, 1, np.float32, {"MAX_LIST": 4}),
    ("packed", 384, 384, 2, 1, ml_dtypes.bfloat16, {"MAX_HELD": 256}),
]


@pytest.mark.parametrize(("kind", "queries", "keys", "heads", "key_heads", "dtype", "limits"), TPU_CASES)
def test_tpu_kernels_equal_the_definition(
    kind: str, queries: int, keys: int, heads: int, key_heads: int, dtype: Any, limits: dict,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """INV-17, INV-21, INV-36, INV-39: interpreted as on two cores, with race detection; memory begins as NaN."""
    for name, limit in limits.items():
        monkeypatch.setattr(mosaic_tpu, name, limit)
    monkeypatch.setattr(mosaic_tpu, "TILES", (128, 128))
    x = draw(2, queries, keys, heads, key_heads, 128, dtype)
    x["dlse"] = x["dlse"].astype(np.float32)
    start, end = ranges(kind, 2, queries, keys)
    with dispatch.target("tpu"), mosaic_tpu_lightning.interpreted():
        actual = jax.tree.map(np.asarray, run(x, jnp.asarray(start), jnp.asarray(end), 0.1, "mosaic_tpu"))
    compare(actual, definition(x, start, end, 0.1), 2e-6 if dtype is np.float32 else 5e-3)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("kind", ["packed", "windows", "stripes"])
def test_tpu_lists_hold_what_is_seen(kind: str, by_keys: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """INV-36: each tile of scores in which a pair is visible stands there once, and what is unmasked is seen whole.

    No tile outside the hull of its queries' ranges does, but for one a tile of queries (by queries) or a piece (by
    keys); entries of one tile stand together and know which of them are first and last.
    """
    monkeypatch.setattr(mosaic_tpu, "TILES", (128, 128))
    rows, queries, keys = 2, 512, 640
    start, end = ranges(kind, rows, queries, keys)
    q, k = (jax.ShapeDtypeStruct((rows, n, 1, 128), jnp.float32) for n in (queries, keys))
    cut = mosaic_tpu.Cut.of(q, k, 384)
    places, counts, tiles, entries = map(
        np.asarray, cut.lists(Ranges(*map(jnp.asarray, (start, end))), by_keys=by_keys)
    )
    place = np.arange(keys)
    visible = (place >= start[..., None]) & (place < end[..., None])
    scores = visible.reshape(rows * 4, 128, 5, 128).transpose(0, 2, 1, 3)
    listed = set()
    for piece, count in enumerate(counts):
        own, tile, flags = tiles[piece, :count], entries[piece, :count] >> 3, entries[piece, :count] & 7
        assert (own >= places[piece]).all()
        assert (own < places[piece] + cut.piece).all()
        major = tile if by_keys else own
        new = np.diff(major, prepend=-1) != 0
        np.testing.assert_array_equal(flags & 1 != 0, new)
        np.testing.assert_array_equal(flags & 2 != 0, np.append(new[1:], True))
        assert len(set(major[new])) == new.sum()
        for a, b, masked in zip(own, tile, flags & 4):
            if a >= rows * 4:  # the last piece reaches beyond the queries
                assert masked
                continue
            assert b // 5 == a // 4
            listed.add((a, b % 5))
            seeing = scores[a, b % 5].any(1) | ~visible.reshape(rows * 4, 128, keys)[a].any(1)
            assert masked or scores[a, b % 5][seeing].all() or not seeing.any()
    assert set(zip(*np.nonzero(scores.any((2, 3))))) <= listed
    most = len(counts) if by_keys else rows * 4
    for first, last in zip(start.reshape(-1, 128), end.reshape(-1, 128)):
        if (some := first < last).any():
            most += -(-last[some].max() // 128) - first[some].min() // 128
    assert len(listed) <= most


@pytest.mark.xdist_group("libtpu")
@pytest.mark.tpu_compiler
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("chip", "queries", "keys", "dtype"), [("v5p", 32_768, 1 << 20, jnp.bfloat16),
                                                                ("v6e", 1000, 1300, jnp.float32)])  # fmt: skip
def test_tpu_kernels_compile(chip: str, queries: int, keys: int, dtype: Any) -> None:
    """The public function and its gradient become two kernels, in place: a part of a million keys, and odd sizes."""
    mesh = mosaic_tpu_bundles.chip_mesh(chip)
    with jax.set_mesh(mesh), dispatch.target("tpu"):
        arguments = abstract(queries, keys, 128, dtype, sharding=jax.NamedSharding(mesh, jax.P()))
        compiled = jax.jit(lambda *x: gradients(*x)).trace(*arguments).lower().compile()
    text = compiled.as_text()
    assert text.count("tpu_custom_call") == 2
    assert "softmax_forward" in text
    assert "softmax_backward" in text
    if keys > mosaic_tpu.LONG:  # dk and dv in fp32, k and v as the kernels read them, and half of a sum beside
        assert compiled.memory_analysis().temp_size_in_bytes < 3.5 * (4 * keys * 2 * 128)


def test_tpu_refuses_what_it_cannot_run() -> None:
    """Each refusal names what was found; dispatch then falls back."""
    q, k, *_ = abstract(64, 64, 128)
    assert "not a TPU" in str(mosaic_tpu.supports(q, k))
    with dispatch.target("tpu"):
        assert mosaic_tpu.supports(q, k) is None
        assert "64" in str(mosaic_tpu.supports(*abstract(64, 64, 64)[:2]))
        assert "float16" in str(mosaic_tpu.supports(*abstract(64, 64, 128, jnp.float16)[:2]))
        assert "keys in a row" in str(mosaic_tpu.supports(*abstract(64, 1 << 27, 128)[:2]))


def test_bench_yields_ours_and_every_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward rows carry times, operations and errors; a peer that fails leaves a row that says so."""
    small = bench.Case("small", 1, 96, 96, 2, 1, segments=(32, 24, 40))
    monkeypatch.setattr(bench, "CASES", (small, bench.Case("offset", 1, 8, 40, 2, 1, peers=False)))
    monkeypatch.setattr(common, "CACHE_BYTES", 0)
    monkeypatch.setattr(timing.milliseconds, "__kwdefaults__", {"repeats": 1})
    rows = list(bench.run(["cudnn", "torch"], []))
    assert [(row.case, row.implementation) for row in rows] == [
        *[(f"small {what}", name) for name in ("ours", "cudnn", "torch") for what in ("fwd", "fwd+bwd")],
        *[(f"offset {what}", "ours") for what in ("fwd", "fwd+bwd")],
    ]
    assert [row.ms is not None for row in rows] == [True, True, *[jax.default_backend() == "gpu"] * 4, True, True]
    assert all(max(row.errors.values()) < 1e-2 for row in rows if row.implementation == "ours")
    assert rows[0].flops == 4 * 128 * 2 * sum(n * (n + 1) / 2 for n in (32, 24, 40))
    assert list(bench.run([], ["no such case"])) == []
    assert sum(bench.mixed_lengths(16, 2048)) == 32768
