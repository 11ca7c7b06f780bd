"""Which scan a CTA of the Hopper kernel works on: its chunks, the states at its ends and its decay factors."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lightning.mosaic_gpu_plan import HEAD_DIM, Plan, Shape
from pallas_kernels.lightning.mosaic_gpu_segments import AGES, FACTS, Fact

LOG2E = math.log2(math.e)
TILE = plgpu.Layout.WGMMA
ROWS = TILE.reduce(1)
COLUMNS = TILE.reduce(0)


class Cta:
    """The part that the roles of a CTA have in common."""

    def __init__(
        self,
        plan: Plan,
        shape: Shape,
        *,
        operands: list[Any],
        slopes: Any,
        given: dict[str, Any],
        outputs: list[Any],
        states: Any,
        smem: dict[str, Any],
    ) -> None:
        self.plan, self.tuning, self.shape = plan, plan.tuning, shape
        self.operands, self.given, self.outputs, self.states, self.smem = operands, given, outputs, states, smem
        rest = lax.axis_index("cta")
        rest, self.tile = lax.div(rest, shape.tiles), lax.rem(rest, shape.tiles)
        rest, self.job = lax.div(rest, len(plan.jobs)), lax.rem(rest, len(plan.jobs))
        rest, self.head = lax.div(rest, shape.heads), lax.rem(rest, shape.heads)
        self.row, self.piece = lax.div(rest, plan.pieces), lax.rem(rest, plan.pieces)
        self.first = self.piece * shape.per_piece
        self.steps = jnp.minimum(shape.per_piece, shape.chunks - self.first)
        self.rate = slopes[self.head] * LOG2E
        descending = [self.job == i for i, job in enumerate(plan.jobs) if job.descending]
        self.sign = jnp.where(functools.reduce(jnp.logical_or, descending, jnp.bool_(False)), -1, 1)
        # Parts of the state that one wgmma can make: 64 columns of c each.
        self.parts = range(self.tuning.tile // 64)

    def chunk_at(self, step: jax.Array) -> jax.Array:
        """Index of the chunk handled in a step of this scan."""
        return self.first + jnp.where(self.sign > 0, step, self.steps - 1 - step)

    # States in device memory

    def place(self, part: int, *piece: jax.Array) -> tuple[Any, ...]:
        """Where a part of this CTA's state lies in an array of states."""
        return (self.job, self.row, self.head, *piece, pl.ds(self.tile * self.tuning.tile + 64 * part, 64))

    def store_state(self, state: tuple[jax.Array, ...], *piece: jax.Array) -> None:
        for part in self.parts:
            self.states.at[self.place(part, *piece)][...] = state[part]

    def entering_state(self) -> tuple[jax.Array, ...]:
        """The state entering this CTA's piece: the initial one, then what the pieces before it leave, decayed."""

        def read(ref: Any, part: int, *piece: jax.Array) -> jax.Array:
            return plgpu.load(ref.at[self.place(part, *piece)], layout=TILE, optimized=False)

        if "initial" in self.given:
            start = tuple(read(self.given["initial"], part) for part in self.parts)
        else:
            start = tuple(plgpu.layout_cast(jnp.zeros((64, HEAD_DIM), jnp.float32), TILE) for _ in self.parts)
        if "piece_states" not in self.given:
            return start
        before = jnp.where(self.sign > 0, self.piece, self.plan.pieces - 1 - self.piece)

        def add(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            piece = jnp.where(self.sign > 0, i, self.plan.pieces - 1 - i)
            kept = self.transmission(piece)
            return tuple(state[part] * kept + read(self.given["piece_states"], part, piece) for part in self.parts)

        return lax.fori_loop(0, before, add, start)

    def transmission(self, piece: jax.Array) -> jax.Array:
        """What remains of a state that crosses a piece."""
        first = piece * self.shape.per_piece
        end = jnp.minimum(first + self.shape.per_piece, self.shape.chunks)
        if "description" not in self.given:
            c = self.tuning.chunk
            return self.power(jnp.minimum(end * c, self.shape.length) - first * c)
        facts = self.given["description"].at[self.row, :, pl.ds(self.tuning.chunk, FACTS)]
        age = facts[end - 1, Fact.AGE_AFTER] - facts[first, Fact.AGE_BEFORE]
        ascending = facts[end - 1, Fact.LEAVE_ASCENDING] == facts[first, Fact.ENTER_ASCENDING]
        descending = facts[first, Fact.LEAVE_DESCENDING] == facts[end - 1, Fact.ENTER_DESCENDING]
        same = jnp.where(self.sign > 0, ascending.astype(jnp.int32), descending.astype(jnp.int32))
        return self.power(age) * same.astype(jnp.float32)

    # Decay factors

    def power(self, ages: jax.Array) -> jax.Array:
        """lambda to non-negative integer powers, elementwise."""
        return jnp.exp2(ages.astype(jnp.float32) * -self.rate)

    def decay_tile(self) -> jax.Array:
        """M [C, C] of a chunk inside one segment."""
        shape = (self.tuning.chunk, self.tuning.chunk)
        i = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=TILE)
        j = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TILE)
        age = (i - j) * self.sign
        return jnp.where(age >= 0, self.power(jnp.maximum(age, 0)), 0.0)

    def decay_tile_of(self, step: jax.Array, slot: jax.Array) -> jax.Array:
        """M [C, C] of the packed chunk in a slot."""
        shape = (self.tuning.chunk, self.tuning.chunk)

        def spread(x: jax.Array, axis: int) -> jax.Array:
            return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [axis]), TILE)

        i = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=TILE)
        j = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TILE)
        query_ages, query_places = (spread(x, 0) for x in self.tokens_of(self.smem["description"].at[slot], ROWS))
        # From device memory: layout inference does not end when one buffer is read by rows and by columns.
        keys = self.given["description"].at[self.row, self.chunk_at(step)]
        key_ages, key_places = (spread(x, 1) for x in self.tokens_of(keys, COLUMNS))
        ages = plgpu.layout_cast((query_ages - key_ages) * self.sign, TILE)
        seen = (query_places == key_places) & (query_places > 0) & ((i - j) * self.sign >= 0)
        return plgpu.layout_cast(jnp.where(seen, self.power(jnp.maximum(ages, 0)), 0.0), TILE)

    def entering(self, step: jax.Array, slot: jax.Array) -> jax.Array:
        """Weight [C] with which each row of out sees the state entering the chunk."""
        return self.weights(step, slot, self.sign, Fact.ENTER_ASCENDING, Fact.ENTER_DESCENDING)

    def leaving(self, step: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weight [C] of each row of c in the state leaving the chunk, and that of the entering state (a scalar)."""
        weights = self.weights(step, slot, -self.sign, Fact.LEAVE_ASCENDING, Fact.LEAVE_DESCENDING)
        if "description" not in self.given:
            return weights, self.power(self.tokens(step))
        enter = self.by_direction(slot, Fact.ENTER_ASCENDING, Fact.ENTER_DESCENDING)
        leave = self.by_direction(slot, Fact.LEAVE_ASCENDING, Fact.LEAVE_DESCENDING)
        return weights, self.power(self.age(slot)) * (enter == leave).astype(jnp.float32)

    def weights(
        self, step: jax.Array, slot: jax.Array, sign: jax.Array, ascending: Fact, descending: Fact
    ) -> jax.Array:
        """lambda to each row's distance from before the chunk (sign 1) or from its end (-1), where the segment fits."""
        if "description" not in self.given:
            i = plgpu.broadcasted_iota(jnp.int32, (self.tuning.chunk,), 0, layout=ROWS)
            return self.power(jnp.maximum(i * sign + jnp.where(sign > 0, 1, self.tokens(step) - 1), 0))
        ages, places = self.tokens_of(self.smem["description"].at[slot], ROWS)
        end = jnp.where(sign > 0, 0, self.age(slot))
        fits = places == self.by_direction(slot, ascending, descending) - self.fact(slot, Fact.ENTER_ASCENDING) + 1
        return jnp.where(fits, self.power(jnp.maximum((ages - end) * sign, 0)), 0.0)

    def tokens(self, step: jax.Array) -> jax.Array:
        """Tokens in the chunk of a step, fewer than C in a ragged last chunk."""
        c = self.tuning.chunk
        return jnp.minimum(self.shape.length - self.chunk_at(step) * c, c)

    def tokens_of(self, description: Any, layout: Any) -> tuple[jax.Array, jax.Array]:
        """Ages and places [C] of the tokens of a packed chunk."""
        entries = plgpu.load(description.at[pl.ds(0, self.tuning.chunk)], layout=layout, optimized=False)
        places = plgpu.layout_cast(lax.div(entries, AGES), layout)
        return plgpu.layout_cast(entries - places * AGES, layout), places

    def age(self, slot: jax.Array) -> jax.Array:
        """Real tokens of a packed chunk."""
        return self.fact(slot, Fact.AGE_AFTER) - self.fact(slot, Fact.AGE_BEFORE)

    def fact(self, slot: jax.Array, fact: Fact) -> jax.Array:
        return self.smem["description"][slot, self.tuning.chunk + fact]

    def by_direction(self, slot: jax.Array, ascending: Fact, descending: Fact) -> jax.Array:
        return jnp.where(self.sign > 0, self.fact(slot, ascending), self.fact(slot, descending))
