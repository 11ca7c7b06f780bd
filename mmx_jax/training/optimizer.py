"""AdamW over groups of parameters, read from the parameter spec and the stage's trainable groups (recipe §4.5, §14)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmx_jax.config import OptimizerConfig
from mmx_jax.model import ParamSpec


def make_optimizer(
    config: OptimizerConfig, specs: Mapping[str, ParamSpec], factors: Mapping[str, float]
) -> optax.GradientTransformation:
    """AdamW without the learning rate: updates are the directions that a step subtracts `learning_rate` times.

    Works on the dict of the parameters whose factor is not 0; weight decay holds for those in the spec's group "decay".
    Gradients are clipped by the caller, which knows their norm.
    """
    labels = {path: f"{specs[path].group}_{factor:g}" for path, factor in factors.items() if factor}
    transforms = {}
    for path, label in labels.items():
        parts = [stored_as(jnp.dtype(config.moment_dtype), optax.scale_by_adam(config.b1, config.b2, config.eps))]
        if specs[path].group == "decay":
            parts.append(optax.add_decayed_weights(config.weight_decay))
        if factors[path] != 1:
            parts.append(optax.scale(factors[path]))
        transforms[label] = optax.chain(*parts)
    return optax.partition(transforms, labels)


def stored_as(dtype: Any, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with its floating state kept in `dtype` between updates; it still computes in fp32."""
    if dtype == jnp.float32:
        return inner

    def cast(state: Any, to: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def init(params: Any) -> Any:
        return cast(inner.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
