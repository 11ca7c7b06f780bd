"""Held-out loss, perplexity and bits per byte, by source."""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.progress import track

from mmx_jax.config import RunConfig, StageConfig
from mmx_jax.data import DataError, TokenStore, check_store_vocabulary, held_out_batches
from mmx_jax.data.held_out import HeldOutBatches
from mmx_jax.evaluation.model import EvalModel
from mmx_jax.evaluation.task import ALL, TaskResult, register


@dataclass(frozen=True)
class Score:
    """What scoring some text came to; scores add up."""

    nats: float = 0.0
    """Sum of -log p over the scored tokens."""
    tokens: int = 0
    bytes: int = 0
    """UTF-8 bytes of the scored tokens."""

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    def metrics(self) -> dict[str, float]:
        """Loss in nats per token, perplexity per token, bits per UTF-8 byte, and how much was scored."""
        loss = self.nats / self.tokens
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


@dataclass(frozen=True, kw_only=True)
class HeldOutText:
    """Which held-out text a task reads, and in rows of what size."""

    stores: tuple[tuple[str, str], ...]
    """(name, folder of a token store)."""
    sequence_length: int
    """Longest context; documents are cut into windows of so many tokens."""
    batch_size: int = 8
    """Rows of a batch."""
    max_tokens: int | None = None
    """Tokens read per store; None reads all."""

    @staticmethod
    def settings(run: RunConfig, stage: StageConfig) -> dict[str, Any]:
        """The fields of this class for the held-out parts of a stage's sources, at its sequence length."""
        return {
            "stores": unique_stores(stage),
            "sequence_length": stage.sequence_length,
            "batch_size": run.evaluation.batch_size,
            "max_tokens": run.evaluation.max_tokens,
        }

    def batches(self, folder: str, vocab_size: int, rows: int) -> HeldOutBatches:
        """Batches of `rows` rows of one store.

        Raises:
          DataError: the store is missing or damaged, holds out nothing, or has more ids than a model of `vocab_size`.
        """
        store = TokenStore(folder, split="held_out")
        check_store_vocabulary(store, vocab_size)
        return held_out_batches(store, self.sequence_length, rows, self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class HeldOut(HeldOutText):
    """Scores the held-out documents of token stores; bits per byte compares models of different tokenizers."""

    progress: bool = False
    """Shows a progress bar."""

    @classmethod
    def from_config(cls, run: RunConfig, stage: StageConfig) -> "HeldOut":
        """The task on the held-out parts of a stage's sources."""
        return cls(**cls.settings(run, stage))

    def run(self, model: EvalModel) -> TaskResult:
        """Measures a model.

        Raises:
          DataError: a store is missing or damaged, holds out nothing, or has a tokenizer that the model does not fit.
        """
        start = time.monotonic()
        scores = {name: self.score(model, name, folder) for name, folder in self.stores}
        groups = {name: score.metrics() for name, score in scores.items()}
        groups[ALL] = sum(scores.values(), Score()).metrics()
        settings = {name: value for name, value in asdict(self).items() if name != "progress"}
        return TaskResult("held_out", groups, settings, time.monotonic() - start)

    def score(self, model: EvalModel, name: str, folder: str) -> Score:
        """Scores one store."""
        batches = self.batches(folder, model.config.vocab_size, model.batch_rows(self.batch_size))
        if not (batches.tokens_scored and batches.bytes_scored):
            raise DataError(f"{folder}: its held-out part has no text to score; hold out more, or raise max_tokens")
        nats, tokens = 0.0, 0
        for batch in track(batches, f"held-out {name}", len(batches), disable=not self.progress, transient=True):
            scored = batch.loss_mask > 0
            nats -= float(model.loglikelihood(batch)[scored].sum(dtype=np.float64))
            tokens += int(np.count_nonzero(scored))
        return Score(nats, tokens, batches.bytes_scored)


def unique_stores(stage: StageConfig) -> tuple[tuple[str, str], ...]:
    """(source, store) of a stage, each store once: several length buckets of one store share its held-out part."""
    stores: dict[str, str] = {}
    for source in stage.data.sources:
        stores.setdefault(source.store, source.name)
    return tuple((name, store) for store, name in stores.items())


register("held_out", HeldOut)
