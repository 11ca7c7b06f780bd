"""One stage being trained: everything that the loop advances and its hooks look at."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import psutil
from jax.sharding import Mesh

from mmx_jax.config import ModelConfig, RunConfig, ScheduleConfig, StageConfig
from mmx_jax.evaluation import EvalModel, HeldOut, TaskResult
from mmx_jax.flops import peak_flops, training_flops_per_token
from mmx_jax.training.batches import BatchFeed
from mmx_jax.training.errors import NonFiniteError
from mmx_jax.training.progress import Progress
from mmx_jax.training.schedule import learning_rate, sequences_per_step
from mmx_jax.training.state import TrainState
from mmx_jax.training.step import stage_model

Record = dict[str, Any]
"""What is known of one update, as JSON values; one line of metrics.jsonl."""


class Hook:
    """Something that happens beside training. Hooks never change what is trained."""

    def start(self, session: "Session") -> None:
        """Before the first update of a stage."""

    def record(self, session: "Session", record: Record) -> None:
        """When the figures of an update have arrived, while the next one may be running already."""

    def update(self, session: "Session") -> None:
        """After an update was sent to the devices; `session.state` is the one after it."""

    def evaluated(self, session: "Session", result: TaskResult) -> None:
        """When held-out text has been scored."""

    def finish(self, session: "Session") -> None:
        """After the last update of the stage, with all its figures."""

    def close(self) -> None:
        """At the very end, also after an error."""


class Sent(NamedTuple):
    """An update that the devices work on, and whose figures nobody has read yet."""

    progress: Progress
    sequences: int
    learning_rate: float
    metrics: dict[str, jax.Array]


@dataclass(kw_only=True)
class Session:
    """A stage being trained."""

    config: RunConfig
    stage: StageConfig
    schedule: ScheduleConfig
    """The stage's schedule in this round."""
    mesh: Mesh
    workdir: Path
    state: TrainState
    progress: Progress
    feed: BatchFeed
    train_step: Any
    data_fingerprint: str
    tokenizer_sha256: str
    """Of the tokenizer file whose ids the rows hold."""
    hooks: Sequence[Hook] = ()
    _sent: Sent | None = None
    _clock: float | None = None
    """When the figures of the update before arrived; None when something else than training came between."""

    @cached_property
    def model(self) -> ModelConfig:
        """The model as the stage trains it."""
        return stage_model(self.config.model, self.stage)

    @cached_property
    def flops_per_token(self) -> float:
        """Forward and backward FLOPs per token, by the exact count."""
        return training_flops_per_token(self.model, self.stage.sequence_length)

    @property
    def finished(self) -> bool:
        """Whether the budget of the round is used up."""
        return self.progress.tokens >= self.schedule.tokens

    def advance(self) -> None:
        """Sends one update to the devices; reads the figures of the one before while it runs."""
        sequences = sequences_per_step(self.stage.batch, self.progress.tokens)
        rate = learning_rate(self.schedule, self.progress.step, self.progress.tokens)
        micro_batches = sequences // self.stage.batch.micro_batch
        batch = self.feed.next(micro_batches)
        self.state, metrics = self.train_step(self.state, batch, np.int32(micro_batches), np.float32(rate))
        self.progress = self.progress.after(sequences, self.stage.sequence_length)
        sent = Sent(self.progress, sequences, rate, metrics)
        self.settle()
        self._sent = sent

    def settle(self) -> None:
        """Waits for the update that was sent last, if its figures are still out, and hands them to the hooks."""
        if self._sent is None:
            return
        sent, self._sent = self._sent, None
        metrics = jax.device_get(sent.metrics)
        now = time.monotonic()
        seconds = None if self._clock is None else now - self._clock
        self._clock = now
        self.progress = self.progress.counting(bool(metrics["finite"]))
        record = self._record(sent, metrics, seconds)
        for hook in self.hooks:
            hook.record(self, record)

    def evaluate(self) -> TaskResult:
        """Scores held-out text with the present parameters and tells the hooks.

        Raises:
          NonFiniteError: its loss is not finite.
        """
        self.settle()
        result = HeldOut.from_config(self.config, self.stage).run(EvalModel(self.model, self.state.params))
        if not math.isfinite(loss := result.groups["all"]["loss"]):
            raise NonFiniteError(
                f"stage {self.stage.name!r}, after step {self.progress.step}: the loss of the held-out text is {loss}; "
                "lower the learning rate, or look at the model's settings and where it started"
            )
        for hook in self.hooks:
            hook.evaluated(self, result)
        self.pause()
        return result

    def pause(self) -> None:
        """Says that the time until the next update is not training's."""
        self._clock = None

    def _record(self, sent: Sent, metrics: dict[str, np.ndarray], seconds: float | None) -> Record:
        tokens = sent.sequences * self.stage.sequence_length
        speed = tokens / seconds if seconds else None
        peak = peak_flops(jax.devices()[0].device_kind)
        busy = None if speed is None or peak is None else speed * self.flops_per_token / (peak * self.mesh.size)
        names = [source.name for source in self.stage.data.sources]
        by_source = zip(names, metrics["source_loss"], metrics["source_tokens"])
        return {
            "step": sent.progress.step,
            "tokens": sent.progress.tokens,
            "loss": float(metrics["loss"]),
            "aux_loss": float(metrics["aux_loss"]),
            "grad_norm": float(metrics["grad_norm"]),
            "learning_rate": sent.learning_rate,
            "drop_rate": float(metrics["drop_rate"].mean()),
            "lost_rate": float(metrics["lost_rate"].mean()),
            "load_balance": float(metrics["load_balance"].mean()),
            "tokens_per_second": speed,
            "mfu": busy,
            "memory_gib": memory_in_use() / 2**30,
            "skipped": self.progress.skipped,
            "sequences": sent.sequences,
            "source_loss": {name: float(total / count) for name, total, count in by_source if count},
            "drop_rate_by_layer": [round(float(rate), 4) for rate in metrics["drop_rate"]],
            "load_balance_by_layer": [round(float(ratio), 3) for ratio in metrics["load_balance"]],
            "stage": sent.progress.stage,
            "round": sent.progress.round,
            "update": sent.progress.update,
        }


def memory_in_use() -> int:
    """Bytes: the highest use of the first device so far, or of this process where devices do not say."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else psutil.Process().memory_info().rss
