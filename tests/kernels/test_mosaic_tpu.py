"""The TPU kernels: interpreted with race detection against a float64 recurrence, and compiled for v5p and v6e."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.lightning import lightning_attention, mosaic_tpu, mosaic_tpu_bundles, mosaic_tpu_decode
from pallas_kernels.lightning.mosaic_tpu_segments import FRESH, MIXED, PADDING, PLAIN, chunk_runs
from tests.kernels.cases import bound, relative
from tests.kernels.kernel_calls import Case, calls, decode_expected, expected

WIDTH = mosaic_tpu.WIDTH
STATES = ("state", "dinitial_state", "chunk", "chunk_reverse")

CASES = [
    Case("one token", (1, 1, 2)),
    Case("shorter than a chunk, no states", (2, 70, 2), states=False),
    Case("whole chunks", (1, 256, 8), "bfloat16"),
    Case("ragged", (1, 300, 3)),
    Case("boundaries at chunk edges", (1, 384, 2), starts=((128, 256),)),
    Case("boundaries anywhere", (2, 300, 2), starts=((1, 2, 127, 129), (200,))),
    Case(
        "padding left, inside and right, and a row of nothing else",
        (3, 260, 2),
        starts=((100, 130), (), (64,)),
        padding=(slice(90, 150), slice(None), slice(0, 130)),
    ),
    Case("packed bf16", (1, 320, 4), "bfloat16", starts=((128, 200),), padding=(slice(250, 320),)),
]


def check(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    """Compares every operation with the oracle, zeros at padding included, and asks the interpreter about races."""
    drawn = case.inputs(WIDTH)
    wanted = expected(case, drawn)
    with mosaic_tpu.interpreted():
        for function, arguments, names in calls(case, drawn):
            batch, length, heads = case.shape
            size = (batch, length, heads, WIDTH)
            assert mosaic_tpu.supports(function, size, case.dtype, packed=case.starts is not None) is None
            results = getattr(mosaic_tpu, function)(
                *(jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in arguments)
            )
            for name, result in zip(names, jax.tree.leaves(results), strict=True):
                assert result.dtype == (jnp.float32 if name in STATES else case.dtype)
                assert relative(result, wanted[name]) < bound(case.dtype, state=name in ("state", "chunk")), name
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_equal_the_recurrence(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    """INV-06, INV-07, INV-16, INV-36, and the hooks of INV-37."""
    check(case, capfd)


def test_chunks_of_256(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """INV-06: the chunk length of v5e and v6e, ragged and packed."""
    monkeypatch.setattr(mosaic_tpu, "plan", lambda batch, heads: mosaic_tpu.Plan(256, 2))
    check(Case("chunk 256", (1, 300, 2), starts=((270,),)), capfd)


@pytest.mark.parametrize("slots", [None, [3, -1, 0], [-1, 4, 2], [-1, -1, -1], [5, 1, 9]])
def test_decode_advances_only_its_slots(slots: list[int] | None, capfd: pytest.CaptureFixture[str]) -> None:
    """INV-31, INV-35: outputs, advanced rows and untouched rows, with ignored requests at every position."""
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(3, 4, WIDTH)).astype(np.float32) for _ in range(3))
    pool = random.normal(size=(3 if slots is None else 6, 4, WIDTH, WIDTH)).astype(np.float32)
    slopes = np.array([0.917, 5e-5, 0.1, 0.0039], np.float32)
    with mosaic_tpu.interpreted():
        o, advanced = mosaic_tpu.decode_step(
            *map(jnp.asarray, (q, k, v, pool, slopes)), None if slots is None else jnp.array(slots, jnp.int32)
        )
    wanted_o, wanted_pool = decode_expected(q, k, v, pool, slopes, slots)
    np.testing.assert_allclose(o, wanted_o, atol=1e-4)
    np.testing.assert_allclose(advanced, wanted_pool, atol=1e-5)
    untouched = [row for row in range(len(pool)) if slots is not None and row not in slots]
    np.testing.assert_array_equal(np.asarray(advanced)[untouched], pool[untouched])
    assert "RACE" not in capfd.readouterr().out


def test_a_pool_row_stays_in_one_stretch_of_steps() -> None:
    """INV-35: were a row held again later, that step could have fetched it before its new state was written."""
    random = np.random.default_rng(0)
    for _ in range(50):
        slots = np.where(random.random(7) < 0.5, random.permutation(9)[:7], random.choice([-1, 9], 7))
        rows, live = map(np.asarray, mosaic_tpu_decode.pool_rows(jnp.asarray(slots, jnp.int32), 9))
        assert ((slots >= 0) & (slots < 9)).tolist() == live.tolist()
        assert rows[live == 1].tolist() == slots[live == 1].tolist()
        stretches = 1 + np.count_nonzero(np.diff(rows))
        assert stretches == len(set(rows.tolist()))


def test_chunks_are_classified() -> None:
    """INV-36: which chunks take the constant-decay path, and what a mixed one is told about its tokens."""
    ids = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 3, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    modes, runs = chunk_runs(ids, 4)
    assert modes.tolist() == [PLAIN, FRESH, MIXED, MIXED, MIXED, PLAIN, PLAIN, MIXED]
    assert runs[0, 0, 8:].tolist() == [0, 0, PADDING, 1, PADDING, PADDING, PADDING, PADDING]
    assert runs[0, 1, 8:].tolist() == [1, 2, 2, 3, 0, 0, 0, 0]


def test_unsupported_calls_say_why() -> None:
    """Each refusal names what was found; dispatch then falls back."""
    shape = (1, 256, 8, WIDTH)
    assert "not a TPU" in str(mosaic_tpu.supports("forward", shape, jnp.bfloat16, packed=False))
    with dispatch.target("tpu"):
        assert mosaic_tpu.supports("forward", shape, jnp.bfloat16, packed=True) is None
        assert "64" in str(mosaic_tpu.supports("forward", (1, 256, 8, 64), jnp.bfloat16, packed=False))
        assert "float16" in str(mosaic_tpu.supports("forward", shape, jnp.float16, packed=False))
        assert "chunks" in str(mosaic_tpu.supports("backward", (1, 1 << 25, 8, WIDTH), jnp.bfloat16, packed=True))


@pytest.mark.xdist_group("libtpu")
@pytest.mark.tpu_compiler
@pytest.mark.usefixtures("compiler")
class TestCompiler:
    """The real TPU compiler, without a TPU: it rejects wrong layouts and too much VMEM, and shows copies."""

    @pytest.mark.parametrize("chip", ["v5p", "v6e"])
    @pytest.mark.parametrize(("heads", "length", "packed"), [(64, 8192, False), (8, 8192, True)])
    def test_kernels_compile_without_copies(self, chip: str, heads: int, length: int, packed: bool) -> None:
        """Every operation at R and with 8 heads: no transpose and no copy of a tensor around the kernels."""
        mesh = mosaic_tpu_bundles.chip_mesh(chip)
        with jax.set_mesh(mesh), dispatch.target("tpu"):
            made = mosaic_tpu_bundles.calls(mesh, 1, length, heads, jnp.bfloat16, packed)
            assert mosaic_tpu.plan(1, heads).chunk == {"v5p": 128, "v6e": 256}[chip]
            for name, call in made.items():
                compiled = mosaic_tpu_bundles.compile_call(call)
                assert compiled.as_text().count("tpu_custom_call") == (2 if name == "backward" else 1), name
                one_tensor = 2 * length * heads * WIDTH
                assert compiled.memory_analysis().temp_size_in_bytes < one_tensor // 8, name
                if name == "decode_step":
                    assert compiled.memory_analysis().alias_size_in_bytes == 4 * heads * WIDTH**2

    @pytest.mark.parametrize(("chip", "heads", "length"), [("v5p", 3, 70), ("v6e", 12, 1000)])
    def test_odd_sizes_and_fp32_compile(self, chip: str, heads: int, length: int) -> None:
        """Head counts and lengths that fit nothing, and twice the VMEM."""
        mesh = mosaic_tpu_bundles.chip_mesh(chip)
        with jax.set_mesh(mesh):
            made = mosaic_tpu_bundles.calls(mesh, 2, length, heads, jnp.float32, True)
            for name in ("backward", "decode_step"):
                mosaic_tpu_bundles.compile_call(made[name])

    def test_public_function_trains_on_tpu(self) -> None:
        """`lightning_attention` and its gradient choose these kernels and nothing else on a TPU."""
        mesh = mosaic_tpu_bundles.chip_mesh("v5p")
        place = jax.NamedSharding(mesh, jax.P())
        x = jax.ShapeDtypeStruct((1, 1024, 8, WIDTH), jnp.bfloat16, sharding=place)
        slopes = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=place)

        def loss(q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array) -> jax.Array:
            return lightning_attention(q, k, v, slopes).astype(jnp.float32).sum()

        with jax.set_mesh(mesh), dispatch.target("tpu"):
            text = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(x, x, x, slopes).lower().compile().as_text()
        for kernel in ("lightning_o", "lightning_dk_dv"):
            assert kernel in text
        assert " while(" not in text, "the chunked form ran"

    @pytest.mark.full
    def test_a_million_tokens_compile(self) -> None:
        """T = 1,048,576 in one call, packed: chunk modes fit the scalar memory."""
        mesh = mosaic_tpu_bundles.chip_mesh("v5p")
        with jax.set_mesh(mesh):
            made = mosaic_tpu_bundles.calls(mesh, 1, 1 << 20, 16, jnp.bfloat16, True)
            for name in ("forward", "backward"):
                mosaic_tpu_bundles.compile_call(made[name])


def test_bundles_of_a_steady_step() -> None:
    """What a branch can skip inside the loop does not count; the branch around the whole body does."""
    dump = """
   0x1   :  { outside }
   0x2 LB: > { %1 = sphi }
   0x4   : > { %2 = sbr.rel (%p1) target = $region9 }
   0x5   : > { %3 = sbr.rel (%p2) target = $region7 }
   0x9   : > { first chunk only }
   0xb PF: > { every chunk }
  0x20   : > { every chunk }
  0x24 PF: > { end of the body }
  0x2a   : > { %4 = sbr.rel (!%p4) target = $region3 }
  0x2b   :  { outside }
"""
    assert mosaic_tpu_bundles.steady_bundles(dump) == (0x2A - 0x02) - (0x0B - 0x05)
