"""What a forward pass remembers of earlier tokens: lightning states (fp32), keys and values of softmax layers."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mmx_jax.config import LIGHTNING, ModelConfig
from mmx_jax.model.plan import layer_plan

SLOT_DIM = 2
"""Dimension of the slots in the stacked arrays [groups, run length, B, ...]."""

STATE_AXES = (None, None, "batch", "heads", None, None)
KEY_VALUE_AXES = (None, None, "batch", None, "kv_heads", None)


@partial(jax.tree_util.register_dataclass, data_fields=("lengths", "states", "keys", "values"), meta_fields=())
@dataclass(frozen=True)
class Cache:
    """B slots, each with its own number of tokens; arrays are stacked by section and run as the weights are.

    A pytree, so leaves may also be shapes or shardings.
    """

    lengths: Any
    """int32 [B]: tokens that each slot holds."""
    states: dict[str, Any]
    """Lightning states [groups, run length, B, N, H (k dim), H (v dim)], fp32, convention (a) of model.md 4.5."""
    keys: dict[str, Any]
    """[groups, run length, B, S, K, H]."""
    values: dict[str, Any]
    """[groups, run length, B, S, K, H]."""

    @classmethod
    def init(cls, config: ModelConfig, slots: int, max_length: int, kv_dtype: str = "bfloat16") -> "Cache":
        """An empty cache for `slots` rows of at most `max_length` tokens (pure lightning models have no such limit)."""
        states, keys, values = {}, {}, {}
        for s, section in enumerate(layer_plan(config)):
            for r, run in enumerate(section.runs):
                stack = (section.groups, run.length, slots)
                if run.kind == LIGHTNING:
                    states[f"{s}/{r}"] = jnp.zeros((*stack, config.num_heads, config.head_dim, config.head_dim))
                else:
                    shape = (*stack, max_length, config.num_kv_heads, config.head_dim)
                    keys[f"{s}/{r}"] = jnp.zeros(shape, kv_dtype)
                    values[f"{s}/{r}"] = jnp.zeros(shape, kv_dtype)
        return cls(jnp.zeros((slots,), jnp.int32), states, keys, values)

    @property
    def max_length(self) -> int | None:
        """Tokens that a slot can hold; None without softmax layers."""
        return next((keys.shape[SLOT_DIM + 1] for keys in self.keys.values()), None)

    def positions(self, segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """Absolute positions of new tokens (INV-33); padding repeats the position of the token before it."""
        rank = jnp.cumsum((segment_ids != 0).astype(jnp.int32), axis=1) - 1
        return jnp.maximum(self.lengths[:, None] + rank, 0)

    def reset(self, slots: Int[Array, " J"]) -> "Cache":
        """Empties the slots: a reused slot behaves as a fresh one (INV-35). Old keys stay, unseen until overwritten."""
        states = {name: state.at[:, :, slots].set(0.0) for name, state in self.states.items()}
        return replace(self, lengths=self.lengths.at[slots].set(0), states=states)

    def reorder(self, indices: Int[Array, " J"]) -> "Cache":
        """The cache whose slot j is slot `indices[j]` of this one, in states, keys, values and lengths (INV-35)."""
        return jax.tree.map(lambda x: x[indices] if x.ndim == 1 else jnp.take(x, indices, axis=SLOT_DIM), self)

    def grow(self, max_length: int) -> "Cache":
        """The same cache with room for `max_length` tokens a slot.

        Raises:
          ValueError: if that is less room than there is.
        """
        if self.max_length is None or max_length == self.max_length:
            return self
        if max_length < self.max_length:
            raise ValueError(f"a cache of {self.max_length} tokens cannot shrink to {max_length}")
        pad = [(0, 0)] * 6
        pad[SLOT_DIM + 1] = (0, max_length - self.max_length)
        widen = partial(jnp.pad, pad_width=pad)
        return replace(self, keys=jax.tree.map(widen, self.keys), values=jax.tree.map(widen, self.values))
