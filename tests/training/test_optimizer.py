"""AdamW and its groups against the formula written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx_jax.config import ConfigError, OptimizerConfig, RunConfig, TrainableGroup
from mmx_jax.model import init_params, parameter_spec
from mmx_jax.model.trainable import learning_rate_factors, near_patterns
from mmx_jax.training.optimizer import make_optimizer
from mmx_jax.training.state import trainable_part


def test_two_steps_of_adamw_by_the_formula(tiny: RunConfig) -> None:
    """Moments, bias correction and decoupled weight decay (on matrices, not on norms); factors scale the whole step."""
    specs = parameter_spec(tiny.model)
    groups = (TrainableGroup(pattern="head", learning_rate_factor=0.5), TrainableGroup())
    factors = learning_rate_factors(specs, groups)
    config = OptimizerConfig()
    optimizer = make_optimizer(config, specs, factors)
    params = init_params(tiny.model, jax.random.key(0))
    state = optimizer.init(params)
    random = np.random.default_rng(0)
    first, second = ({path: random.normal(size=p.shape).astype(np.float32) for path, p in params.items()} for _ in "12")
    _, state = optimizer.update(first, state, params)
    directions, _ = optimizer.update(second, state, params)
    for path, spec in specs.items():
        m = 0.9 * 0.1 * first[path] + 0.1 * second[path]
        v = 0.95 * 0.05 * first[path] ** 2 + 0.05 * second[path] ** 2
        adam = (m / (1 - 0.9**2)) / (np.sqrt(v / (1 - 0.95**2)) + 1e-8)
        decay = 0.0 if "norm" in path else 0.1
        factor = 0.5 if path == "head" else 1.0
        np.testing.assert_allclose(directions[path], factor * (adam + decay * params[path]), rtol=1e-4, atol=1e-6)
        assert (spec.group == "no_decay") == ("norm" in path)


def test_frozen_parameters_have_no_moments(tiny: RunConfig) -> None:
    """The first matching pattern decides; what no pattern names is frozen, and the optimizer never holds it."""
    specs = parameter_spec(tiny.model)
    groups = (TrainableGroup(pattern="*/ffn/*", learning_rate_factor=0.0), TrainableGroup(pattern="layers/*"))
    factors = learning_rate_factors(specs, groups)
    trained = {path for path, factor in factors.items() if factor}
    assert trained == {path for path in specs if path.startswith("layers/") and "/ffn/" not in path}
    optimizer = make_optimizer(OptimizerConfig(), specs, factors)
    state = jax.eval_shape(optimizer.init, trainable_part(init_params(tiny.model, jax.random.key(0)), factors))
    held = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert held == 2 * sum(specs[path].size for path in trained)


def test_moments_in_bf16_take_half_the_memory_and_train_alike(tiny: RunConfig) -> None:
    specs = parameter_spec(tiny.model)
    factors = learning_rate_factors(specs, (TrainableGroup(),))
    params = init_params(tiny.model, jax.random.key(0))
    gradients = jax.tree.map(lambda p: jnp.sin(100 * p), params)
    results = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(OptimizerConfig(moment_dtype=dtype), specs, factors)
        state = optimizer.init(params)
        for _ in range(3):
            results[dtype], state = optimizer.update(gradients, state, params)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim} == {dtype}
    for path in params:
        assert results["bfloat16"][path].dtype == jnp.float32
        np.testing.assert_allclose(results["bfloat16"][path], results["float32"][path], atol=0.03)


def test_groups_that_cannot_work_are_refused(tiny: RunConfig) -> None:
    specs = parameter_spec(tiny.model)
    with pytest.raises(ConfigError, match="pattern 'hed' matches no parameter"):
        learning_rate_factors(specs, (TrainableGroup(pattern="hed"), TrainableGroup()))
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        learning_rate_factors(specs, (TrainableGroup(learning_rate_factor=0.0),))


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("hed", "head"), ("layers/*/atention/*", "layers/*/*/attention/qkv"), ("*qvk*", "layers/*/*/attention/qkv")],
)
def test_patterns_near_one_that_matches_nothing(tiny: RunConfig, pattern: str, near: str) -> None:
    """The nearest is named first, and all that are named would work."""
    specs = parameter_spec(tiny.model)
    found = near_patterns(pattern, specs)
    assert found[0] == near
    for name in found:
        assert any(learning_rate_factors(specs, (TrainableGroup(pattern=name),)).values())
