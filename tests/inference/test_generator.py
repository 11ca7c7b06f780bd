"""Generation: many prompts in few slots give what each prompt gives alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx_jax.inference import GREEDY, Generator, SamplingConfig, generator, inference_params
from mmx_jax.inference.generator import Rows, decode
from mmx_jax.model import Cache, TextModel
from tests.model.common import forward, random_params, relative, tiny

CONFIG = tiny()
PARAMS = random_params(CONFIG)
PROMPTS = [np.random.default_rng(i).integers(0, 50, n).tolist() for i, n in enumerate((5, 17, 1, 33, 8))]
NEW = 10
WARM = SamplingConfig(temperature=1.0, top_p=0.95, seed=3)


@functools.cache
def greedy_by_full_forwards():
    """Continuations by a forward pass over the whole text for each token."""
    width, texts = 48, [list(prompt) for prompt in PROMPTS]
    for _ in range(NEW):
        tokens = np.array([text + [0] * (width - len(text)) for text in texts], np.int32)
        segments = np.array([[1] * len(text) + [0] * (width - len(text)) for text in texts], np.int32)
        positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
        logits, *_ = forward(CONFIG, PARAMS, tokens, positions, segments)
        for b, text in enumerate(texts):
            text.append(int(np.argmax(logits[b, len(text) - 1])))
    return [text[len(prompt) :] for text, prompt in zip(texts, PROMPTS)]


def make(config=CONFIG, params=PARAMS, **settings):
    return Generator(
        config, params, **({"slots": 2, "prefill_chunk": 16, "decode_steps": 4, "kv_dtype": "float32"} | settings)
    )


def test_greedy_equals_repeated_full_forwards(monkeypatch):
    """INV-31, INV-35: five prompts share two slots; chunks, reuse and a growing cache change nothing."""
    monkeypatch.setattr(generator, "SMALLEST_CACHE", 32)
    assert make().generate(PROMPTS, GREEDY, NEW) == greedy_by_full_forwards()


def test_samples_do_not_depend_on_slots_or_blocks():
    """A prompt's samples follow from the seed and its place in the list alone."""
    few = make().generate(PROMPTS, WARM, NEW)
    assert make(slots=5, decode_steps=3).generate(PROMPTS, WARM, NEW) == few
    assert make().generate(PROMPTS, dataclasses.replace(WARM, seed=4), NEW) != few
    assert len({tuple(out) for out in make().generate([PROMPTS[0]] * 4, WARM, NEW)}) == 4


def test_a_stream_gives_what_a_batch_gives():
    """One prompt token by token is its batch of one."""
    assert list(make().stream(PROMPTS[3], WARM, NEW)) == make().generate([PROMPTS[3]], WARM, NEW)[0]


def test_generation_stops_at_end_of_text_in_each_row():
    """INV-42: each row ends at its own first end of text, which is not returned; other ids may be named."""
    outputs = greedy_by_full_forwards()
    end = outputs[1][4]
    expected = [out[: out.index(end)] if end in out else out for out in outputs]
    assert any(0 < len(out) < NEW for out in expected)
    assert any(len(out) == NEW for out in expected)
    configured = dataclasses.replace(CONFIG, end_of_text_id=end)
    assert make(configured).generate(PROMPTS, GREEDY, NEW) == expected
    assert make().generate(PROMPTS, GREEDY, NEW, stop=(end,)) == expected
    assert make(stop=(end,)).generate(PROMPTS, GREEDY, NEW) == expected


def test_untrained_ids_are_never_generated():
    """INV-41 through the whole path: the head's strongest column belongs to an untrained id."""
    barred = 44
    params = PARAMS | {"head": (PARAMS["head"] * 0.01).at[:, barred:].set(0.0)}
    hidden_bias = params | {"final_norm": jnp.ones_like(PARAMS["final_norm"])}
    config = dataclasses.replace(CONFIG, trained_vocab_size=barred)
    for settings in (GREEDY, WARM):
        assert all(
            token < barred for out in make(config, hidden_bias).generate(PROMPTS, settings, NEW) for token in out
        )


@pytest.mark.parametrize(
    ("prompts", "limit", "message"),
    [
        ([[1], []], 5, "prompt 1 is empty"),
        ([[1, 50]], 5, "prompt 0 holds id 50, outside the vocabulary of 50"),
        ([[1]], 0, "max_new_tokens = 0"),
    ],
)
def test_prompts_that_cannot_be_continued(prompts, limit, message):
    """The message names the prompt and what is wrong."""
    with pytest.raises(ValueError, match=message):
        make().generate(prompts, GREEDY, limit)


def test_no_prompts_give_nothing():
    """An empty list is no error."""
    assert make().generate([], GREEDY, 5) == []


def test_weights_are_kept_in_the_dtypes_that_they_are_used_in():
    """INV-22, INV-40: router, norms and head stay fp32 under a bf16 policy; matmul weights are halved."""
    config = tiny(compute_dtype="bfloat16")
    kept = inference_params(config, PARAMS)
    fp32 = {path for path, value in kept.items() if value.dtype == jnp.float32}
    assert fp32 == {path for path in kept if path.endswith(("norm", "router", "head"))}
    assert {value.dtype for path, value in kept.items() if path not in fp32} == {jnp.dtype("bfloat16")}


def test_logits_are_fp32_from_an_fp32_head():
    """INV-40: bf16 hidden states meet the fp32 head in fp32; a bf16 matmul would be 100 times further off."""
    model = TextModel(tiny(compute_dtype="bfloat16"), PARAMS)
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 24)).astype(jnp.bfloat16)
    logits = model.head(hidden)
    exact = np.asarray(hidden, np.float64) @ np.asarray(PARAMS["head"], np.float64)
    assert logits.dtype == jnp.float32
    assert relative(logits, exact) < 1e-6
    assert relative(hidden @ PARAMS["head"].astype(jnp.bfloat16), exact) > 1e-4


def decode_cost(config, context):
    """FLOPs and bytes of the compiled decode step on a cache with room for `context` tokens."""
    cache = jax.eval_shape(lambda: Cache.init(config, 2, context))
    rows = jax.eval_shape(lambda: Rows.empty(2))
    allowed = jax.ShapeDtypeStruct((config.vocab_size,), bool)
    stop, waiting = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), bool)
    lowered = decode.lower(config, PARAMS if config is CONFIG else random_params(config), allowed, cache, rows, stop,
                           waiting, sampling=GREEDY, steps=1)  # fmt: skip
    cost = lowered.compile().cost_analysis()
    return cost["flops"], cost["bytes accessed"]


def test_decoding_costs_the_same_at_any_length_in_a_pure_lightning_model():
    """INV-32, INV-50: state and compiled work do not know the context; with a softmax layer both grow with it."""
    pure = tiny(layers=("lightning",) * 2)
    assert decode_cost(pure, 16) == decode_cost(pure, 4096)
    mixed = tiny(layers=("lightning", "softmax"))
    (short_flops, short_bytes), (long_flops, long_bytes) = decode_cost(mixed, 16), decode_cost(mixed, 4096)
    assert long_flops > 2 * short_flops
    assert long_bytes > 2 * short_bytes


def test_a_longer_context_compiles_nothing_new_in_a_pure_lightning_model():
    """The decode loop that continued 5 tokens is the one that continues 1,000."""
    config = tiny(layers=("lightning",) * 2, end_of_text_id=None)
    maker = make(config, random_params(config), slots=1, prefill_chunk=64)
    maker.generate([[1] * 5], GREEDY, 6)
    compiled = decode._cache_size()
    maker.generate([[1] * 1000], GREEDY, 6)
    assert decode._cache_size() == compiled
