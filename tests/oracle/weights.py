"""Configurations, weights and inputs that the oracle and our tests make alike from numpy seeds, so that none is stored.

Runs in the oracle's environment too: numpy only.
"""

import numpy as np

LIGHTNING_SEVEN = ["linear_attention"] * 7 + ["full_attention"]


def native_config(**changes):
    """A tiny MiniMaxForCausalLM config.json with every class default overridden (model.md 15.2)."""
    layers = changes.pop("layer_types", LIGHTNING_SEVEN)
    alpha = (2 * len(layers)) ** 0.25
    config = {
        "model_type": "minimax",
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": len(layers),
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rotary_dim": 4,
        "layer_types": layers,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "block_size": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "initializer_range": 0.02,
        "postnorm": True,
        "full_attn_alpha_factor": alpha,
        "linear_attn_alpha_factor": alpha,
        "mlp_alpha_factor": alpha,
        "full_attn_beta_factor": 1.0,
        "linear_attn_beta_factor": 1.0,
        "mlp_beta_factor": 1.0,
    }
    return config | changes


CASES = {
    # 8 query heads on 2; half of each head rotated; three blocks of 8 and a ragged tail.
    "gqa4": {"config": native_config(), "seed": 1, "tokens": (2, 27), "left_padding": (0, 0)},
    # 8 query heads on 1; other factors for each branch; 8 experts.
    "gqa8": {
        "config": native_config(
            num_key_value_heads=1,
            num_local_experts=8,
            full_attn_alpha_factor=1.7,
            linear_attn_beta_factor=0.8,
            mlp_beta_factor=1.1,
            mlp_alpha_factor=2.2,
        ),
        "seed": 2,
        "tokens": (1, 41),
        "left_padding": (0,),
    },
    # The whole head is rotated, so that transformers runs as it comes, without a patch.
    "stock": {
        "config": native_config(rotary_dim=8, num_key_value_heads=4, hidden_size=40),
        "seed": 3,
        "tokens": (2, 19),
        "left_padding": (0, 0),
    },
    # Left padding; two groups of a shorter pattern; heads as wide as none of the others.
    "padded": {
        "config": native_config(
            layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
            head_dim=16,
            rotary_dim=6,
            num_attention_heads=4,
            num_key_value_heads=1,
        ),
        "seed": 4,
        "tokens": (3, 22),
        "left_padding": (0, 5, 13),
    },
}
GREEDY_TOKENS = 32
PROJECTIONS = 16
FULL_GRADIENTS = "gqa4"


def weights(names_and_shapes, seed):
    """fp32 weights of realistic size: random norms, routers that choose, a different stream for every name."""
    out = {}
    for i, (name, shape) in enumerate(sorted(names_and_shapes.items())):
        rng = np.random.default_rng([seed, i])
        if len(shape) == 1:
            value = rng.uniform(0.5, 1.5, shape)
        elif "embed_tokens" in name:
            value = rng.normal(size=shape)
        else:
            value = rng.normal(size=shape) * (2.0 if "block_sparse_moe.gate" in name else 1.0) / np.sqrt(shape[1])
        out[name] = value.astype(np.float32)
    return out


def tokens_and_mask(case):
    """Token ids [B, T] and the 0/1 mask of real tokens; padding is on the left."""
    batch, length = case["tokens"]
    rng = np.random.default_rng(case["seed"] + 1000)
    tokens = rng.integers(0, case["config"]["vocab_size"], (batch, length)).astype(np.int64)
    mask = (np.arange(length) >= np.array(case["left_padding"])[:, None]).astype(np.int64)
    return tokens, mask


def direction(name, shape, number):
    """A random direction on which a gradient is projected."""
    return np.random.default_rng([number, *name.encode()]).normal(size=shape)
