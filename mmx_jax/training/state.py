"""The state that training carries on devices, and how it is split over the mesh."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, PRNGKeyArray

from mmx_jax.config import ModelConfig
from mmx_jax.data import Batch
from mmx_jax.model import ParamSpec, abstract_params, init_params, parameter_spec
from parallel.sharding import AnyMesh, Rules


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Parameters by path (fp32) and the optimizer's state; everything else of a run is a Python value (`Progress`)."""

    params: Any
    optimizer: Any


def trainable_part(params: Mapping[str, Any], factors: Mapping[str, float]) -> dict[str, Any]:
    """The parameters that learn; the optimizer sees no others."""
    return {path: value for path, value in params.items() if factors[path]}


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    factors: Mapping[str, float],
    mesh: AnyMesh,
) -> TrainState:
    """Shapes, dtypes and shardings of the state; moments are split as the parameter they belong to.

    Raises:
      ShardingError: when a dimension of a parameter does not divide by its mesh axes; names both.
    """
    specs = parameter_spec(config)
    shardings = {path: param_sharding(spec, mesh) for path, spec in specs.items()}
    params = {path: _placed(leaf, shardings[path]) for path, leaf in abstract_params(config).items()}
    moments = jax.eval_shape(optimizer.init, trainable_part(params, factors))

    def place(key_path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        owner = next((key.key for key in key_path if getattr(key, "key", None) in specs), None)
        replicated = NamedSharding(mesh, PartitionSpec())
        return _placed(leaf, shardings[owner] if owner else replicated)

    return TrainState(params, jax.tree_util.tree_map_with_path(place, moments))


def param_sharding(spec: ParamSpec, mesh: AnyMesh) -> NamedSharding:
    """Sharding of one parameter by its logical axes."""
    return Rules().sharding(mesh, spec.axes, spec.shape, spec.path)


def init_state(
    abstract: TrainState,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    factors: Mapping[str, float],
    key: PRNGKeyArray,
) -> TrainState:
    """Random parameters and a fresh optimizer, each device making only its own shards."""
    shardings = shardings_of(abstract.params)
    # Optimising code that runs once takes XLA's CPU compiler six times as long as just writing it.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    init = jax.jit(lambda key: init_params(config, key), out_shardings=shardings, compiler_options=quick)
    params = init(key)
    return TrainState(params, init_optimizer(abstract, params, optimizer, factors))


def init_optimizer(
    abstract: TrainState,
    params: dict[str, Array],
    optimizer: optax.GradientTransformation,
    factors: Mapping[str, float],
) -> Any:
    """A fresh optimizer state for these parameters."""
    init = jax.jit(optimizer.init, out_shardings=shardings_of(abstract.optimizer))
    return init(trainable_part(params, factors))


@jax.jit
def all_finite(state: TrainState) -> Bool[Array, ""]:
    """Whether every parameter and every moment is finite; the same answer on all processes."""
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all()


def shardings_of(tree: Any) -> Any:
    """Shardings of a tree of arrays or abstract arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def abstract_batch(micro_batches: int, micro_batch: int, sequence_length: int, mesh: AnyMesh) -> Batch:
    """Shapes and shardings of the batches [A, B, T] of a step.

    Raises:
      ShardingError: when the micro-batch or the sequence does not divide by its mesh axes.
    """
    shape = (micro_batches, micro_batch, sequence_length)
    sharding = Rules().sharding(mesh, (None, "batch", "sequence"), shape, "batch [micro-batches, micro_batch, T]")
    ints, floats = (jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in (jnp.int32, jnp.float32))
    return Batch(
        tokens=ints, targets=ints, positions=ints, segment_ids=ints, loss_mask=floats, source_id=ints,
    )  # fmt: skip


def _placed(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
