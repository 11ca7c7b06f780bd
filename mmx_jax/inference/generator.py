"""Generation: prompts are prefilled in chunks, rows decode together on the device, finished rows make room for others.

A slot is a row of the cache. While some slots prefill, the others hold padding (segment id 0) and stay as they are; so
prompts may differ in length, and a prompt that waits takes the slot of one that has ended.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mmx_jax.config import ModelConfig
from mmx_jax.inference.sampling import GREEDY, SamplingConfig, row_keys, sample, trained_ids
from mmx_jax.model import Cache, TextModel, parameter_spec
from mmx_jax.model.dot import Weight
from mmx_jax.model.quantize import QuantizedWeight

SMALLEST_CHUNK = 16
"""Prefill lengths are rounded up to powers of two from here on, so that few shapes are compiled."""
SMALLEST_CACHE = 256
"""Caches grow in powers of two from here on, for the same reason."""
KEPT_IN_FP32 = ("router", "head", "norm")
"""Components whose weights the model uses in fp32 (INV-22, INV-40)."""


def inference_dtypes(config: ModelConfig) -> dict[str, jnp.dtype]:
    """The dtype that each weight is used in: matmul weights the compute dtype, the rest fp32.

    Decoding reads every weight for each token, so master weights would double its cost.
    """
    return {
        path: jnp.dtype(
            "float32" if spec.component in KEPT_IN_FP32 or spec.group == "no_decay" else config.compute_dtype
        )
        for path, spec in parameter_spec(config).items()
    }


def inference_params(config: ModelConfig, params: Mapping[str, Weight]) -> dict[str, Weight]:
    """The weights in the dtypes that they are used in; quantised ones stay in 8 bits."""
    return {
        path: weight if isinstance(weight := params[path], QuantizedWeight) else jnp.asarray(weight, dtype)
        for path, dtype in inference_dtypes(config).items()
    }


@partial(jax.tree_util.register_dataclass, data_fields=("token", "active", "count", "limit", "request"), meta_fields=())
@dataclass(frozen=True)
class Rows:
    """What each slot is doing; a pytree of arrays [B]."""

    token: Any
    """int32: newest token, chosen and not yet in the cache."""
    active: Any
    """bool."""
    count: Any
    """int32: tokens chosen so far for the request."""
    limit: Any
    """int32: tokens to choose at most."""
    request: Any
    """int32: index of the prompt that the slot serves."""

    @classmethod
    def empty(cls, slots: int) -> "Rows":
        """No slot is active."""
        zero = jnp.zeros((slots,), jnp.int32)
        return cls(zero, jnp.zeros((slots,), bool), zero, zero, zero)


@partial(jax.jit, static_argnames="config", donate_argnames=("cache", "hidden"))
def prefill(
    config: ModelConfig,
    params: Mapping[str, Weight],
    cache: Cache,
    hidden: Float[Array, "B D"],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> tuple[Cache, Float[Array, "B D"]]:
    """Appends a chunk of known tokens to the cache; returns it with the hidden state of each row's last real token.

    Rows of padding alone keep their cache and their `hidden`; padding may be left or right (INV-34).
    """
    mixed, cache = _append(TextModel(config, params), cache, tokens, segment_ids)
    index = jnp.arange(tokens.shape[1])
    last = jnp.max(jnp.where(segment_ids != 0, index, -1), axis=1)
    newest = jnp.take_along_axis(mixed, jnp.maximum(last, 0)[:, None, None], axis=1)[:, 0]
    return cache, jnp.where((last >= 0)[:, None], newest.astype(hidden.dtype), hidden)


def _append(
    model: TextModel, cache: Cache, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden states of tokens that continue the cached rows, and the cache with them."""
    mixed, _, after = model.backbone(model.embed(tokens), cache.positions(segment_ids), segment_ids, cache)
    assert after is not None
    return mixed, after


def _choose(
    config: ModelConfig,
    params: Mapping[str, Weight],
    allowed: Bool[Array, " V"],
    hidden: Float[Array, "B D"],
    rows: Rows,
    stop: Int[Array, " J"],
    sampling: SamplingConfig,
) -> tuple[Rows, Int[Array, " B"]]:
    """Chooses a token for each active row; returns the rows after it and the tokens to hand out (-1 for none)."""
    logits = TextModel(config, params).head(hidden[:, None])[:, 0]
    token = sample(logits, allowed, row_keys(sampling.seed, rows.request, rows.count), sampling)
    stopped = (token[:, None] == stop).any(axis=1)
    count = rows.count + rows.active
    after = replace(rows, token=token, count=count, active=rows.active & ~stopped & (count < rows.limit))
    return after, jnp.where(rows.active & ~stopped, token, -1)


@partial(jax.jit, static_argnames=("config", "sampling"))
def first_token(
    config: ModelConfig,
    params: Mapping[str, Weight],
    allowed: Bool[Array, " V"],
    hidden: Float[Array, "B D"],
    rows: Rows,
    fresh: Bool[Array, " B"],
    stop: Int[Array, " J"],
    sampling: SamplingConfig,
) -> tuple[Rows, Int[Array, " B"]]:
    """The token after the prompt for the rows in `fresh`; the others stay as they are."""
    started, emitted = _choose(config, params, allowed, hidden, replace(rows, active=fresh), stop, sampling)
    return jax.tree.map(lambda new, old: jnp.where(fresh, new, old), started, rows), emitted


@partial(jax.jit, static_argnames=("config", "sampling", "steps"), donate_argnames="cache")
def decode(
    config: ModelConfig,
    params: Mapping[str, Weight],
    allowed: Bool[Array, " V"],
    cache: Cache,
    rows: Rows,
    stop: Int[Array, " J"],
    waiting: Bool[Array, ""],
    *,
    sampling: SamplingConfig,
    steps: int,
) -> tuple[Cache, Rows, Int[Array, "steps B"]]:
    """Up to `steps` tokens for every active row, in one loop on the device.

    The loop ends early when no row is active, and when a row ends while another prompt is `waiting` for its slot.

    Returns:
      The cache, the rows, and the tokens handed out by step; -1 where a row had none.
    """
    began = rows.active

    def unfinished(state: tuple) -> Array:
        step, _, rows, _ = state
        freed = (began & ~rows.active).any()
        return (step < steps) & rows.active.any() & ~(waiting & freed)

    def body(state: tuple) -> tuple:
        step, cache, rows, emitted = state
        segment_ids = rows.active[:, None].astype(jnp.int32)
        mixed, cache = _append(TextModel(config, params), cache, rows.token[:, None], segment_ids)
        rows, tokens = _choose(config, params, allowed, mixed[:, 0], rows, stop, sampling)
        return step + 1, cache, rows, emitted.at[step].set(tokens)

    emitted = jnp.full((steps, rows.token.shape[0]), -1, jnp.int32)
    _, cache, rows, emitted = jax.lax.while_loop(unfinished, body, (jnp.int32(0), cache, rows, emitted))
    return cache, rows, emitted


def power_of_two(size: int, smallest: int) -> int:
    """The smallest power of two times `smallest` that is at least `size`."""
    while smallest < size:
        smallest *= 2
    return smallest


class Generator:
    """Continues prompts with one model; compiled functions are shared by all generators of one configuration."""

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, Weight],
        *,
        slots: int = 8,
        prefill_chunk: int = 512,
        decode_steps: int = 16,
        kv_dtype: str = "bfloat16",
        stop: Sequence[int] = (),
    ):
        """Takes over weights by path.

        Args:
          config: the model.
          params: weights by path, of any float dtype.
          slots: prompts that are worked on at the same time.
          prefill_chunk: tokens of a prompt that one forward pass takes at most.
          decode_steps: tokens between two looks of the host at what came out.
          kv_dtype: dtype of cached keys and values.
          stop: ids that end every generation, besides the configuration's `end_of_text_id` (INV-42).

        Raises:
          ValueError: if a size is not positive, or no id can be sampled.
        """
        for name, size in (("slots", slots), ("prefill_chunk", prefill_chunk), ("decode_steps", decode_steps)):
            if size < 1:
                raise ValueError(f"{name} = {size}: must be at least 1")
        self.config = config
        self.params = inference_params(config, params)
        self.allowed = trained_ids(config, self.params)
        self.slots, self.prefill_chunk, self.decode_steps = slots, prefill_chunk, decode_steps
        self.kv_dtype = kv_dtype
        end = () if config.end_of_text_id is None else (config.end_of_text_id,)
        self.stop = (*end, *stop)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig = GREEDY,
        max_new_tokens: int = 128,
        stop: Sequence[int] = (),
    ) -> list[list[int]]:
        """Continues each prompt until a stop id or `max_new_tokens`; results in the order of the prompts.

        The stop id itself is not returned. Prompts may be more than slots, and of any lengths.

        Raises:
          ValueError: for an empty prompt, an id outside the vocabulary, or `max_new_tokens` < 1.
        """
        outputs: list[list[int]] = [[] for _ in prompts]
        for request, tokens in self.run(prompts, sampling, max_new_tokens, stop):
            outputs[request].extend(tokens)
        return outputs

    def stream(
        self,
        prompt: Sequence[int],
        sampling: SamplingConfig = GREEDY,
        max_new_tokens: int = 128,
        stop: Sequence[int] = (),
    ) -> Iterator[int]:
        """Yields the continuation of one prompt token by token; as `generate` otherwise."""
        for _, tokens in self.run([prompt], sampling, max_new_tokens, stop):
            yield from tokens

    def run(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, max_new_tokens: int, stop: Sequence[int] = ()
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields (index of the prompt, its next tokens) as they come; as `generate` otherwise."""
        self._check(prompts, max_new_tokens)
        pending = deque(enumerate(prompts))
        slots = max(1, min(self.slots, len(prompts)))
        stop_ids = jnp.asarray((*self.stop, *stop, -1), jnp.int32)
        cache = Cache.init(self.config, slots, SMALLEST_CACHE, self.kv_dtype)
        rows = Rows.empty(slots)
        while True:
            free = np.flatnonzero(~np.asarray(rows.active))
            admitted = {int(slot): pending.popleft() for slot in free[: len(pending)]}
            if admitted:
                cache = _with_room(cache, max(len(prompt) for _, prompt in admitted.values()))
                rows, cache, emitted = self._admit(cache, rows, admitted, max_new_tokens, stop_ids, sampling)
                yield from _by_request(emitted[None], rows)
            elif not len(free) < slots:
                return
            else:
                in_use = np.asarray(cache.lengths)[np.asarray(rows.active)]
                cache = _with_room(cache, int(in_use.max()) + self.decode_steps)
                cache, rows, emitted = decode(
                    self.config, self.params, self.allowed, cache, rows, stop_ids, jnp.asarray(bool(pending)),
                    sampling=sampling, steps=self.decode_steps,
                )  # fmt: skip
                yield from _by_request(emitted, rows)

    def _admit(
        self,
        cache: Cache,
        rows: Rows,
        admitted: Mapping[int, tuple[int, Sequence[int]]],
        max_new_tokens: int,
        stop: Int[Array, " J"],
        sampling: SamplingConfig,
    ) -> tuple[Rows, Cache, Int[Array, " B"]]:
        """Empties slots, prefills them with prompts, and chooses their first tokens."""
        taken = np.array(sorted(admitted))
        cache = cache.reset(jnp.asarray(taken))
        slots = rows.token.shape[0]
        hidden = jnp.zeros((slots, self.config.hidden_size), self.config.compute_dtype)
        for tokens, segment_ids in self._chunks(slots, {slot: prompt for slot, (_, prompt) in admitted.items()}):
            cache, hidden = prefill(self.config, self.params, cache, hidden, tokens, segment_ids)
        fresh = np.isin(np.arange(slots), taken)
        request = np.array([admitted[slot][0] if slot in admitted else 0 for slot in range(slots)], np.int32)
        rows = replace(
            rows,
            count=jnp.where(fresh, 0, rows.count),
            limit=jnp.where(fresh, max_new_tokens, rows.limit),
            request=jnp.where(fresh, request, rows.request),
        )
        rows, emitted = first_token(
            self.config, self.params, self.allowed, hidden, rows, jnp.asarray(fresh), stop, sampling
        )
        return rows, cache, emitted

    def _chunks(
        self, slots: int, prompts: Mapping[int, Sequence[int]]
    ) -> Iterator[tuple[Int[Array, "B T"], Int[Array, "B T"]]]:
        """Tokens and segment ids of successive prefill chunks, padded on the right."""
        longest = max(map(len, prompts.values()))
        for start in range(0, longest, self.prefill_chunk):
            length = min(power_of_two(longest - start, SMALLEST_CHUNK), self.prefill_chunk)
            tokens = np.zeros((slots, length), np.int32)
            segment_ids = np.zeros((slots, length), np.int32)
            for slot, prompt in prompts.items():
                part = prompt[start : start + length]
                tokens[slot, : len(part)] = part
                segment_ids[slot, : len(part)] = 1
            yield jnp.asarray(tokens), jnp.asarray(segment_ids)

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {i} is empty: a continuation needs at least one token before it")
            if outside := [int(token) for token in prompt if not 0 <= token < self.config.vocab_size]:
                raise ValueError(
                    f"prompt {i} holds id {outside[0]}, outside the vocabulary of {self.config.vocab_size} ids: "
                    "was it made by another tokenizer?"
                )


def _with_room(cache: Cache, needed: int) -> Cache:
    """The cache, grown if a slot may come to hold `needed` tokens."""
    if cache.max_length is None:
        return cache
    return cache.grow(max(cache.max_length, power_of_two(needed, SMALLEST_CACHE)))


def _by_request(emitted: Int[Array, "steps B"], rows: Rows) -> Iterator[tuple[int, list[int]]]:
    """Tokens handed out by slot, under the request that the slot serves."""
    handed, requests = np.asarray(emitted), np.asarray(rows.request)
    for slot, request in enumerate(requests):
        if tokens := [int(token) for token in handed[:, slot] if token >= 0]:
            yield int(request), tokens
