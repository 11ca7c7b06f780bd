"""config.json in both published schemas, read and written (model.md 2, INV-05).

A key that decides what is computed must be there: the defaults of other implementations' configuration classes are not
the model's and are never assumed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmx_jax.config import LIGHTNING, SOFTMAX, ConfigError, ModelConfig
from mmx_jax.convert.errors import ConfigSchemaError
from mmx_jax.convert.files import read_bounded
from mmx_jax.convert.names import expected_tensors

HUB_TYPES = ("minimax_text_01", "MiniMaxText01")
NATIVE_TYPE = "minimax"
VISION_TYPES = ("minimax_vl_01", "MiniMaxVL01")
FORMATS = ("hub", "transformers")
LIGHTNING_NORM_EPS = 1e-6
"""Fixed in the code of both schemas; no key."""
NATIVE_BLOCK = 256
RELEASED_POSITIONS = 10_240_000
JSON_BYTES = 64 * 2**20
"""More than any configuration has."""
LARGEST_SIZE = 2**31 - 1
LARGEST_FLOAT32 = (2.0 - 2.0**-23) * 2.0**127
SMALLEST_FLOAT32 = 2.0**-126
SHOWN_CHARACTERS = 120
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
"""Of `rope_parameters`; any other would change the angles."""
MOST_TENSORS = 300_000
"""Forty times the released model's; more is a mistake in a configuration, and only to list them would take minutes."""

# Branch of ours, then the key of the hub schema and of the native one, without _alpha / _alpha_factor.
BRANCH_KEYS = (
    ("lightning", "layernorm_linear_attention", "linear_attn"),
    ("softmax", "layernorm_full_attention", "full_attn"),
    ("ffn", "layernorm_mlp", "mlp"),
)
BIAS_KEYS = ("attention_bias", "qkv_bias", "mlp_bias")
"""Of related architectures; no linear map of this model has a bias."""
SIZE_KEYS = (
    ("vocab_size", "vocab_size"),
    ("hidden_size", "hidden_size"),
    ("num_heads", "num_attention_heads"),
    ("num_kv_heads", "num_key_value_heads"),
    ("head_dim", "head_dim"),
    ("ffn_hidden_size", "intermediate_size"),
    ("num_experts", "num_local_experts"),
    ("experts_per_token", "num_experts_per_tok"),
)


class _Reader:
    """Typed access to one JSON object; errors name the file and the key."""

    def __init__(self, data: Mapping[str, Any], where: Path | str):
        self.data = data
        self.where = where

    def fail(self, key: str, reason: str) -> ConfigSchemaError:
        return ConfigSchemaError(self.where, key, reason)

    def need(self, key: str) -> Any:
        if self.data.get(key) is None:
            raise self.fail(key, "is missing; it decides what is computed and no default is assumed")
        return self.data[key]

    def integer(self, key: str) -> int:
        value = self.need(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"is {shown(value)}; it must be an integer")
        if not 0 <= value <= LARGEST_SIZE:
            raise self.fail(key, f"is {shown(value)}; it must lie in 0 .. {LARGEST_SIZE}")
        return value

    def number(self, key: str) -> float:
        return self.as_number(key, self.need(key))

    def as_number(self, key: str, value: Any) -> float:
        # Compared, not tested with isfinite: an integer may be too large for a float.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_FLOAT32:
            raise self.fail(key, f"is {shown(value)}; it must be a number that is finite in fp32")
        return float(value)

    def only(self, key: str, *allowed: Any) -> None:
        """Checks that a key that may be missing holds the one behaviour that is implemented."""
        if key in self.data and self.data[key] not in allowed:
            raise self.fail(key, f"is {shown(self.data[key])}; only {' or '.join(map(repr, allowed))} is supported")


def shown(value: Any) -> str:
    """A value from a file as it appears in a message."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _layers(r: _Reader) -> tuple[str, ...]:
    """Layer kinds from `attn_type_list` (0 lightning, 1 softmax) or `layer_types`, which must agree."""
    readings = []
    for key, names in (
        ("attn_type_list", {0: LIGHTNING, 1: SOFTMAX}),
        ("layer_types", {"linear_attention": LIGHTNING, "full_attention": SOFTMAX}),
    ):
        kinds = r.data.get(key)
        if kinds is None:
            continue
        if not isinstance(kinds, list) or any(type(k) not in (int, str) or k not in names for k in kinds):
            raise r.fail(key, f"must be a list of {' and '.join(map(repr, names))}")
        readings.append(tuple(names[kind] for kind in kinds))
    if not readings:
        raise r.fail("attn_type_list", "and layer_types are missing; one must list the kind of every layer")
    if len(set(readings)) > 1:
        raise r.fail("attn_type_list", "and layer_types name different layers")
    if len(readings[0]) != (count := r.integer("num_hidden_layers")):
        raise r.fail("num_hidden_layers", f"is {count}, but {len(readings[0])} layer kinds are listed")
    return readings[0]


def _rope(r: _Reader, native: bool, head_dim: int) -> tuple[float, int]:
    """RoPE base and rotary_dim; a native config without rotary_dim rotates all of head_dim, as its own code does."""
    parameters = {} if r.data.get("rope_parameters") is None else r.data["rope_parameters"]
    if not isinstance(parameters, Mapping):
        raise r.fail("rope_parameters", "must be an object")
    r.only("rope_scaling", None)
    if unknown := sorted(parameters.keys() - ROPE_KEYS):
        raise r.fail("rope_parameters", f"has {shown(unknown[0])}; known are {', '.join(sorted(ROPE_KEYS))}")
    for key in ("rope_type", "type"):  # the newer and the older name
        if parameters.get(key, "default") != "default":
            raise r.fail("rope_parameters", f"{key} is {shown(parameters[key])}; only 'default' is supported")
    bases = [
        r.as_number("rope_theta", d["rope_theta"]) for d in (r.data, parameters) if d.get("rope_theta") is not None
    ]
    if not bases:
        raise r.fail("rope_theta", "is missing, also from rope_parameters; no default is assumed")
    if len(set(bases)) > 1:
        raise r.fail("rope_theta", f"is {bases[0]:g}, but rope_parameters says {bases[1]:g}")
    dims = [] if r.data.get("rotary_dim") is None else [r.integer("rotary_dim")]
    for holder in (r.data, parameters):
        if holder.get("partial_rotary_factor") is not None:
            factor = r.as_number("partial_rotary_factor", holder["partial_rotary_factor"])
            if not 0 <= factor <= 1:
                raise r.fail("partial_rotary_factor", f"is {factor:g}; it must lie in 0 .. 1")
            dims.append(round(head_dim * factor))
    if not dims and not native:
        raise r.fail("rotary_dim", "is missing; the hub schema must say how many dims of a head are rotated")
    if len(set(dims)) > 1:
        raise r.fail("rotary_dim", f"is {dims[0]}, but partial_rotary_factor gives {dims[1]}")
    return bases[0], dims[0] if dims else head_dim


def parse_config(data: Mapping[str, Any], where: Path | str = "config.json") -> ModelConfig:
    """The model that a config.json describes.

    Args:
      data: the JSON object, in the hub schema, the transformers schema, or MiniMax-VL-01's (its text part is taken).
      where: name for error messages.

    Raises: ConfigSchemaError naming the key: missing, impossible, contradicting another one, or not supported.
    """
    r = _Reader(data, where)
    kind = r.need("model_type")
    r.only("quantization_config", None)
    if kind in VISION_TYPES:
        return parse_config(_text_part(r), f"{where}, text_config")
    native = kind == NATIVE_TYPE
    if not native and kind not in HUB_TYPES:
        raise r.fail("model_type", f"is {shown(kind)}; known are {', '.join((*HUB_TYPES, NATIVE_TYPE, *VISION_TYPES))}")
    r.only("hidden_act", "silu")
    r.only("tie_word_embeddings", False)
    r.only("shared_intermediate_size", 0, [0], None)
    r.only("attention_dropout", 0, None)
    r.only("sliding_window", None)
    for key in BIAS_KEYS:
        r.only(key, False, None)
    if native:
        r.only("postnorm", True)
    elif not isinstance(r.need("postnorm"), bool):
        raise r.fail("postnorm", "must be true or false")
    sizes: dict[str, Any] = {ours: r.integer(key) for ours, key in SIZE_KEYS if ours != "head_dim"}
    if native and sizes["num_heads"] & (sizes["num_heads"] - 1):
        reason = f"is {sizes['num_heads']}; transformers' decay slopes are the model's for powers of two only"
        raise r.fail("num_attention_heads", reason)
    head_dim = r.integer("head_dim")
    base, rotary_dim = _rope(r, native, head_dim)
    scales: dict[str, Any] = {}
    for branch, hub_key, native_key in BRANCH_KEYS:
        for factor in ("alpha", "beta"):
            key = f"{native_key}_{factor}_factor" if native else f"{hub_key}_{factor}"
            scales[f"{branch}_{factor}"] = r.number(key)
    epsilon = r.number("rms_norm_eps")
    if not SMALLEST_FLOAT32 <= epsilon < 1:
        raise r.fail("rms_norm_eps", f"is {epsilon:g}; an epsilon must be positive in fp32 and less than 1")
    ids = end_of_text_ids(data, where)
    try:
        config = ModelConfig(
            **sizes,
            **scales,
            head_dim=head_dim,
            layers=_layers(r),
            rope_base=base,
            rotary_dim=rotary_dim,
            norm="deepnorm" if native or data["postnorm"] else "prenorm",
            norm_eps=epsilon,
            lightning_norm_eps=LIGHTNING_NORM_EPS,
            aux_loss="hub",
            aux_loss_coefficient=r.number("router_aux_loss_coef"),
            end_of_text_id=ids[0] if ids else None,
        )
    except ConfigError as error:
        raise ConfigSchemaError(where, "config", str(error)) from error
    check_model(config, where)
    return config


def _text_part(r: _Reader) -> dict[str, Any]:
    """The configuration of the text model inside that of a vision model, which may name the end of text itself."""
    text = r.need("text_config")
    if not isinstance(text, Mapping):
        raise r.fail("text_config", "must be an object")
    if text.get("model_type", HUB_TYPES[0]) in VISION_TYPES:
        raise r.fail("text_config", "is a vision model again; it must be the text model")
    text = {"model_type": HUB_TYPES[0]} | dict(text)
    outer, inner = r.data.get("eos_token_id"), text.get("eos_token_id")
    if None not in (outer, inner) and _as_list(outer) != _as_list(inner):
        raise r.fail("eos_token_id", f"is {shown(outer)}, but text_config says {shown(inner)}")
    return text | {"eos_token_id": inner if outer is None else outer}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def end_of_text_ids(data: Mapping[str, Any], where: Path | str) -> tuple[int, ...]:
    """The ids under `eos_token_id` of a config.json or a generation_config.json: none, one or several, in order.

    Raises: ConfigSchemaError for what is neither an id nor a list of ids.
    """
    r = _Reader(data, where)
    if data.get("model_type") in VISION_TYPES:
        r = _Reader(_text_part(r), f"{where}, text_config")
    found = r.data.get("eos_token_id")
    ids = [] if found is None else _as_list(found)
    if any(type(token) is not int or not 0 <= token <= LARGEST_SIZE for token in ids):
        raise r.fail("eos_token_id", f"is {shown(found)}; it must be an id or a list of ids")
    return tuple(dict.fromkeys(ids))


def buffer_block(data: Mapping[str, Any], where: Path | str) -> int | None:
    """Tokens of a block in the decay buffers that transformers keeps beside such a model; None where there are none.

    Raises: ConfigSchemaError.
    """
    if data.get("model_type") != NATIVE_TYPE:
        return None
    return NATIVE_BLOCK if data.get("block_size") is None else _Reader(data, where).integer("block_size")


def check_model(config: ModelConfig, where: Path | str) -> None:
    """Checks what must hold before the tensors of a model are listed: their number, and factors that leave them a part.

    Raises: ConfigSchemaError naming the field.
    """
    if (count := expected_tensors(config)) > MOST_TENSORS:
        reason = f"is {config.num_experts:,}; with {config.num_layers:,} layers these would be {count:,} tensors"
        raise ConfigSchemaError(
            where, "num_local_experts", f"{reason}, more than the {MOST_TENSORS:,} that are supported"
        )
    for field in ("norm_eps", "lightning_norm_eps"):
        if not getattr(config, field) < 1:
            raise ConfigSchemaError(where, field, f"is {getattr(config, field):g}; an epsilon must be less than 1")
    for field in (f"{branch}_beta" for branch, _, _ in BRANCH_KEYS):
        if not SMALLEST_FLOAT32 <= getattr(config, field) <= LARGEST_FLOAT32:
            reason = f"is {getattr(config, field):g}; the factor of a branch must be positive and finite in fp32"
            raise ConfigSchemaError(where, field, reason)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of which no key is given twice: another reader may take the other value."""
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return data


def _expressible(config: ModelConfig, native: bool) -> None:
    """Raises ConfigSchemaError for what the published schemas have no key for."""
    where = "the transformers schema" if native else "the hub schema"

    def check(holds: bool, field: str, reason: str) -> None:
        if not holds:
            raise ConfigSchemaError(where, f"ModelConfig.{field} = {getattr(config, field)!r}", reason)

    check(config.num_experts > 0, "num_experts", "a dense FFN has no place in it")
    check(config.gate_rank is None, "gate_rank", "a low-rank gate has no place in it")
    check(config.lightning_norm_eps == LIGHTNING_NORM_EPS, "lightning_norm_eps", "its code has 1e-6 fixed")
    if native:
        check(config.norm == "deepnorm", "norm", "its code always takes the normed input as residual")
        check(config.num_heads & (config.num_heads - 1) == 0, "num_heads", "its slopes are for powers of two only")


def config_json(config: ModelConfig, form: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """The config.json of a model.

    Args:
      config: the model.
      form: "hub" (MiniMaxText01ForCausalLM, needs MiniMax's remote code) or "transformers" (MiniMaxForCausalLM).
      dtype: dtype of the weights beside it.

    Raises: ConfigSchemaError for a model that the schema cannot express.
    """
    native = form == "transformers"
    _expressible(config, native)
    data: dict[str, Any] = {key: getattr(config, ours) for ours, key in SIZE_KEYS}
    for branch, hub_key, native_key in BRANCH_KEYS:
        for factor, value in (("alpha", config.alpha(branch)), ("beta", getattr(config, f"{branch}_beta"))):
            data[f"{native_key}_{factor}_factor" if native else f"{hub_key}_{factor}"] = value
    data |= {
        "num_hidden_layers": config.num_layers,
        "rms_norm_eps": config.norm_eps,
        "rotary_dim": config.rotary_dim,
        "max_position_embeddings": RELEASED_POSITIONS,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "router_aux_loss_coef": config.aux_loss_coefficient if config.aux_loss == "hub" else 0.0,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "postnorm": config.norm == "deepnorm",
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": config.end_of_text_id,
    }
    if native:
        kinds = {LIGHTNING: "linear_attention", SOFTMAX: "full_attention"}
        data |= {
            "architectures": ["MiniMaxForCausalLM"],
            "model_type": NATIVE_TYPE,
            "layer_types": [kinds[kind] for kind in config.layers],
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
            "block_size": NATIVE_BLOCK,
            "dtype": dtype,
        }
    else:
        data |= {
            "architectures": ["MiniMaxText01ForCausalLM"],
            "model_type": HUB_TYPES[0],
            "auto_map": {
                "AutoConfig": "configuration_minimax_text_01.MiniMaxText01Config",
                "AutoModelForCausalLM": "modeling_minimax_text_01.MiniMaxText01ForCausalLM",
            },
            "attn_type_list": [int(kind == SOFTMAX) for kind in config.layers],
            "rope_theta": config.rope_base,
            "torch_dtype": dtype,
        }
    return dict(sorted(data.items()))


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """A JSON object. Raises: ConfigSchemaError naming the file it came from."""
    try:
        data = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ConfigSchemaError(path, "file", f"cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise ConfigSchemaError(path, "file", "must hold one JSON object")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises: ConfigSchemaError when it is missing, no regular file or no object."""
    try:
        text = read_bounded(path, JSON_BYTES)
    except OSError as error:
        raise ConfigSchemaError(path, "file", f"cannot be read ({error})") from error
    return parse_json(text, path)
