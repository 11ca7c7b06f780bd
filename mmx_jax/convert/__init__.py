"""Conversion between published safetensors and this project's checkpoints, in both directions (docs/conversion.md).

One map, made from the checkpoint-name column of the parameter spec (`names.tensor_map`), serves import, export,
initialisation from a folder, comparison and the check of keys; there is no second list of names or shapes.
"""

from mmx_jax.convert.check import Check, check_conversion
from mmx_jax.convert.compare import TensorDifference, compare_weights
from mmx_jax.convert.errors import ConfigSchemaError, ConvertError, WeightsFileError, WeightsMismatchError
from mmx_jax.convert.exporting import export_weights
from mmx_jax.convert.hf_config import config_json, parse_config
from mmx_jax.convert.importing import import_weights
from mmx_jax.convert.loading import load_safetensors
from mmx_jax.convert.logits import compute_logits, load_params

__all__ = [
    "Check",
    "ConfigSchemaError",
    "ConvertError",
    "TensorDifference",
    "WeightsFileError",
    "WeightsMismatchError",
    "check_conversion",
    "compare_weights",
    "compute_logits",
    "config_json",
    "export_weights",
    "import_weights",
    "load_params",
    "load_safetensors",
    "parse_config",
]
