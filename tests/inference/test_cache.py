"""Prefill and decode against the full forward pass, whatever the split, the padding and the order of the rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import minimax_text_01
from mmx_jax.model import Cache
from tests.model.common import forward, random_params, relative, rows, tiny

CONFIG = tiny()
T = 150
"""Longer than two chunks of the portable lightning attention, and a multiple of nothing."""
SLOTS, WIDTH = 6, 13


@functools.cache
def full():
    """Parameters, T tokens, and their logits from one forward pass."""
    params = random_params(CONFIG)
    tokens, positions, segments = rows(CONFIG, np.ones((1, T)))
    logits, *_ = forward(CONFIG, params, tokens, positions, segments)
    return params, tokens[0], np.asarray(logits[0])


def extend(cache, tokens, segments):
    """Feeds tokens to a cache; returns their logits and the cache."""
    tokens, segments = np.asarray(tokens, np.int32), np.asarray(segments, np.int32)
    logits, _, _, cache = forward(CONFIG, full()[0], tokens, cache.positions(jnp.asarray(segments)), segments, cache)
    return np.asarray(logits), cache


def new_cache(slots, room=T):
    return Cache.init(CONFIG, slots, room, kv_dtype="float32")


def test_decode_equals_the_full_forward_for_every_split():
    """INV-31: row b prefills n = b + 1 tokens and decodes the rest, for every n < T at once."""
    _, tokens, want = full()
    splits = np.arange(1, T)
    real = np.arange(T) < splits[:, None]
    logits, cache = extend(new_cache(T - 1), np.where(real, tokens, 7), real)
    for b, n in enumerate(splits):
        assert relative(logits[b, :n], want[:n]) < 1e-4, f"prefill of {n}"
    np.testing.assert_array_equal(cache.lengths, splits)
    for step in range(T - 1):
        at = np.minimum(splits + step, T - 1)
        active = splits + step < T
        logits, cache = extend(cache, tokens[at][:, None], active[:, None])
        assert relative(logits[active, 0], want[at[active]]) < 1e-4, f"decode step {step}"
    np.testing.assert_array_equal(cache.lengths, np.full(T - 1, T))


def test_several_prefill_chunks_with_padding_anywhere():
    """INV-31, INV-34: rows advance by random odd amounts, their tokens left or right of the padding in each chunk."""
    _, tokens, want = full()
    rng = np.random.default_rng(0)
    cache, done = new_cache(SLOTS), np.zeros(SLOTS, int)
    while (done < T).any():
        chunk, segments = rng.integers(0, CONFIG.vocab_size, (SLOTS, WIDTH)), np.zeros((SLOTS, WIDTH), int)
        taken = np.minimum(rng.integers(0, WIDTH + 1, SLOTS), T - done)
        starts = np.array([rng.choice([0, WIDTH - n, (WIDTH - n) // 2]) for n in taken])
        for b, (n, start) in enumerate(zip(taken, starts)):
            chunk[b, start : start + n] = tokens[done[b] : done[b] + n]
            segments[b, start : start + n] = 1
        logits, cache = extend(cache, chunk, segments)
        for b, (n, start) in enumerate(zip(taken, starts)):
            if n:
                assert relative(logits[b, start : start + n], want[done[b] : done[b] + n]) < 1e-4, (b, done[b], n)
        done += taken
        np.testing.assert_array_equal(cache.lengths, done)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", [1, SLOTS])
def test_padded_prompts_equal_unpadded_ones(side, batch):
    """INV-34, for batch 1 as well, without a cache and with one; the state is that of the last real token."""
    params, tokens, want = full()
    lengths = [9, 4, 1, 13, 2, 12][:batch]
    padded = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (batch, WIDTH))
    segments = np.zeros((batch, WIDTH), np.int32)
    spans = [slice(WIDTH - n, WIDTH) if side == "left" else slice(0, n) for n in lengths]
    for b, (n, span) in enumerate(zip(lengths, spans)):
        padded[b, span], segments[b, span] = tokens[:n], 1
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
    alone, *_ = forward(CONFIG, params, padded.astype(np.int32), positions, segments)
    cached, cache = extend(new_cache(batch), padded, segments)
    following, _ = extend(cache, [[int(tokens[n])] for n in lengths], np.ones((batch, 1)))
    for b, (n, span) in enumerate(zip(lengths, spans)):
        assert relative(alone[b, span], want[:n]) < 1e-4
        assert relative(cached[b, span], want[:n]) < 1e-4
        assert relative(following[b, 0], want[n]) < 1e-4


def test_positions_come_from_the_true_length():
    """INV-33: layer 0 is lightning and has no keys to count; wrong positions would change the result."""
    params, tokens, want = full()
    segments = np.ones((1, 1), np.int32)
    _, cache = extend(new_cache(1), [tokens[:WIDTH]], np.ones((1, WIDTH)))
    positions = cache.positions(jnp.asarray(segments))
    assert CONFIG.layers[0] == "lightning"
    np.testing.assert_array_equal(positions, [[WIDTH]])
    token = tokens[None, WIDTH : WIDTH + 1]
    right, *_ = forward(CONFIG, params, token, np.array([[WIDTH]], np.int32), segments, cache)
    wrong, *_ = forward(CONFIG, params, token, np.array([[0]], np.int32), segments, cache)
    assert relative(right[0, 0], want[WIDTH]) < 1e-4
    assert relative(wrong[0, 0], want[WIDTH]) > 1e-3


def test_reordered_rows_and_reused_slots():
    """INV-35: permuting both caches permutes the outputs; a reset slot is as a fresh one, its neighbours as before."""
    _, tokens, want = full()
    starts = np.arange(SLOTS) * 20
    _, cache = extend(new_cache(SLOTS), [tokens[s : s + WIDTH] for s in starts], np.ones((SLOTS, WIDTH)))
    following, every = tokens[starts + WIDTH][:, None], np.ones((SLOTS, 1))
    plain, _ = extend(cache, following, every)
    order = np.array([2, 0, 1, 5, 4, 3])
    moved, _ = extend(cache.reorder(jnp.asarray(order)), following[order], every)
    np.testing.assert_array_equal(moved, plain[order])
    assert relative(plain[0], plain[1]) > 1e-2

    reused = np.arange(SLOTS) == 1
    fresh, cache = extend(cache.reset(jnp.array([1])), np.full((SLOTS, 1), tokens[0]), reused[:, None])
    assert relative(fresh[1, 0], want[0]) < 1e-4
    after, _ = extend(cache, np.where(reused[:, None], tokens[1], following), every)
    assert relative(after[1, 0], want[1]) < 1e-4
    assert relative(after[~reused], plain[~reused]) < 1e-5


def test_a_cache_grows_and_never_shrinks():
    """More room keeps what is there (test_generator.py decodes through several growths)."""
    _, cache = extend(new_cache(1), [full()[1][:WIDTH]], np.ones((1, WIDTH)))
    grown = cache.grow(2 * T)
    assert grown.max_length == 2 * T
    for before, after in zip(jax.tree.leaves((cache.keys, cache.values)), jax.tree.leaves((grown.keys, grown.values))):
        np.testing.assert_array_equal(after[:, :, :, :T], before)
        assert not after[:, :, :, T:].any()
    with pytest.raises(ValueError, match="cannot shrink"):
        cache.grow(WIDTH)


def test_sizes_of_the_released_model():
    """INV-32: 280 MiB of fp32 state a sequence at any length, 40,960 bytes of bf16 keys and values a token."""

    def measured(length):
        cache = jax.eval_shape(lambda: Cache.init(minimax_text_01.get_config().model, 1, length))
        size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
        assert {x.dtype for x in jax.tree.leaves(cache.states)} == {jnp.dtype("float32")}
        return size(cache.states), size((cache.keys, cache.values))

    assert measured(1000) == (280 * 2**20, 1000 * 40_960)
    assert measured(1_000_000) == (280 * 2**20, 1_000_000 * 40_960)
