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
from mmx_jax.training.state import TrainState, abstract_batch
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


class Trainer:
    """A stage's step on a mesh, from its random start."""

    def __init__(self, tiny: RunConfig, stage: StageConfig, sizes: dict[str, int] = ONE_DEVICE):
        self.mesh, self.stage = _mesh(sizes), stage
        self.setup = StageSetup(replace(tiny, stages=(stage,)), stage, self.mesh)
        self.step = make_train_step(tiny.model, stage, self.setup.optimizer, self.setup.factors, self.setup.abstract)
        micro = max(count for _, count in stage.batch.ramp) // stage.batch.micro_batch
        self.shape = abstract_batch(micro, stage.batch.micro_batch, stage.sequence_length, self.mesh)
        self.rows = TrainingRows(stage.data, stage.sequence_length)

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


def test_an_update_is_the_mean_of_micro_batch_gradients_clipped(tiny: RunConfig) -> None:
    """Against gradients of each micro-batch by themselves, clipped by optax and applied by the optimizer."""
    stage = _stage(tiny, batch=BatchConfig(micro_batch=4, ramp=((0, 12),)), optimizer=OptimizerConfig(clip_norm=0.05))
    trainer = Trainer(tiny, stage)
    state, batch = trainer.setup.random_state(), trainer.batch(3)
    loss = loss_function(stage)

    def total(params: dict, micro: Batch) -> tuple:
        return loss(TextModel(tiny.model, params), micro)

    gradient = jax.jit(jax.value_and_grad(total, has_aux=True))
    parts = [gradient(state.params, jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(3)]
    mean = jax.tree.map(lambda *g: sum(g) / 3, *[gradients for _, gradients in parts])
    losses = [float(metrics["loss"]) for (_, metrics), _ in parts]
    chain = optax.chain(optax.clip_by_global_norm(0.05), trainer.setup.optimizer)
    directions, (_, moments) = jax.jit(chain.update)(mean, (optax.EmptyState(), state.optimizer), state.params)
    expected = _host(TrainState(jax.tree.map(lambda p, d: p - 1e-2 * d, state.params, directions), moments))
    new, metrics = trainer.update(state, batch)
    _assert_close(new, expected, 2e-5)
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(mean)), rel=1e-4)
    assert float(metrics["grad_norm"]) > 0.05, "the test must clip"


def test_a_ramp_changes_no_shape(tiny: RunConfig) -> None:
    """One compiled step serves every point of the ramp, and unused micro-batches count for nothing."""
    ramp = _stage(tiny, batch=BatchConfig(micro_batch=4, ramp=((0, 4), (1000, 8), (2000, 16))))
    trainer = Trainer(tiny, ramp)
    for count in (1, 2, 4):
        fixed = Trainer(tiny, _stage(tiny, batch=BatchConfig(micro_batch=4, ramp=((0, 4 * count),))))
        expected, metrics = fixed.update(fixed.setup.random_state(), fixed.batch(count))
        found, ramp_metrics = trainer.update(trainer.setup.random_state(), trainer.batch(count), count)
        _assert_close(found, expected, 1e-6)
        _assert_close(ramp_metrics, metrics, 1e-5)
    assert trainer.step._cache_size() == 1


@pytest.mark.parametrize("poison", ["parameter", "mask"])
def test_an_update_that_is_not_finite_changes_nothing(tiny: RunConfig, poison: str) -> None:
    """NaN in a parameter or in the batch: state bit for bit as before, reported; the next good update goes on."""
    trainer = Trainer(tiny, _stage(tiny))
    state, batch = trainer.setup.random_state(), trainer.batch(1)
    state, _ = trainer.update(state, batch)
    if poison == "parameter":
        name = "layers/0/0/ffn/gate"
        state = TrainState(state.params | {name: state.params[name].at[0, 0, 1, 2, 3].set(jnp.nan)}, state.optimizer)
        bad = batch
    else:
        bad = replace(batch, loss_mask=batch.loss_mask.at[0, 0, 0].set(jnp.inf))
    before = _host(state)
    after, metrics = trainer.update(state, bad)
    assert not bool(metrics["finite"])
    for one, other in zip(jax.tree.leaves(_host(after)), jax.tree.leaves(before), strict=True):
        assert one.tobytes() == other.tobytes()
    if poison == "mask":
        again, metrics = trainer.update(after, batch)
        assert bool(metrics["finite"])
        assert not np.array_equal(again.params["head"], before.params["head"])


MESHES = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "expert": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(f"{axis}{n}" for axis, n in sizes.items()))
def test_the_same_update_on_any_mesh(tiny: RunConfig, sizes: dict[str, int]) -> None:
    """Parameters, moments and metrics agree with one device; parameters and moments are really split."""
    single, many = Trainer(tiny, _stage(tiny)), Trainer(tiny, _stage(tiny), sizes)
    expected, expected_metrics = single.update(single.setup.random_state(), single.batch(1))
    start = jax.device_put(single.setup.random_state(), jax.tree.map(lambda leaf: leaf.sharding, many.setup.abstract))
    found, metrics = many.update(start, many.batch(1))
    _assert_close(found, expected, 2e-4)
    _assert_close(metrics, expected_metrics, 1e-4)
    ways = sizes.get("fsdp", 1) * sizes.get("expert", 1)
    for leaf in (found.params["head"], *[m for k, m in _moments(found) if k == "head"]):
        assert leaf.addressable_shards[0].data.size * ways == leaf.size


def _moments(state: TrainState) -> list[tuple[str, jax.Array]]:
    leaves = jax.tree.leaves_with_path(state.optimizer)
    return [(getattr(path[-1], "key", ""), leaf) for path, leaf in leaves]


def test_the_state_is_donated(tiny: RunConfig) -> None:
    trainer = Trainer(tiny, _stage(tiny))
    state = trainer.setup.random_state()
    trainer.update(state, trainer.batch(1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state) if leaf.ndim)


def test_frozen_parameters_stay_and_cost_no_gradient(tiny: RunConfig) -> None:
    groups = (TrainableGroup(pattern="head"), TrainableGroup(pattern="final_norm"))
    trainer = Trainer(tiny, _stage(tiny, trainable=groups))
    state = trainer.setup.random_state()
    before = _host(state.params)
    new, _ = trainer.update(state, trainer.batch(1))
    changed = {path for path, value in new.params.items() if not np.array_equal(value, before[path])}
    assert changed == {"head", "final_norm"}


def test_the_rope_base_of_a_stage(tiny: RunConfig) -> None:
    """Another base changes what the update computes and no parameter's shape (recipe §16.10)."""
    losses = []
    for base in (None, tiny.model.rope_base, 10.0):
        trainer = Trainer(tiny, _stage(tiny, rope_base=base))
        losses.append(float(trainer.update(trainer.setup.random_state(), trainer.batch(1))[1]["loss"]))
    assert losses[0] == losses[1] != losses[2]


def test_sizes_that_do_not_divide_are_named(tiny: RunConfig) -> None:
    with pytest.raises(ShardingError, match=r"batch .* \(batch\) has size 4, which does not divide by the 8 shards"):
        abstract_batch(1, 4, 32, _mesh({"data": 8}))
    narrow = replace(tiny, model=replace(tiny.model, hidden_size=12))
    setup = StageSetup(narrow, narrow.stages[0], _mesh({"fsdp": 8}))
    with pytest.raises(ShardingError, match=r"embedding: dimension 1 \(embed\) has size 12"):
        _ = setup.abstract


def test_batches_do_not_depend_on_the_mesh(tiny: RunConfig) -> None:
    """The global batch is the next rows of the stream in order, wherever they lie (INV of the data path)."""
    stage = _stage(tiny, batch=BatchConfig(micro_batch=8, ramp=((0, 16),)))
    one, many = Trainer(tiny, stage), Trainer(tiny, stage, {"data": 4, "sequence": 2})
    first, second = one.batch(2, start_row=5), many.batch(2, start_row=5)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    rows = [one.rows.row(5 + i)["tokens"] for i in range(16)]
    np.testing.assert_array_equal(np.asarray(first.tokens).reshape(16, -1), np.stack(rows))
