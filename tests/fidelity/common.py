"""Folders of published weights for tests, written by the safetensors library and not by our own writer."""

import json

import numpy as np
import safetensors.numpy

from mmx_jax.config import ModelConfig
from mmx_jax.convert import parse_config
from mmx_jax.convert.names import tensor_map
from tests.oracle.weights import native_config, weights

HUB_CONFIG = {
    "model_type": "minimax_text_01", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 20,
    "num_hidden_layers": 4, "attn_type_list": [0, 0, 0, 1], "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "rotary_dim": 4, "rope_theta": 10000000, "num_local_experts": 4,
    "num_experts_per_tok": 2, "rms_norm_eps": 1e-05, "hidden_act": "silu", "postnorm": True, "sliding_window": None,
    "shared_intermediate_size": 0, "tie_word_embeddings": False, "router_aux_loss_coef": 0.001,
    "bos_token_id": None, "eos_token_id": None, "attention_dropout": 0.0,
} | {f"layernorm_{branch}_{factor}": value for branch in ("linear_attention", "full_attention", "mlp")
     for factor, value in (("alpha", 2.0), ("beta", 1.0))}  # fmt: skip


def hub_config(**changes):
    """A tiny config.json in the hub schema."""
    return HUB_CONFIG | changes


def tiny_weights(config, seed=0, dtype=np.float32):
    """Published name -> values of a model."""
    shapes = {name: tensor.shape for name, tensor in tensor_map(config).items()}
    return {name: value.astype(dtype) for name, value in weights(shapes, seed).items()}


def write_folder(folder, config, tensors, shards=1):
    """config.json and tensors in `shards` files with an index, as save_pretrained lays them out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        safetensors.numpy.save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tiny_folder(folder, form="hub", shards=3, dtype=np.float32, **changes):
    """A folder with a tiny random model; returns its path and its tensors."""
    config = hub_config(**changes) if form == "hub" else native_config(**changes)
    model: ModelConfig = parse_config(config)
    tensors = tiny_weights(model, dtype=dtype)
    return write_folder(folder, config, tensors, shards), tensors
