"""Random initialisation: Xavier with the DeepNorm gain (report §4.2, recipe §14)."""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mmx_jax.config import ModelConfig
from mmx_jax.model.spec import STACK_AXES, ParamSpec, parameter_spec


def init_param(spec: ParamSpec, key: PRNGKeyArray) -> Float[Array, "..."]:
    """Values of one parameter; its random stream depends on the key and on its path only."""
    if spec.init.kind == "ones":
        return jnp.ones(spec.shape, spec.dtype)
    key = jax.random.fold_in(key, zlib.crc32(spec.path.encode()))
    std = (2.0 / (spec.init.fan_in + spec.init.fan_out)) ** 0.5
    gain = jnp.asarray(spec.init.gain, spec.dtype)
    if spec.init.gain_dim is not None:
        trailing = len(spec.shape) - (STACK_AXES + spec.init.gain_dim) - 1
        gain = gain.reshape((-1,) + (1,) * trailing)
    return jax.random.normal(key, spec.shape, spec.dtype) * (std * gain)


def init_params(config: ModelConfig, key: PRNGKeyArray) -> dict[str, Array]:
    """All parameters by path, fp32. Under `jax.jit` with output shardings no device holds more than its shards."""
    return {path: init_param(spec, key) for path, spec in parameter_spec(config).items()}
