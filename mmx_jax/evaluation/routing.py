"""How many routed slots a capacity factor would drop, shared by the whole batch or by each device (recipe §4.7)."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmx_jax.config import ConfigError, ModelConfig, RunConfig, StageConfig
from mmx_jax.data import Batch
from mmx_jax.evaluation.held_out import HeldOutText
from mmx_jax.evaluation.model import EvalModel
from mmx_jax.evaluation.task import ALL, TaskResult, register
from mmx_jax.model import TextModel
from mmx_jax.model.dot import Weight
from parallel.experts import expert_capacity


@dataclass(frozen=True, kw_only=True)
class Routing(HeldOutText):
    """Counts the routed slots of held-out rows, and what capacity would drop of them: all rows of a batch share one.

    The routing itself is dropless: every layer sees what it would see without capacity.
    """

    capacity_factors: tuple[float, ...] = (1.0, 1.1, 1.25, 1.5, 2.0)
    shards: tuple[int, ...] = (2, 4, 8)
    """Into how many equal parts the rows are cut for local capacities; those that do not divide them are left out."""

    @classmethod
    def from_config(cls, run: RunConfig, stage: StageConfig) -> "Routing":
        """The task on the held-out parts of a stage's sources."""
        return cls(**cls.settings(run, stage))

    def run(self, model: EvalModel) -> TaskResult:
        """Measures a model: by capacity factor, the share of slots dropped with global and with local capacities.

        Raises:
          ConfigError: the model has no experts.
          DataError: a store is missing or damaged, or has a tokenizer that the model does not fit.
        """
        if not model.config.num_experts:
            raise ConfigError("task 'routing': the model has no experts")
        start = time.monotonic()
        batches = [counts for _, folder in self.stores for counts in self._counts(model, folder)]
        slots = sum(int(counts.sum()) for counts, _ in batches)
        shards = [1, *(parts for parts in self.shards if self.batch_size % parts == 0)]
        names = ["global" if parts == 1 else f"local_{parts}" for parts in shards]
        k = model.config.experts_per_token
        groups: dict[str, Mapping[str, float]] = {}
        for factor in self.capacity_factors:
            dropped = [sum(dropped_slots(*batch, factor, k, parts) for batch in batches) for parts in shards]
            groups[f"capacity {factor}"] = dict(zip(names, (count / slots for count in dropped)))
        groups[ALL] = {"slots": slots, "batches": len(batches)}
        return TaskResult("routing", groups, asdict(self), time.monotonic() - start)

    def _counts(self, model: EvalModel, folder: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Slots [B, L, E] and tokens [B] of each batch of a store; a last one that is not full is left out."""
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in self.batches(folder, model.config.vocab_size, self.batch_size):
            tokens = (batch.segment_ids != 0).sum(axis=1)
            if found and not tokens.all():
                break
            share = np.asarray(_loads(model.config, dict(model.params), batch), np.float64)
            slots = share * tokens[:, None, None] * model.config.experts_per_token
            found.append((np.rint(slots).astype(np.int64), tokens))
        return found


@partial(jax.jit, static_argnames="config")
def _loads(config: ModelConfig, params: Mapping[str, Weight], batch: Batch) -> Float[Array, "B L E"]:
    """Share of each row's slots that each expert receives; a row's routing does not depend on the others."""
    model = TextModel(config, params)

    def row(inputs: tuple[Array, Array, Array]) -> Array:
        tokens, positions, segment_ids = (x[None] for x in inputs)
        _, aux, _ = model.backbone(model.embed(tokens), positions, segment_ids)
        return aux.load

    return jax.lax.map(row, jax.tree.map(jnp.asarray, (batch.tokens, batch.positions, batch.segment_ids)))


def dropped_slots(
    slots: Int[np.ndarray, "B L E"], tokens: Int[np.ndarray, " B"], factor: float, experts_per_token: int, shards: int
) -> int:
    """Slots over capacity, when each of `shards` equal groups of consecutive rows has its own.

    Args:
      slots: slots of each expert, by row and layer.
      tokens: real tokens of each row.
      factor: capacity factor.
      experts_per_token: slots of a token.
      shards: 1 is the global capacity.
    """
    B, L, E = slots.shape
    share = Fraction(str(factor)) * experts_per_token / E
    waiting = slots.reshape(shards, B // shards, L, E).sum(axis=1)
    capacity = np.array([expert_capacity(share, int(count)) for count in tokens.reshape(shards, -1).sum(axis=1)])
    return int(np.maximum(waiting - capacity[:, None, None], 0).sum())


register("routing", Routing)
