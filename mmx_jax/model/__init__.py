"""The model: parameters, layers, cache."""

from mmx_jax.model.cache import Cache
from mmx_jax.model.init import init_params
from mmx_jax.model.plan import layer_plan
from mmx_jax.model.spec import ParamSpec, abstract_params, parameter_spec
from mmx_jax.model.text import Aux, TextModel

__all__ = [
    "Aux",
    "Cache",
    "ParamSpec",
    "TextModel",
    "abstract_params",
    "init_params",
    "layer_plan",
    "parameter_spec",
]
