"""Weights in 8 bits: int8 values with one fp32 scale for each output channel.

They take the place of an array in the dict of parameters; `DotPolicy` widens them where they meet activations, so that
no layer knows.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from mmx_jax.config import ModelConfig
from mmx_jax.model.spec import ParamSpec, parameter_spec

QUANTIZED_COMPONENTS = ("lightning", "softmax", "experts", "ffn")
"""The published exclusions (recipe §9.3) are the embedding, the head and the router; norms are no matmul."""
LEVELS = 127


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=())
@dataclass(frozen=True)
class QuantizedWeight:
    """`values * scale` stands for the weight. A pytree, so leaves may also be shapes or shardings."""

    values: Any
    """int8, shape of the weight."""
    scale: Any
    """fp32, of size 1 along the contracted dimensions."""

    def __getitem__(self, key: Any) -> "QuantizedWeight":
        """What indexing does to the weight; only whole stacked entries (and ...) can be taken."""
        return QuantizedWeight(self.values[key], self.scale[key])

    def widened(self, dtype: str) -> Float[Array, "..."]:
        """The weight in `dtype`, rounded once from fp32."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def is_quantizable(spec: ParamSpec) -> bool:
    """Whether int8 conversion touches this parameter."""
    return spec.component in QUANTIZED_COMPONENTS and spec.group == "decay" and spec.names is not None


def scale_shape(spec: ParamSpec) -> tuple[int, ...]:
    """Shape of the scales of a parameter: the contracted dimensions, the stored tensor's second one, become 1."""
    assert spec.names is not None
    stack = len(spec.shape) - sum(map(len, spec.names.dims))
    contracted = {stack + d for group in spec.names.dims[1:] for d in group}
    return tuple(1 if d in contracted else size for d, size in enumerate(spec.shape))


def quantize_rows(rows: Float[np.ndarray, "out in"]) -> tuple[Int8[np.ndarray, "out in"], Float[np.ndarray, "out 1"]]:
    """int8 values and fp32 scales of a stored matrix, symmetric, one scale a row.

    A row whose scale would not be a normal number is one of zeros with scale 0: a subnormal scale is too coarse to keep
    its values within `LEVELS`, and accelerators read it as 0.
    """
    rows = np.asarray(rows, np.float32)
    scale = np.abs(rows).max(axis=1, keepdims=True) / LEVELS
    normal = scale >= np.finfo(np.float32).tiny
    return np.rint(rows / np.where(normal, scale, np.inf)).astype(np.int8), np.where(normal, scale, 0)


def abstract_quantized_params(config: ModelConfig, dtypes: dict[str, Any]) -> dict[str, Any]:
    """Shapes of the parameters of an int8 checkpoint, as `CheckpointStore.restore` takes them.

    Args:
      config: the model.
      dtypes: dtype by path of the parameters that stay floats.
    """
    out: dict[str, Any] = {}
    for path, spec in parameter_spec(config).items():
        if is_quantizable(spec):
            values = jax.ShapeDtypeStruct(spec.shape, jnp.int8)
            out[path] = QuantizedWeight(values, jax.ShapeDtypeStruct(scale_shape(spec), jnp.float32))
        else:
            out[path] = jax.ShapeDtypeStruct(spec.shape, dtypes[path])
    return out
