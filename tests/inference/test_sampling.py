"""Which ids may be sampled, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import minimax_text_01
from mmx_jax.config import ConfigError
from mmx_jax.inference import SamplingConfig
from mmx_jax.inference.sampling import row_keys, sample, trained_ids
from tests.model.common import random_params, tiny

LOGITS = np.log(np.array([0.4, 0.05, 0.3, 0.05, 0.2]))


def frequencies(config, logits=LOGITS, allowed=None, draws=20_000):
    """How often each id is drawn."""
    allowed = jnp.ones(len(logits), bool) if allowed is None else jnp.asarray(allowed)
    batch = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, len(logits)))
    keys = row_keys(config.seed, jnp.arange(draws), jnp.zeros(draws, jnp.int32))
    ids = jax.jit(sample, static_argnames="config")(batch, allowed, keys, config=config)
    return np.bincount(np.asarray(ids), minlength=len(logits)) / draws


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, [0.4, 0.05, 0.3, 0.05, 0.2]),
        ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
        ({"temperature": 1e-30}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.5}, np.array([0.16, 0.0025, 0.09, 0.0025, 0.04]) / 0.295),
        ({"temperature": 1.0, "top_k": 2}, [4 / 7, 0, 3 / 7, 0, 0]),
        ({"temperature": 1.0, "top_k": 99}, [0.4, 0.05, 0.3, 0.05, 0.2]),
        ({"temperature": 1.0, "top_p": 0.69}, [4 / 7, 0, 3 / 7, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.71}, [4 / 9, 0, 3 / 9, 0, 2 / 9]),
        ({"temperature": 1.0, "top_p": 1e-9}, [1, 0, 0, 0, 0]),
        ({"temperature": 1.0, "min_p": 0.6}, [4 / 7, 0, 3 / 7, 0, 0]),
        ({"temperature": 1.0, "min_p": 1.0}, [1, 0, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.75, "min_p": 0.7}, [4 / 7, 0, 3 / 7, 0, 0]),
    ],
)
def test_drawn_as_often_as_the_filters_say(settings, expected):
    """Expected probabilities are worked out by hand; 20,000 draws are within 0.015 of them."""
    np.testing.assert_allclose(frequencies(SamplingConfig(**settings)), expected, atol=0.015)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "min_p": 0.01},
        {"temperature": 1e30},
        {"temperature": 1e-30, "min_p": 0.1},
        {"temperature": 1e-30, "top_p": 0.9},
    ],
)
def test_ids_without_a_trained_row_are_never_sampled(settings):
    """INV-41: an untrained id's logit is exactly 0, which wins when every real logit is negative."""
    config = tiny(trained_vocab_size=40)
    params = random_params(config)
    params["head"] = params["head"].at[:, 7].set(0.0)
    params["embedding"] = params["embedding"].at[9].set(0.0)
    allowed = np.asarray(trained_ids(config, params))
    assert set(np.flatnonzero(~allowed)) == {7, 9, *range(40, 50)}
    logits = np.where(allowed, -5.0 - np.arange(50) / 10, 0.0)
    drawn = frequencies(SamplingConfig(**settings), logits, allowed, draws=2000)
    assert drawn[~allowed].sum() == 0


def test_the_released_model_bars_its_padding():
    """INV-41, INV-42: ids from 200,026 on are barred, generation stops at 200,020."""
    model = minimax_text_01.get_config().model
    assert model.trained_vocab_size == 200_026
    assert model.end_of_text_id == 200_020
    # The rule of `trained_ids` on the released vocabulary, with a narrow stand-in for the weights.
    rows = {"head": jnp.ones((1, model.vocab_size)), "embedding": jnp.ones((model.vocab_size, 1))}
    allowed = np.asarray(trained_ids(model, rows))
    np.testing.assert_array_equal(np.flatnonzero(~allowed), np.arange(200_026, 200_064))


def test_weights_that_are_all_zero_are_named():
    """Nothing to sample from is an error, not id 0 for ever."""
    config = tiny()
    params = random_params(config) | {"head": jnp.zeros((24, 50))}
    with pytest.raises(ValueError, match="are the weights loaded"):
        trained_ids(config, params)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e-50}, "temperature"),
        ({"seed": 1 << 32}, "seed"),
    ],
)
def test_impossible_settings_are_refused(settings, named):
    """The message names the field."""
    with pytest.raises(ConfigError, match=named):
        SamplingConfig(**settings)
