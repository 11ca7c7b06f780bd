"""The Triton kernels: interpreted against a float64 recurrence, and compiled to PTX for sm_80 and sm_90, no GPU."""

import functools
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton.backends.nvidia.compiler as triton_nvidia

from pallas_kernels import dispatch
from pallas_kernels.lightning import lightning_attention, triton
from tests.kernels.cases import relative
from tests.kernels.kernel_calls import Case, calls, decode_expected, expected

# Relative L2. fp32 runs at full precision. bf16 rounds scores, decayed keys and copies of the state, and where a GPU
# rounds to nearest the interpreter cuts off: twice the error.
LIMITS = {"float32": 2e-6, "bfloat16": 1e-2}
SHARED_MEMORY = 99 * 1024  # a block's limit on sm_86 and sm_89, the smallest of the GPUs meant

CASES = [
    (Case("one token", (1, 1, 2)), 16),
    (Case("ragged", (2, 150, 3)), 32),
    (Case("whole chunks, no states", (1, 128, 2), states=False), 32),
    (Case("full width", (1, 70, 1)), 128),
    (Case("boundaries at chunk edges", (1, 192, 2), "bfloat16", starts=((64, 128),)), 32),
    (Case("boundaries anywhere", (2, 150, 2), starts=((1, 2, 63, 65), (100,))), 32),
    (
        Case(
            "padding left, inside and right, and a row of nothing else",
            (3, 140, 4),
            "bfloat16",
            starts=((50, 90), (), (70,)),
            padding=(slice(40, 80), slice(None), slice(0, 66)),
        ),
        64,
    ),
]
DECODE_SLOTS = [None, [3, -1, 0], [5, 1, 9]]


def decode_arguments(slots: list[int] | None) -> tuple[Any, ...]:
    """One token of three requests for a pool of six rows, or of three without slots."""
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(3, 4, 64)).astype(np.float32) for _ in range(3))
    pool = random.normal(size=(3 if slots is None else 6, 4, 64, 64)).astype(np.float32)
    slopes = np.array([0.917, 5e-5, 0.1, 0.0039], np.float32)
    return q, k, v, pool, slopes, None if slots is None else np.array(slots, np.int32)


@pytest.fixture(scope="module")
def interpreted() -> list[Any]:
    """Results of every interpreted call of this file, in order, from one process of its own."""
    jobs = [
        (function, arguments) for case, width in CASES for function, arguments, _ in calls(case, case.inputs(width))
    ]
    jobs += [("decode_step", decode_arguments(slots)) for slots in DECODE_SLOTS]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_interpreter"],
        input=pickle.dumps(jobs),
        stdout=subprocess.PIPE,
        env={**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
        check=True,
    )
    return pickle.loads(done.stdout)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case, _ in CASES])
def test_kernels_equal_the_recurrence(index: int, interpreted: list[Any]) -> None:
    """INV-06, INV-07, INV-16, INV-36, and the hooks of INV-37."""
    case, width = CASES[index]
    drawn = case.inputs(width)
    wanted = expected(case, drawn)
    for (_, _, names), results in zip(calls(case, drawn), interpreted[4 * index : 4 * index + 4], strict=True):
        for name, result in zip(names, jax.tree.leaves(results), strict=True):
            assert relative(result, wanted[name]) < LIMITS[case.dtype], name


@pytest.mark.parametrize("index", range(len(DECODE_SLOTS)))
def test_decode_advances_only_its_slots(index: int, interpreted: list[Any]) -> None:
    """INV-31, INV-35: outputs, advanced rows and untouched rows, with ignored requests among them."""
    q, k, v, pool, slopes, slots = decode_arguments(DECODE_SLOTS[index])
    o, advanced = interpreted[4 * len(CASES) + index]
    wanted_o, wanted_pool = decode_expected(q, k, v, pool, slopes, slots)
    np.testing.assert_allclose(o, wanted_o, atol=1e-4)
    np.testing.assert_allclose(advanced, wanted_pool, atol=1e-5)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects what Triton's compiler returns for each kernel, instead of finding it in jax-triton's cache."""
    from jax_triton import triton_lib

    results: list[Any] = []
    original = triton_lib.compile_ttir_to_ptx_inplace

    def compile_and_keep(*arguments: Any) -> Any:
        results.append(original(*arguments))
        return results[-1]

    monkeypatch.setattr(triton_lib, "compile_ttir_to_ptx_inplace", compile_and_keep)
    monkeypatch.setattr(triton_lib, "_COMPILED_KERNEL_CACHE", {})
    return results


def lower_all(width: int, dtype: Any, packed: bool) -> None:
    """Lowers every operation for CUDA; Triton compiles while jax lowers."""
    batch, length, heads = 2, 1000, 4
    tokens = jax.ShapeDtypeStruct((batch, length, heads, width), dtype)
    token = jax.ShapeDtypeStruct((batch, heads, width), dtype)
    slopes = jax.ShapeDtypeStruct((heads,), jnp.float32)
    state = jax.ShapeDtypeStruct((batch, heads, width, width), jnp.float32)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32) if packed else None
    slots = jax.ShapeDtypeStruct((batch,), jnp.int32) if packed else None
    for function, arguments in (
        (triton.forward, (tokens, tokens, tokens, slopes, ids, state)),
        (triton.backward, (tokens, tokens, tokens, slopes, ids, None, tokens, state)),
        (lambda *a: triton.chunk_state(*a, False), (tokens, tokens, slopes, ids)),
        (lambda *a: triton.chunk_state(*a, True), (tokens, tokens, slopes, ids)),
        (triton.decode_step, (token, token, token, state, slopes, slots)),
    ):
        # A new function each time: a trace that jax remembers would still hold the kernel of another GPU.
        jax.jit(functools.partial(function)).trace(*arguments).lower(lowering_platforms=("cuda",))


def spilled_bytes(ptx: str, folder: Path) -> int:
    """Assembles PTX with the assembler that comes with Triton and returns the bytes a thread spills."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None
    command = [triton_nvidia.get_ptxas(int(target[1][3:5])).path, "-v", f"--gpu-name={target[1]}", "-o", os.devnull]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=120, check=True)
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", done.stderr)))


@pytest.mark.parametrize(
    ("capability", "width", "dtype", "packed"),
    [
        (8.0, 128, "bfloat16", False),
        (8.0, 128, "bfloat16", True),
        (9.0, 128, "bfloat16", True),
        (8.0, 64, "float32", True),
    ],
)
def test_kernels_compile_for_cuda(
    capability: float, width: int, dtype: str, packed: bool, compiled: list[Any], tmp_path: Path
) -> None:
    """Each kernel becomes PTX for the GPU asked for, in tensor-core dots where bf16, within its shared memory."""
    with dispatch.target("gpu", capability):
        assert triton.supports("forward", (2, 1000, 4, width), jnp.dtype(dtype), packed=packed) is None
        lower_all(width, jnp.dtype(dtype), packed)
    assert len(compiled) >= 6
    for kernel in compiled:
        assert f".target sm_{round(10 * capability)}" in kernel.binary
        assert kernel.shared_mem_bytes <= SHARED_MEMORY
        assert ".local" not in kernel.binary, "an array went to local memory"
    if dtype == "bfloat16":
        assert any("bf16.bf16" in kernel.binary and "mma" in kernel.binary for kernel in compiled)
        assert max(spilled_bytes(kernel.binary, tmp_path) for kernel in compiled) <= 64


def test_public_function_trains_on_ampere() -> None:
    """`lightning_attention` and its gradient choose these kernels on a GPU before Hopper."""
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    slopes = jax.ShapeDtypeStruct((2,), jnp.float32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array) -> jax.Array:
        return lightning_attention(q, k, v, slopes).astype(jnp.float32).sum()

    with dispatch.target("gpu", 8.0):
        text = (
            jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
            .trace(x, x, x, slopes)
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )
    assert text.count("triton_kernel_call") == 4
    assert "stablehlo.while" not in text, "the chunked form was lowered"


def test_unsupported_calls_say_why() -> None:
    """Each refusal names what was found; dispatch then falls back."""
    shape = (1, 256, 8, 128)
    with dispatch.target("cpu"):
        assert "no NVIDIA GPU" in str(triton.supports("forward", shape, jnp.bfloat16, packed=False))
    with dispatch.target("gpu", 7.5):
        assert "sm_75" in str(triton.supports("forward", shape, jnp.bfloat16, packed=False))
    with dispatch.target("gpu", 8.6):
        assert triton.supports("forward", shape, jnp.bfloat16, packed=True) is None
        assert "96" in str(triton.supports("forward", (1, 256, 8, 96), jnp.bfloat16, packed=False))
        assert "float16" in str(triton.supports("forward", shape, jnp.float16, packed=False))
