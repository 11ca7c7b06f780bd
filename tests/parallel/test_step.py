"""Loss and every gradient of a hybrid mixture of experts are the same on every mesh (INV-36 to INV-39 on packed rows).

The oracle is the model on one device, which uses none of the code in parallel/ but the row gathers.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from mmx_jax.config import ExpertTransport, ModelConfig
from mmx_jax.data import Batch
from mmx_jax.model import TextModel, init_params, parameter_spec
from mmx_jax.training.loss import next_token_loss
from mmx_jax.training.state import param_sharding
from parallel.mesh import make_mesh
from parallel.sharding import DEFAULT_RULES, constrain

ROWS, LENGTH = 8, 32
# On one worker: what one device gives is computed once for all cases.
pytestmark = pytest.mark.xdist_group("step")

MODEL = ModelConfig(
    vocab_size=96, hidden_size=64, layers=("lightning", "softmax"), num_heads=8, num_kv_heads=2, head_dim=8,
    rotary_dim=4, ffn_hidden_size=32, num_experts=8, capacity_factor=1.0, compute_dtype="float32",
)  # fmt: skip
DROPLESS = replace(MODEL, capacity_factor=None)
QUICK = {"xla_backend_optimization_level": 0}
"""Compiling takes longer than running."""
ONE_ROUND = 8.0
"""A block factor with which every block holds all that can wait: one all-to-all a layer."""
Outcome = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


@pytest.fixture(scope="module", autouse=True)
def _compile_anew() -> Iterator[None]:
    """What the partitioner says of a program is said when it is compiled, not when it is read from a cache."""
    for enabled in (False, True):
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()  # it looks at the setting once
        if not enabled:
            yield


@cache
def _params() -> dict[str, np.ndarray]:
    """Random weights, norms included, with a router that prefers some experts."""
    noise = np.random.default_rng(3)
    params = jax.tree.map(np.array, init_params(MODEL, jax.random.key(0)))
    for path, value in params.items():
        if path.endswith("norm"):
            params[path] = (value * noise.uniform(0.5, 1.5, value.shape)).astype(np.float32)
        if path.endswith("router"):
            params[path] = (3 * value).astype(np.float32)
    return params


@cache
def _batch() -> Batch:
    """Packed rows: documents of several lengths, one that fills a row, padding before, between and after."""
    noise = np.random.default_rng(5)
    cuts = [(32,), (1, 9, 22), (17, 15), (-4, 20, -8), (5, -3, 13, 11), (16, 16), (30, -2), (-32,)]
    segments, positions = np.zeros((2, ROWS, LENGTH), np.int32)
    for row, lengths in enumerate(cuts):
        place = 0
        for number, length in enumerate(lengths, start=1):
            if length > 0:
                segments[row, place : place + length] = number
                positions[row, place : place + length] = np.arange(length)
            place += abs(length)
    tokens, targets = noise.integers(0, MODEL.vocab_size, (2, ROWS, LENGTH), dtype=np.int32)
    tokens[:, ::3] = 7
    mask = (segments != 0) & (noise.random((ROWS, LENGTH)) < 0.8)
    return Batch(tokens=tokens, targets=targets, positions=positions, segment_ids=segments,
                 loss_mask=mask.astype(np.float32), source_id=np.zeros_like(tokens))  # fmt: skip


def _outcome(model: ModelConfig, sizes: dict[str, int], remat: str = "none", **transport: object) -> Outcome:
    """Metrics and gradients on a mesh; every gradient is split as its parameter."""
    count = int(np.prod(list(sizes.values()), dtype=int))
    mesh = make_mesh(sizes, jax.devices()[:count])
    shardings = {path: param_sharding(spec, mesh) for path, spec in parameter_spec(model).items()}
    tokens = DEFAULT_RULES.sharding(mesh, ("batch", "sequence"), (ROWS, LENGTH), "batch")

    def loss(params: dict[str, jax.Array], batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        text = TextModel(model, params, remat=remat, transport=ExpertTransport(**transport))
        total, metrics = next_token_loss(text, batch, vocab_chunk=48, num_sources=1)
        return total, metrics | {"total": total}

    def step(params: dict[str, jax.Array], batch: Batch) -> tuple:
        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return metrics, jax.lax.with_sharding_constraint(gradients, shardings)

    with jax.set_mesh(mesh):
        params = jax.device_put(_params(), shardings)
        batch = jax.device_put(_batch(), jax.tree.map(lambda _: tokens, _batch()))
        return jax.tree.map(np.array, jax.jit(step, compiler_options=QUICK)(params, batch))


@cache
def _one_device(model: ModelConfig) -> Outcome:
    return _outcome(model, {})


def _check(found: Outcome, expected: Outcome) -> None:
    metrics, gradients = found
    for name, value in expected[0].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    for name, value in expected[1].items():
        assert np.abs(value).max() > 0, name
        error = np.abs(gradients[name] - value).max() / np.abs(value).max()
        assert error < 1e-5, f"{name}: {error}"


def _name(sizes: dict[str, int]) -> str:
    return "x".join(f"{axis}{size}" for axis, size in sizes.items())


FAST = (
    {"data": 8}, {"fsdp": 8}, {"expert": 2}, {"expert": 8}, {"tensor": 2}, {"tensor": 8},
    {"fsdp": 2, "expert": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2},
    {"expert": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "expert": 2},
)  # fmt: skip
FULL = (
    {"data": 2}, {"fsdp": 2}, {"data": 2, "expert": 4}, {"data": 4}, {"fsdp": 4}, {"expert": 4}, {"tensor": 4},
    {"data": 2, "fsdp": 4}, {"data": 4, "fsdp": 2},
    {"data": 2, "tensor": 4}, {"data": 4, "tensor": 2}, {"fsdp": 2, "expert": 4}, {"fsdp": 4, "expert": 2},
    {"fsdp": 2, "tensor": 4}, {"expert": 4, "tensor": 2}, {"data": 4, "expert": 2}, {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "expert": 2, "tensor": 2},
)  # fmt: skip
MESHES = [*FAST, *(pytest.param(sizes, marks=pytest.mark.full) for sizes in FULL)]


@pytest.mark.parametrize("sizes", MESHES, ids=_name)
def test_a_mesh_computes_what_one_device_computes(sizes: dict[str, int], capfd: pytest.CaptureFixture[str]) -> None:
    """With capacity: loss, metrics (dropped slots by layer among them) and gradients; nothing is rematerialised."""
    expected = _one_device(MODEL)
    assert expected[0]["dropped"].min() > 0.02, "the test must drop"
    capfd.readouterr()
    _check(_outcome(MODEL, sizes, block_factor=ONE_ROUND), expected)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("model", "sizes", "settings"),
    [
        (DROPLESS, {"data": 2, "expert": 2, "tensor": 2}, {"block_factor": ONE_ROUND, "remat": "experts"}),
        (MODEL, {"fsdp": 2, "expert": 4}, {"block_factor": 0.5, "token_groups": 2, "remat": "experts"}),
        (
            MODEL,
            {"expert": 4, "tensor": 2},
            {"block_factor": ONE_ROUND, "bucket_factor": 2.5, "max_rounds": 1, "token_groups": 2, "remat": "experts"},
        ),
    ],
    ids=("dropless", "several rounds and groups", "buckets"),
)
def test_the_way_rows_travel_changes_nothing(
    model: ModelConfig, sizes: dict[str, int], settings: dict, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = _one_device(model)
    capfd.readouterr()
    found = _outcome(model, sizes, **settings)
    _check(found, expected)
    assert not found[0]["lost"].any()
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def test_the_check_for_rematerialisation_can_fail(capfd: pytest.CaptureFixture[str]) -> None:
    """A look-up in a table whose width is split as the batch: the compiler says so, and this test sees it."""
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    table = jax.ShapeDtypeStruct((96, 64), np.float32, sharding=NamedSharding(mesh, PartitionSpec("tensor", "fsdp")))
    tokens = jax.ShapeDtypeStruct((8, 32), np.int32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))

    def loss(table: jax.Array, tokens: jax.Array) -> jax.Array:
        return (constrain(table[tokens], "batch", None, None) ** 2).sum()

    with jax.set_mesh(mesh):
        jax.jit(jax.grad(loss), out_shardings=table.sharding).lower(table, tokens).compile()
    assert "Involuntary full rematerialization" in capfd.readouterr().err
