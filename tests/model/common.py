"""Small models that keep every awkward relation of the real one, with weights that make each part matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmx_jax.config import ModelConfig
from mmx_jax.model import TextModel, parameter_spec

HYBRID = ("lightning",) * 7 + ("softmax",)


def tiny(**changes):
    """D = 24 is not N H = 32; four query heads share two key/value heads; half of each head is rotated."""
    settings = {
        "vocab_size": 50,
        "hidden_size": 24,
        "layers": HYBRID,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "rotary_dim": 4,
        "ffn_hidden_size": 20,
        "num_experts": 4,
        "experts_per_token": 2,
        "compute_dtype": "float32",
    }
    return ModelConfig(**(settings | changes))


def random_params(config, seed=0):
    """Weights of realistic size with random norm weights; routers strong enough to choose."""
    rng = np.random.default_rng(seed)
    params = {}
    for path, spec in parameter_spec(config).items():
        if spec.group == "no_decay":
            value = rng.uniform(0.5, 1.5, spec.shape)
        elif path == "embedding":
            value = rng.normal(size=spec.shape)
        else:
            value = rng.normal(size=spec.shape) * 1.5 / np.sqrt(spec.init.fan_in)
        params[path] = jnp.asarray(value, jnp.float32)
    return params


def rows(config, segment_ids, seed=1):
    """Random tokens for given segment ids, and positions that count from 0 in each segment."""
    segment_ids = np.asarray(segment_ids, np.int32)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, segment_ids.shape).astype(np.int32)
    positions = np.zeros_like(segment_ids)
    for b, row in enumerate(segment_ids):
        for t in range(1, len(row)):
            positions[b, t] = positions[b, t - 1] + 1 if row[t] == row[t - 1] else 0
    return tokens, positions, segment_ids


@functools.partial(jax.jit, static_argnames=("config", "train"))
def forward(config, params, tokens, positions, segment_ids, cache=None, train=False):
    """Logits, hidden states, aux and cache of the model under test."""
    model = TextModel(config, params)
    hidden, aux, cache = model.backbone(model.embed(tokens), positions, segment_ids, cache, train=train)
    return model.head(hidden), hidden, aux, cache


def relative(a, b):
    """Largest difference over the largest value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
