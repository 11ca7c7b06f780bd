"""One update: accumulation, ramp, clipping, bad numbers, and the same update on any mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmx_jax.config import BatchConfig, OptimizerConfig, RunConfig, StageConfig, TrainableGroup
from mmx_jax.data import Batch, TrainingRows
from mmx_jax.model import TextModel
from mmx_jax.training.batches import BatchFeed
from mmx_jax.training.loss import loss_function
from mmx_jax.training.stages import StageSetup
from mmx_jax.training.state import TrainState, abstract_batch, shardings_of
from mmx_jax.training.step import make_train_step
from parallel.mesh import make_mesh
from parallel.sharding import ShardingError

ROWS = 8
ONE_DEVICE = {"data": 1}


def _stage(tiny: RunConfig, **changes: object) -> StageConfig:
    batch = BatchConfig(micro_batch=ROWS, ramp=((0, ROWS),))
    return replace(tiny.stages[0], **{"batch": batch} | changes)


def _mesh(sizes: dict[str, int]) -> jax.sharding.Mesh:
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


_STARTS: dict[tuple, dict] = {}


class Trainer:
    """A stage's step on a mesh, from its random start."""

    def __init__(self, tiny: RunConfig, stage: StageConfig, sizes: dict[str, int] = ONE_DEVICE):
        self.mesh, self.stage = _mesh(sizes), stage
        self.setup = StageSetup(replace(tiny, stages=(stage,)), stage, self.mesh)
        self.step = make_train_step(tiny.model, stage, self.setup.optimizer, self.setup.factors, self.setup.abstract)
        micro = max(count for _, count in stage.batch.ramp) // stage.batch.micro_batch
        self.shape = abstract_batch(micro, stage.batch.micro_batch, stage.sequence_length, self.mesh)
        self.rows = TrainingRows(stage.data, stage.sequence_length)

    def start(self) -> TrainState:
        """The random start, computed once for all trainers of a model."""
        shapes = tuple((path, leaf.shape) for path, leaf in self.setup.abstract.params.items())
        if shapes not in _STARTS:
            _STARTS[shapes] = _host(self.setup.random_state().params)
        params = jax.device_put(_STARTS[shapes], shardings_of(self.setup.abstract.params))
        return TrainState(params, self.setup.fresh_optimizer(params))

    def batch(self, micro_batches: int, start_row: int = 0) -> Batch:
        feed = BatchFeed(self.rows, self.shape, start_row)
        try:
            return feed.next(micro_batches)
        finally:
            feed.close()

    def update(self, state: TrainState, batch: Batch, micro_batches: int = 1, rate: float = 1e-2):
        with jax.set_mesh(self.mesh):
            return self.step(state, batch, np.int32(micro_batches), np.float32(rate))


def _host(tree: object) -> object:
    return jax.tree.map(np.array, tree)


def _assert_close(one: object, other: object, tolerance: float) -> None:
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


ACCUMULATING = {"batch": BatchConfig(micro_batch=4, ramp=((0, 12),)), "optimizer": OptimizerConfig(clip_norm=0.05)}


@pytest.fixture(scope="module")
def single(tiny: RunConfig) -> Trainer:
    """One micro-batch on one device."""
    return Trainer(tiny, _stage(tiny))


@pytest.fixture(scope="module")
def accumulating(tiny: RunConfig) -> Trainer:
    """Three micro-batches, clipped."""
    return Trainer(tiny, _stage(tiny, **ACCUMULATING))


def test_an_update_is_the_mean_of_micro_batch_gradients_clipped(tiny: RunConfig, accumulating: Trainer) -> None:
    """Against gradients of each micro-batch by themselves, clipped by optax and applied by the optimizer."""
    state, batch = accumulating.start(), accumulating.batch(3)
    loss = loss_function(accumulating.stage)

    def total(params: dict, micro: Batch) -> tuple:
        return loss(TextModel(tiny.model, params), micro)

    gradient = jax.jit(jax.value_and_grad(total, has_aux=True))
    parts = [gradient(state.params, jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(3)]
    mean = jax.tree.map(lambda *g: sum(g) / 3, *[gradients for _, gradients in parts])
    losses = [float(metrics["loss"]) for (_, metrics), _ in parts]
    chain = optax.chain(optax.clip_by_global_norm(0.05), accumulating.setup.optimizer)
    directions, (_, moments) = jax.jit(chain.update)(mean, (optax.EmptyState(), state.optimizer), state.params)
    expected = _host(TrainState(jax.tree.map(lambda p, d: p - 1e-2 * d, state.params, directions), moments))
    new, metrics = accumulating.update(state, batch)
    _assert_close(new, expected, 2e-5)
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(mean)), rel=1e-4)
    assert float(metrics["grad_norm"]) > 0.05, "the test must clip"


def test_a_ramp_changes_no_shape(tiny: RunConfig, accumulating: Trainer) -> None:
    """One compiled step serves every point of the ramp; places for micro-batches that it does not use count nothing."""
    ramp = {"batch": BatchConfig(micro_batch=4, ramp=((0, 4), (1000, 12)))}
    trainer = Trainer(tiny, _stage(tiny, **(ACCUMULATING | ramp)))
    expected, expected_metrics = accumulating.update(accumulating.start(), accumulating.batch(3))
    found, metrics = trainer.update(trainer.start(), trainer.batch(3), 3)
    _assert_close(found, expected, 1e-6)
    _assert_close(metrics, expected_metrics, 1e-5)
    first = trainer.batch(1)
    assert not np.asarray(first.tokens[1:]).any()
    thrice = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), first)
    expected, _ = accumulating.update(accumulating.start(), thrice)
    found, _ = trainer.update(trainer.start(), first, 1)
    _assert_close(found, expected, 1e-6)
    assert trainer.step._cache_size() == 1


@pytest.mark.parametrize("poison", ["parameter", "mask", "rate"])
def test_an_update_that_is_not_finite_changes_nothing(single: Trainer, poison: str) -> None:
    """NaN in a parameter or in the batch, or no finite rate: state bit for bit as before; the next good one goes on."""
    state, batch = single.start(), single.batch(1)
    state, _ = single.update(state, batch)
    if poison == "parameter":
        name = "layers/0/0/ffn/gate"
        state = TrainState(state.params | {name: state.params[name].at[0, 0, 1, 2, 3].set(jnp.nan)}, state.optimizer)
        bad = batch
    elif poison == "rate":
        bad = batch
    else:
        bad = replace(batch, loss_mask=batch.loss_mask.at[0, 0, 0].set(jnp.inf))
    before = _host(state)
    after, metrics = single.update(state, bad, rate=np.inf if poison == "rate" else 1e-2)
    assert not bool(metrics["finite"])
    for one, other in zip(jax.tree.leaves(_host(after)), jax.tree.leaves(before), strict=True):
        assert one.tobytes() == other.tobytes()
    if poison == "mask":
        again, metrics = single.update(after, batch)
        assert bool(metrics["finite"])
        assert not np.array_equal(again.params["head"], before.params["head"])


MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 2, "expert": 2}, pytest.param({"data": 8}, marks=pytest.mark.full)]


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(f"{axis}{n}" for axis, n in sizes.items()))
def test_the_same_update_on_any_mesh(tiny: RunConfig, single: Trainer, sizes: dict[str, int]) -> None:
    """Parameters, moments and metrics agree with one device; parameters and moments are really split."""
    many = Trainer(tiny, _stage(tiny), sizes)
    expected, expected_metrics = single.update(single.start(), single.batch(1))
    found, metrics = many.update(many.start(), many.batch(1))
    _assert_close(found, expected, 2e-4)
    _assert_close(metrics, expected_metrics, 1e-4)
    ways = sizes.get("fsdp", 1) * sizes.get("expert", 1)
    for leaf in (found.params["head"], *[m for k, m in _moments(found) if k == "head"]):
        assert leaf.addressable_shards[0].data.size * ways == leaf.size


def _moments(state: TrainState) -> list[tuple[str, jax.Array]]:
    leaves = jax.tree.leaves_with_path(state.optimizer)
    return [(getattr(path[-1], "key", ""), leaf) for path, leaf in leaves]


def test_the_state_is_donated(single: Trainer) -> None:
    state = single.start()
    single.update(state, single.batch(1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state) if leaf.ndim)


def test_frozen_parameters_stay_and_cost_no_gradient(tiny: RunConfig) -> None:
    groups = (TrainableGroup(pattern="head"), TrainableGroup(pattern="final_norm"))
    trainer = Trainer(tiny, _stage(tiny, trainable=groups))
    state = trainer.start()
    before = _host(state.params)
    new, _ = trainer.update(state, trainer.batch(1))
    changed = {path for path, value in new.params.items() if not np.array_equal(value, before[path])}
    assert changed == {"head", "final_norm"}


def test_the_rope_base_of_a_stage(tiny: RunConfig, single: Trainer) -> None:
    """Another base changes what the update computes and no parameter's shape (recipe §16.10)."""
    other = Trainer(tiny, _stage(tiny, rope_base=10.0))
    losses = [float(trainer.update(trainer.start(), trainer.batch(1))[1]["loss"]) for trainer in (single, other)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_sizes_that_do_not_divide_are_named(tiny: RunConfig) -> None:
    with pytest.raises(ShardingError, match=r"batch .* \(batch\) has size 4, which does not divide by the 8 shards"):
        abstract_batch(1, 4, 32, _mesh({"data": 8}))
    narrow = replace(tiny, model=replace(tiny.model, hidden_size=12))
    setup = StageSetup(narrow, narrow.stages[0], _mesh({"fsdp": 8}))
    with pytest.raises(ShardingError, match=r"embedding: dimension 1 \(embed\) has size 12"):
        _ = setup.abstract


def test_batches_do_not_depend_on_the_mesh(tiny: RunConfig) -> None:
    """The global batch is the next rows of the stream in order, wherever they lie."""
    stage = _stage(tiny, batch=BatchConfig(micro_batch=8, ramp=((0, 16),)))
    one, many = Trainer(tiny, stage), Trainer(tiny, stage, {"data": 4, "sequence": 2})
    first, second = one.batch(2, start_row=5), many.batch(2, start_row=5)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    rows = [one.rows.row(5 + i)["tokens"] for i in range(16)]
    np.testing.assert_array_equal(np.asarray(first.tokens).reshape(16, -1), np.stack(rows))
