"""A pack of documents is the documents alone: values and gradients."""

import functools

import jax
import numpy as np
import pytest

from mmx_jax.model import TextModel
from tests.model.common import random_params, relative, rows, tiny

CONFIG = tiny(layers=("lightning", "softmax", "lightning"), vocab_size=20)
PARAMS = random_params(CONFIG)
LENGTHS = (1, 255, 256, 257)


SHAPE = (4, 1283)
"""All layouts have this shape, so that one compiled function serves them."""


def layout(name):
    """Segment ids: the four documents end to end, in a pack with leading and 256-multiple padding, or a row each."""
    ids = range(1, len(LENGTHS) + 1)
    tight = [[i for i, n in zip(ids, LENGTHS) for _ in range(n)]]
    padded = [[0] * 3 + [x for i, n in zip(ids, LENGTHS) for x in [i] * n + [0] * (-n % 256)]]
    apart = [[1] * n for n in LENGTHS]
    segments = np.zeros(SHAPE, np.int32)
    for row, content in zip(segments, {"tight": tight, "padded": padded, "apart": apart}[name]):
        row[: len(content)] = content
    return segments


@functools.partial(jax.jit, static_argnames="config")
def scored(config, params, tokens, positions, segments, weights):
    """A loss that reads every real token with its own weight, its gradient, and hidden states."""

    def loss(params):
        model = TextModel(config, params)
        hidden, _, _ = model.backbone(model.embed(tokens), positions, segments)
        return (hidden @ params["head"] * weights).sum(), hidden

    (_, hidden), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return hidden, gradient


@functools.cache
def result(name):
    """Hidden states [documents' tokens, D] and gradients of a layout."""
    _, positions, segments = rows(CONFIG, layout(name))
    real = segments != 0
    rng = np.random.default_rng(0)
    tokens = np.random.default_rng(1).integers(0, 20, segments.shape).astype(np.int32)
    tokens[real] = rng.integers(0, 20, sum(LENGTHS))
    weights = np.full((*segments.shape, 20), 0.0, np.float32)
    weights[real] = rng.normal(size=(sum(LENGTHS), 20))
    hidden, gradient = scored(CONFIG, PARAMS, tokens, positions, segments, weights)
    return np.asarray(hidden)[real], gradient


@pytest.mark.parametrize("pack", ["tight", "padded"])
def test_packed_equals_separate(pack):
    """INV-36, forward and gradient of every parameter, for lengths 1, 255, 256, 257; padding contributes nothing."""
    (packed, packed_gradient), (alone, alone_gradient) = result(pack), result("apart")
    assert relative(packed, alone) < 1e-4
    for path, gradient in alone_gradient.items():
        assert relative(packed_gradient[path], gradient) < 1e-4, path
        assert np.abs(gradient).max() > 0, path


def test_what_stands_in_padding_does_not_matter():
    """INV-34, INV-36: other tokens in padding change no bit of the real ones."""
    _, positions, segments = rows(CONFIG, layout("padded"))
    tokens = np.random.default_rng(1).integers(0, 20, segments.shape).astype(np.int32)
    other = np.where(segments == 0, 19 - tokens, tokens)
    weights = np.zeros((*segments.shape, 20), np.float32)
    real = segments != 0
    first, second = (scored(CONFIG, PARAMS, t, positions, segments, weights)[0] for t in (tokens, other))
    np.testing.assert_array_equal(np.asarray(first)[real], np.asarray(second)[real])


def test_a_later_token_changes_nothing_before_it():
    """INV-17, through both kinds of layers and the experts: not one bit."""
    _, positions, segments = rows(CONFIG, np.ones(SHAPE))
    tokens = np.random.default_rng(1).integers(0, 20, segments.shape).astype(np.int32)
    weights = np.zeros((*segments.shape, 20), np.float32)
    changed = tokens.copy()
    changed[0, 300] = (changed[0, 300] + 1) % 20
    first, second = (
        np.asarray(scored(CONFIG, PARAMS, t, positions, segments, weights)[0])[0] for t in (tokens, changed)
    )
    np.testing.assert_array_equal(first[:300], second[:300])
    assert (np.abs(first[300:] - second[300:]).max(axis=1) > 0).all()
