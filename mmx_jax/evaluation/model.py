"""What a task may ask of a model: log-probabilities of given tokens, and continuations."""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

from mmx_jax.config import ModelConfig
from mmx_jax.data import Batch
from mmx_jax.evaluation.likelihood import token_log_probs, vocabulary_chunk
from mmx_jax.inference import GREEDY, Generator, SamplingConfig
from mmx_jax.model import TextModel
from mmx_jax.model.dot import Weight
from parallel.sharding import Rules, constrain


@partial(jax.jit, static_argnames="config")
def _log_probs(config: ModelConfig, params: Mapping[str, Weight], batch: Batch) -> Float[Array, "B T"]:
    model = TextModel(config, params)
    hidden, _, _ = model.backbone(model.embed(batch.tokens), batch.positions, batch.segment_ids)
    chunk = vocabulary_chunk(batch.tokens.size, config.vocab_size)
    scores = token_log_probs(hidden, model.head_weight[...], batch.targets, chunk)
    return constrain(scores, None, None)


class EvalModel:
    """A model as tasks see it; works on the mesh in use (`jax.set_mesh`), or on one device without."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Weight]):
        self.config = config
        self.params = params

    def batch_rows(self, wanted: int) -> int:
        """Rows of a batch: at least `wanted`, and a multiple of the mesh axes that split batches."""
        mesh = jax.sharding.get_abstract_mesh()
        ways = 1
        for axis in () if mesh.empty else Rules().batch:
            ways *= mesh.shape[axis]
        return -(-wanted // ways) * ways

    def loglikelihood(self, batch: Batch) -> Float32[np.ndarray, "B T"]:
        """Natural log-probability of each target given the tokens before it, by dropless routing (INV-23).

        Values where `batch.loss_mask` is 0 mean nothing.
        """
        return np.asarray(_log_probs(self.config, dict(self.params), batch))

    @cached_property
    def _generator(self) -> Generator:
        return Generator(self.config, self.params)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        stop: Sequence[int] = (),
        max_new_tokens: int = 128,
        sampling: SamplingConfig = GREEDY,
    ) -> list[list[int]]:
        """Continuations of prompts of any lengths, as `Generator.generate`."""
        return self._generator.generate(prompts, sampling, max_new_tokens, stop)
