"""One update: gradients averaged over micro-batches, clipped, applied by AdamW, skipped when not finite; one jit."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from mmx_jax.config import CompilerConfig, ModelConfig, StageConfig
from mmx_jax.data import Batch
from mmx_jax.model import TextModel
from mmx_jax.training.loss import Metrics, loss_function
from mmx_jax.training.state import TrainState, shardings_of, trainable_part

USUAL_OPTIONS = CompilerConfig()
TrainStep = Callable[[TrainState, Batch, Int[Array, ""], Float[Array, ""]], tuple[TrainState, Metrics]]


def stage_model(model: ModelConfig, stage: StageConfig) -> ModelConfig:
    """The model as the stage trains it: another RoPE base changes no parameter."""
    return model if stage.rope_base is None else replace(model, rope_base=stage.rope_base)


def make_train_step(
    model: ModelConfig,
    stage: StageConfig,
    optimizer: optax.GradientTransformation,
    factors: Mapping[str, float],
    abstract: TrainState,
    compiler: CompilerConfig = USUAL_OPTIONS,
) -> Any:
    """Compiles (when first called, under `jax.set_mesh`) the update of a stage; the state is donated.

    The update takes the state, a batch [A, B, T], the number of its micro-batches that count, and the learning rate
    (fp32); it returns the state and fp32 metrics: those of the loss averaged over micro-batches (sums by source too),
    "grad_norm" before clipping, "finite", and by layer "load_balance" (highest load of an expert over the mean load)
    "drop_rate" (slots over capacity) and "lost_rate" (slots lost on the way to their experts).

    A stage whose ramp has one point runs all A micro-batches; otherwise the number is a loop bound, so that a ramp
    changes no shape. An update whose loss, gradient or learning rate is not finite leaves the state bit for bit as it
    was.
    """
    model = stage_model(model, stage)
    loss = loss_function(stage)
    constant = len(stage.batch.ramp) == 1

    def step(
        state: TrainState, batch: Batch, num_micro: Int[Array, ""], learning_rate: Float[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        trainable = trainable_part(state.params, factors)

        def micro_loss(trainable: dict[str, Array], micro: Batch) -> tuple[Float[Array, ""], Metrics]:
            params = state.params | trainable
            return loss(TextModel(model, params, remat=stage.remat, transport=stage.transport), micro)

        count = batch.tokens.shape[0] if constant else num_micro
        gradients, metrics = _averaged(jax.value_and_grad(micro_loss, has_aux=True), trainable, batch, count)
        gradients = jax.lax.with_sharding_constraint(gradients, trainable_part(shardings_of(abstract.params), factors))
        with jax.named_scope("update"):
            norm = optax.tree.norm(gradients)
            finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"]) & jnp.isfinite(learning_rate)
            if stage.optimizer.clip_norm is not None:
                scale = jnp.minimum(1.0, stage.optimizer.clip_norm / norm)
                gradients = jax.tree.map(lambda g: g * scale, gradients)
            directions, moments = optimizer.update(gradients, state.optimizer, trainable)
            updated = jax.tree.map(lambda p, d: p - learning_rate * d, trainable, directions)
            new = TrainState(state.params | updated, moments)
            new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        return new, _summary(metrics) | {"grad_norm": norm, "finite": finite}

    mesh = jax.tree.leaves(abstract)[0].sharding.mesh
    shardings = (shardings_of(abstract), NamedSharding(mesh, PartitionSpec()))
    options = compiler.options(mesh.devices.flat[0].platform)
    return jax.jit(step, donate_argnums=0, out_shardings=shardings, compiler_options=options)


def _averaged(
    gradient: Callable[..., tuple[tuple[Array, Metrics], dict[str, Array]]],
    trainable: dict[str, Array],
    batch: Batch,
    count: int | Int[Array, ""],
) -> tuple[dict[str, Array], Metrics]:
    """Means of gradients and metrics over the first `count` micro-batches."""

    def one(index: int | Array) -> tuple[dict[str, Array], Metrics]:
        micro = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), batch)
        (_, metrics), gradients = gradient(trainable, micro)
        return gradients, metrics

    if isinstance(count, int) and count == 1:
        return one(0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0))
    total = jax.lax.fori_loop(0, count, lambda i, total: jax.tree.map(jnp.add, total, one(i)), zeros)
    return jax.tree.map(lambda x: x / count, total)


def _summary(metrics: Metrics) -> Metrics:
    """Metrics with one figure per layer in place of every expert's load."""
    load = metrics.pop("load")
    balance = load.max(axis=1) * load.shape[1] if load.shape[1] else jnp.ones(load.shape[0])
    return metrics | {"load_balance": balance, "drop_rate": metrics.pop("dropped"), "lost_rate": metrics.pop("lost")}
