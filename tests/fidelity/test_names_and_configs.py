"""Names, layouts and both config schemas (INV-03, INV-04, INV-05, INV-12, INV-24, INV-26)."""

import dataclasses
import math

import numpy as np
import pytest

from configs import minimax_text_01
from mmx_jax.config import SOFTMAX, hybrid_layers
from mmx_jax.convert import ConfigSchemaError, ConvertError, check_conversion, config_json, parse_config
from mmx_jax.convert.hf_config import FORMATS, end_of_text_ids, read_json
from mmx_jax.convert.names import decay_buffers, names_sha256, tensor_map, text_names, transpose
from tests.fidelity.common import hub_config, native_config
from tests.oracle.weights import CASES

TEXT_SHA256 = "bf57bd0e64fa6e9bb2412c73dad77effdfd91aa645578e2b5928f0499c579a8c"
VISION_SHA256 = "d0caf1b714cdfc4caa65b56cbec591668d77b0e2a5d6cf3b5af169531311c886"


@pytest.fixture(scope="module")
def released():
    return minimax_text_01.get_config().model


def vision_names():
    """The 394 names that MiniMax-VL-01 has beside its text part, from the table of model.md 11.2."""
    names = ["image_newline"]
    names += [f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    at = "vision_tower.vision_model."
    names += [f"{at}embeddings.{name}" for name in ("class_embedding", "patch_embedding.weight",
                                                    "position_embedding.weight")]  # fmt: skip
    names += [f"{at}pre_layrnorm.{kind}" for kind in ("weight", "bias")]
    for layer in range(24):
        parts = [f"self_attn.{p}_proj" for p in "qkv"] + ["self_attn.out_proj", "layer_norm1", "layer_norm2",
                                                          "mlp.fc1", "mlp.fc2"]  # fmt: skip
        names += [f"{at}encoder.layers.{layer}.{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    return names


def test_released_names_are_the_published_ones(released):
    """INV-03: 8,243 names with the published fingerprint, every parameter covered exactly once."""
    check = check_conversion(released)
    assert (check.tensors, check.expected) == (8243, 8243)
    assert check.names_sha256 == TEXT_SHA256
    assert check.parameters == check.spec_parameters == 456_089_655_296
    assert check.complete


def test_group_counts(released):
    """INV-03: counts of model.md 11.1."""
    names = list(tensor_map(released))
    endings = {"input_layernorm.weight": 80, "post_attention_layernorm.weight": 80, "block_sparse_moe.gate.weight": 80,
               ".w1.weight": 2560, ".w2.weight": 2560, ".w3.weight": 2560, "qkv_proj.weight": 70,
               "output_gate.weight": 70, "out_proj.weight": 70, "self_attn.norm.weight": 70, "q_proj.weight": 10,
               "k_proj.weight": 10, ".v_proj.weight": 10, "o_proj.weight": 10}  # fmt: skip
    for ending, count in endings.items():
        found = [n for n in names if n.endswith(ending if ending != "o_proj.weight" else ".o_proj.weight")]
        if ending == "q_proj.weight":
            found = [n for n in names if n.endswith(".q_proj.weight")]
        assert len(found) == count, ending


def test_vision_names(released):
    """INV-03: the VL-01 names have the published fingerprint, and its text part is exactly the text model."""
    text = [f"language_model.{name}" for name in tensor_map(released)]
    names = text + vision_names()
    assert len(names) == 8637
    assert names_sha256(names) == VISION_SHA256
    assert text_names(names) == {name.removeprefix("language_model."): name for name in text}


def test_every_element_has_one_place():
    """Filling all tensors with distinct numbers fills all parameters with each number exactly once."""
    config = parse_config(hub_config(attn_type_list=[0, 0, 1, 0, 0, 1, 0], num_hidden_layers=7))
    tensors = tensor_map(config)
    params = {t.path: [] for t in tensors.values()}
    start = 0
    for tensor in tensors.values():
        size = math.prod(tensor.shape)
        stored = np.arange(start, start + size).reshape(tensor.shape)
        start += size
        ours = tensor.from_stored(stored)
        assert ours.flags.c_contiguous
        np.testing.assert_array_equal(tensor.to_stored(ours), stored)
        params[tensor.path].append(ours.reshape(-1))
    seen = np.sort(np.concatenate([np.concatenate(parts) for parts in params.values()]))
    np.testing.assert_array_equal(seen, np.arange(start))


def test_fused_layout():
    """INV-12: row head * 3H + {0, H, 2H} + dim of the stored matrix is q, k, v of that head."""
    config = parse_config(hub_config())
    tensor = tensor_map(config)["model.layers.0.self_attn.qkv_proj.weight"]
    N, H, D = 8, 8, 24
    assert tensor.shape == (3 * N * H, D)
    stored = np.random.default_rng(0).normal(size=tensor.shape)
    ours = tensor.from_stored(stored)
    for head, part, dim in ((0, 0, 0), (3, 1, 5), (7, 2, 7)):
        np.testing.assert_array_equal(ours[:, head, part, dim], stored[head * 3 * H + part * H + dim])


def test_row_ranges_are_parts_of_the_whole():
    config = parse_config(hub_config(vocab_size=60))
    rng = np.random.default_rng(0)
    for name in ("model.layers.0.self_attn.qkv_proj.weight", "lm_head.weight", "model.embed_tokens.weight",
                 "model.layers.3.self_attn.o_proj.weight", "model.layers.0.self_attn.norm.weight"):  # fmt: skip
        tensor = tensor_map(config)[name]
        stored = rng.normal(size=tensor.shape)
        whole = tensor.from_stored(stored)
        units = tensor.units_per_piece(8, stored.nbytes // 2)
        assert 0 < units < tensor.row_units
        assert tensor.row_units % units == 0
        rows = units * tensor.rows_per_unit
        take = [slice(None)] * whole.ndim
        take[tensor.row_dim] = slice(0, units)
        np.testing.assert_array_equal(tensor.from_stored(stored[:rows]), whole[tuple(take)])
        np.testing.assert_array_equal(tensor.to_stored(whole[tuple(take)]), stored[:rows])


def test_transpose_of_odd_sizes():
    matrix = np.random.default_rng(0).integers(0, 9, (517, 259))
    np.testing.assert_array_equal(transpose(matrix), matrix.T)


def test_parameters_without_published_names_are_refused():
    config = parse_config(hub_config())
    with pytest.raises(ConvertError, match="gate_down"):
        tensor_map(dataclasses.replace(config, gate_rank=4))


def released_hub(released):
    return config_json(released, "hub")


def test_both_schemas_and_the_vision_form_agree(released):
    """INV-04, INV-05: one internal config; softmax exactly at 7, 15, ..., 79."""
    hub = released_hub(released)
    assert hub["attn_type_list"] == [0, 0, 0, 0, 0, 0, 0, 1] * 10
    assert hub["layernorm_mlp_alpha"] == 3.5565588200778455
    native = config_json(released, "transformers")
    vision = {"model_type": "minimax_vl_01", "text_config": hub | {"shared_intermediate_size": [0]}}
    parsed = [parse_config(data) for data in (hub, native, vision)]
    assert parsed[0] == parsed[1] == parsed[2]
    assert parsed[0].layers == hybrid_layers(80)
    assert [i for i, kind in enumerate(parsed[0].layers) if kind == SOFTMAX] == list(range(7, 80, 8))
    assert parsed[0].alpha("lightning") == 160**0.25
    assert (parsed[0].lightning_beta, parsed[0].ffn_beta, parsed[0].lightning_norm_eps) == (1.0, 1.0, 1e-6)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_config_round_trip(name, form):
    config = parse_config(CASES[name]["config"])
    assert parse_config(config_json(config, form)) == config


def test_native_config_without_rotary_dim_rotates_the_whole_head():
    data = native_config()
    del data["rotary_dim"]
    assert parse_config(data).rotary_dim == data["head_dim"]
    assert parse_config(data | {"partial_rotary_factor": 0.5}).rotary_dim == 4


def test_older_native_config_with_rope_theta():
    data = native_config() | {"rope_parameters": None, "rope_theta": 1e7}
    assert parse_config(data) == parse_config(native_config())


@pytest.mark.parametrize("key", [key for key in hub_config() if key not in (
    "bos_token_id", "eos_token_id", "sliding_window", "attention_dropout", "shared_intermediate_size",
    "tie_word_embeddings", "hidden_act")])  # fmt: skip
def test_no_default_is_assumed(key):
    """Every key that decides what is computed must be there; the error names it."""
    data = hub_config()
    del data[key]
    with pytest.raises(ConfigSchemaError, match=key):
        parse_config(data)


@pytest.mark.parametrize(("changes", "named"), [
    ({"model_type": "llama"}, "model_type"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"shared_intermediate_size": [64]}, "shared_intermediate_size"),
    ({"sliding_window": 4096}, "sliding_window"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
    ({"attn_type_list": [0] * 7 + [2]}, "attn_type_list"),
    ({"attn_type_list": [0] * 6 + [1]}, "num_hidden_layers"),
    ({"layer_types": ["full_attention"] * 8}, "layer_types"),
    ({"num_hidden_layers": "8"}, "num_hidden_layers"),
    ({"hidden_size": True}, "hidden_size"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rotary_dim": 16}, "rotary_dim"),
    ({"partial_rotary_factor": 1.0}, "rotary_dim"),
    ({"num_key_value_heads": 3}, "num_kv_heads"),
    ({"rope_parameters": {"rope_theta": 10000.0}}, "rope_theta"),
    ({"rope_parameters": {"type": "yarn"}}, "rope_parameters: type"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: rope_type"),
    ({"rope_parameters": {"rope_type": None}}, "rope_parameters: rope_type"),
    ({"rope_parameters": {"factor": 4.0}}, 'rope_parameters: has "factor"'),
    ({"rope_parameters": []}, "rope_parameters: must be an object"),
    ({"attn_type_list": [False, False, False, True]}, "attn_type_list"),
    ({"attention_bias": True}, "attention_bias"),
    ({"qkv_bias": True}, "qkv_bias"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"rope_theta": 1e308}, "rope_theta"),
    ({"layernorm_mlp_alpha": 1e39}, "layernorm_mlp_alpha"),
    ({"layernorm_linear_attention_beta": 1e39}, "layernorm_linear_attention_beta"),
    ({"partial_rotary_factor": 1e308}, "partial_rotary_factor"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    ({"rms_norm_eps": 1e-60}, "rms_norm_eps"),
    ({"rope_theta": 10**400}, "rope_theta"),
    ({"layernorm_mlp_alpha": 0}, "ffn_alpha"),
    ({"layernorm_full_attention_beta": 0.0}, "softmax_beta"),
    ({"num_local_experts": 5_000_000}, "num_local_experts"),
    ({"hidden_size": 10**30}, "hidden_size"),
    ({"eos_token_id": "20"}, "eos_token_id"),
    ({"eos_token_id": True}, "eos_token_id"),
    ({"eos_token_id": [[1]]}, "eos_token_id"),
    ({"eos_token_id": {"a": 1}}, "eos_token_id"),
    ({"eos_token_id": -1}, "eos_token_id"),
    ({"eos_token_id": 61}, "end_of_text_id"),
    ({"model_type": "minimax_vl_01", "text_config": {"model_type": "minimax_vl_01"}}, "text_config"),
    ({"model_type": "minimax_vl_01", "text_config": {"eos_token_id": 5}, "eos_token_id": [5, 6]}, "eos_token_id"),
    ({"model_type": "minimax_vl_01", "text_config": {}, "quantization_config": {}}, "quantization_config"),
])  # fmt: skip
def test_contradictions_name_the_key(changes, named):
    with pytest.raises(ConfigSchemaError, match=named):
        parse_config(hub_config(**changes))


@pytest.mark.parametrize(("outer", "inner", "ids"), [
    (5, None, (5,)), (None, 6, (6,)), (5, [5], (5,)), ([5, 6], [5, 6], (5, 6)),
])  # fmt: skip
def test_a_vision_model_may_name_the_end_of_text_itself(outer, inner, ids):
    """INV-42: ids outside text_config count as well."""
    data = {"model_type": "minimax_vl_01", "text_config": hub_config(eos_token_id=inner), "eos_token_id": outer}
    assert end_of_text_ids(data, "config.json") == ids
    assert parse_config(data).end_of_text_id == ids[0]


def test_slopes_that_transformers_has_not_are_refused():
    """INV-09: for other head counts its own code computes other slopes; the hub's code computes ours."""
    with pytest.raises(ConfigSchemaError, match="num_attention_heads: is 6"):
        parse_config(native_config(num_attention_heads=6))
    assert parse_config(hub_config(num_attention_heads=12)).num_heads == 12


def test_keys_that_appear_twice_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"a": {"b": 1, "rope_theta": 1, "rope_theta": 2}}')
    with pytest.raises(ConfigSchemaError, match=r"config\.json.*'rope_theta' appears twice"):
        read_json(tmp_path / "config.json")


def test_one_tensor_with_and_without_its_prefix():
    names = ["language_model.lm_head.weight", "language_model.model.norm.weight", "lm_head.weight"]
    with pytest.raises(ConvertError, match=r"'language_model\.lm_head\.weight' and 'lm_head\.weight'"):
        text_names(names)


@pytest.mark.parametrize(("changes", "form"), [
    ({"gate_rank": 4}, "hub"), ({"num_experts": 0}, "hub"), ({"lightning_norm_eps": 1e-5}, "hub"),
    ({"norm": "prenorm"}, "transformers"), ({"num_heads": 6, "num_kv_heads": 3}, "transformers"),
])  # fmt: skip
def test_what_a_schema_cannot_say_is_refused(changes, form):
    config = parse_config(hub_config())
    with pytest.raises(ConfigSchemaError, match=next(iter(changes))):
        config_json(dataclasses.replace(config, **changes), form)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("changes", [{"norm_eps": 1.0}, {"num_experts": 5_000_000}, {"ffn_beta": 0.0},
                                     {"softmax_beta": 1e300}])  # fmt: skip
def test_check_refuses_models_that_cannot_be(changes):
    """The same limits hold for a configuration that no config.json was read for."""
    config = dataclasses.replace(parse_config(hub_config()), **changes)
    with pytest.raises(ConfigSchemaError, match=r": (norm_eps|num_local_experts|ffn_beta|softmax_beta): "):
        check_conversion(config)


def test_prenorm_survives_the_hub_schema():
    config = parse_config(hub_config(postnorm=False))
    assert config.norm == "prenorm"
    assert parse_config(config_json(config, "hub")) == config


def test_decay_buffers(released):
    """INV-09, INV-15: reference slopes of model.md 4.3; one block's tables, fp32, no lambda equal to 1."""
    config = dataclasses.replace(released, layers=hybrid_layers(80))
    buffers = dict(decay_buffers(config, 4))
    assert len(buffers) == 280
    for layer, head, slope in ((0, 0, 0.91701321), (40, 31, 0.03085506), (78, 63, 0.0000494853)):
        at = f"model.layers.{layer}.self_attn."
        assert buffers[at + "slope_rate"].shape == (64, 1, 1)
        assert float(buffers[at + "slope_rate"][head, 0, 0]) == pytest.approx(slope, rel=1e-6)
        key = buffers[at + "key_decay"][head, :, 0]
        assert key[-1] == 1
        assert key[-2] == pytest.approx(math.exp(-slope), rel=1e-6)
        assert key[-2] < 1
        assert buffers[at + "query_decay"][head, 1, 0] == pytest.approx(math.exp(-2 * slope), rel=1e-6)
        diagonal = buffers[at + "diagonal_decay"][0, head]
        assert diagonal[2, 0] == pytest.approx(math.exp(-2 * slope), rel=1e-6)
        assert np.all(diagonal[np.triu_indices(4, 1)] == 0)
        assert np.all(np.diag(diagonal) == 1)
