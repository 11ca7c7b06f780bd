"""What the CTAs of the Hopper kernels have in common: launch and roles, the chunks of their scan, its decay factors."""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lightning.mosaic_gpu_plan import Gather, Plan, Shape
from pallas_kernels.lightning.mosaic_gpu_segments import AGES, Fact

LOG2E = math.log2(math.e)
TILE = plgpu.Layout.WGMMA
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
ROWS = TILE.reduce(1)
COLUMNS = TILE.reduce(0)
Role = tuple[Callable[[], None], int, Any]
"""What a warpgroup does, the registers of its threads, and whether they are an "increase" or a "decrease"."""


def launch(
    name: str,
    cta: "type[Cta]",
    plan: Plan | Gather,
    shape: Shape,
    operands: Sequence[jax.Array],
    slopes: jax.Array,
    optional: Mapping[str, jax.Array | None],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    scratch: Mapping[str, Any] | None = None,
    warpgroups: int | None = None,
) -> list[jax.Array]:
    """Runs a kernel.

    Args:
        name: of the kernel, for profiles.
        cta: its body.
        plan, shape: what it computes, and how the work is cut into CTAs.
        operands, slopes: arrays that it reads in any case.
        optional: those that it may read, by the names under which the body finds what was given.
        results: what it writes; the states last.
        scratch: shared memory and barriers, by name.
        warpgroups: how many a CTA has; None for one without roles.
    """
    given = {key: array for key, array in optional.items() if array is not None}

    def body(*refs: Any, **smem: Any) -> None:
        taken = iter(refs)
        cta(
            plan,
            shape,
            operands=[next(taken) for _ in operands],
            slopes=next(taken),
            given={key: next(taken) for key in given},
            outputs=[next(taken) for _ in results[:-1]],
            states=next(taken),
            smem=smem,
        ).run()

    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=list(results),
        scratch_types=dict(scratch or {}),
        grid=(shape.batch * shape.heads * shape.ctas * len(plan.jobs) * shape.tiles,),
        grid_names=("cta",),
        num_threads=warpgroups,
        thread_name=None if warpgroups is None else "warpgroup",
        # A barrier around every store and copy would be most of a short step; the roles say where one is needed.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0, unsafe_no_auto_barriers=True),
    )(*operands, slopes, *given.values())


class Cta(ABC):
    """The part that the roles of a CTA have in common."""

    WEIGHTS_LAYOUT = ROWS
    """Of the weights of tokens in the state that leaves: those of a tile's rows, or of a transposed one's columns."""

    def __init__(
        self,
        plan: Plan | Gather,
        shape: Shape,
        *,
        operands: list[Any],
        slopes: Any,
        given: dict[str, Any],
        outputs: list[Any],
        states: Any,
        smem: dict[str, Any],
    ) -> None:
        self.plan, self.shape, self.chunk = plan, shape, plan.chunk
        self.operands, self.given, self.outputs, self.states, self.smem = operands, given, outputs, states, smem
        rest = lax.axis_index("cta")
        rest, self.tile = lax.div(rest, shape.tiles), lax.rem(rest, shape.tiles)
        rest, self.job = lax.div(rest, len(plan.jobs)), lax.rem(rest, len(plan.jobs))
        rest, self.head = lax.div(rest, shape.heads), lax.rem(rest, shape.heads)
        self.row, self.part = lax.div(rest, shape.ctas), lax.rem(rest, shape.ctas)
        descending = [self.job == i for i, job in enumerate(plan.jobs) if job.descending]
        self.sign = jnp.where(functools.reduce(jnp.logical_or, descending, jnp.bool_(False)), -1, 1)
        self.piece = lax.div(self.part, shape.split) + jnp.where(self.sign > 0, 0, shape.skipped)
        self.first, end = self.chunks_of(self.piece, lax.rem(self.part, shape.split))
        # Kept from the compiler: were it known to be 1, as for 64 tokens, layout inference would find no solution.
        self.steps = lax.optimization_barrier(end - self.first)
        self.rate = slopes[self.head] * LOG2E
        self.packed = "description" in given
        # Whether a last chunk is shorter than the others and nothing else tells it from them.
        self.ragged = not self.packed and shape.length % self.chunk > 0

    @abstractmethod
    def run(self) -> None:
        """Does the work of the CTA."""

    def share(self, roles: Sequence[Role]) -> None:
        """Gives every warpgroup its role."""
        warpgroup = lax.axis_index("warpgroup")
        for i, (role, registers, action) in enumerate(roles):

            @pl.when(warpgroup == i)
            def _(role: Any = role, registers: int = registers, action: Any = action) -> None:
                plgpu.set_max_registers(registers, action=action)
                role()

        # A warpgroup that exits while another issues wgmma faults, so all leave together.
        plgpu.barrier_arrive(self.smem["done"])
        plgpu.barrier_wait(self.smem["done"])

    def drain(self, barrier: Any, count: int) -> None:
        """Waits for the arrivals of the last `count` steps: every phase must be seen before the CTA ends."""

        @pl.loop(jnp.maximum(self.steps - count, 0), self.steps)
        def _(step: jax.Array) -> None:
            plgpu.barrier_wait(barrier.at[lax.rem(step, count)])

    def chunks_of(self, piece: jax.Array, part: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First chunk of a part of a piece, and the one after its last."""
        shape = self.shape
        first = piece * shape.per_piece + part * shape.per_part
        return first, jnp.minimum(first + shape.per_part, jnp.minimum((piece + 1) * shape.per_piece, shape.chunks))

    def chunk_at(self, step: jax.Array) -> jax.Array:
        """Index of the chunk handled in a step of this scan."""
        return self.first + jnp.where(self.sign > 0, step, self.steps - 1 - step)

    @staticmethod
    def terms(x: jax.Array, count: int, dtype: Any) -> Iterator[jax.Array]:
        """Terms of low precision whose sum is x, each what rounding left of the one before."""
        for _ in range(count):
            # The barrier has pairs converted together: the compiler's conversions of one number each are slower.
            rounded = lax.optimization_barrier(x.astype(dtype))
            yield rounded
            x -= rounded.astype(jnp.float32)

    # Decay factors

    def power(self, ages: jax.Array) -> jax.Array:
        """lambda to non-negative integer powers, elementwise."""
        return jnp.exp2(ages.astype(jnp.float32) * -self.rate)

    def decay_tile(self) -> jax.Array:
        """M [C, C] of a chunk inside one segment."""
        shape = (self.chunk, self.chunk)
        i = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=TILE)
        j = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TILE)
        age = (i - j) * self.sign
        return jnp.where(age >= 0, self.power(jnp.maximum(age, 0)), 0.0)

    def decay_tile_of(self, step: jax.Array, slot: jax.Array) -> jax.Array:
        """M [C, C] of the packed chunk in a slot."""
        shape = (self.chunk, self.chunk)

        def spread(x: jax.Array, axis: int) -> jax.Array:
            return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [axis]), TILE)

        queries = spread(self.entries_of(step, slot, ROWS), 0)
        keys = spread(self.entries_of(step, slot, COLUMNS), 1)
        # Tokens of different places are further apart than any two of one place, also where one is padding.
        age = plgpu.layout_cast((queries - keys) * self.sign, TILE)
        seen = (age >= 0) & (age < AGES // 2) & (queries >= AGES)
        return plgpu.layout_cast(jnp.where(seen, self.power(jnp.where(seen, age, 0)), 0.0), TILE)

    def factors(
        self, step: jax.Array, slot: jax.Array, whole: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, jax.Array]:
        """What `leaving` says of the chunk of a step, in a slot; `whole` is that of whole chunks of one segment."""
        if whole is None:
            return self.leaving(self.tokens(step))
        if not self.packed:
            return whole
        return lax.cond(self.plain(slot), lambda: whole, lambda: self.leaving_packed(step, slot))

    def entering(self, tokens: jax.Array | int) -> jax.Array:
        """Weight [C] with which each row of out sees the state entering a chunk of so many tokens of one segment."""
        return self.weights(self.sign, tokens, ROWS)

    def leaving(self, tokens: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Weight [C] of each token in the state leaving such a chunk, and that of the entering state (a scalar)."""
        return self.weights(-self.sign, tokens, self.WEIGHTS_LAYOUT), self.power(jnp.int32(tokens))

    def weights(self, sign: jax.Array, tokens: jax.Array | int, layout: Any) -> jax.Array:
        """lambda to each token's distance from before the chunk (sign 1) or from its end (-1)."""
        i = plgpu.broadcasted_iota(jnp.int32, (self.chunk,), 0, layout=layout)
        return self.power(jnp.maximum(i * sign + jnp.where(sign > 0, 1, tokens - 1), 0))

    def entering_packed(self, step: jax.Array, slot: jax.Array) -> jax.Array:
        """The same as `entering` for the packed chunk of a step, in a slot."""
        return self.weights_packed(step, slot, self.sign, Fact.ENTER_ASCENDING, Fact.ENTER_DESCENDING, ROWS)

    def leaving_packed(self, step: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same as `leaving` for the packed chunk of a step, in a slot."""
        weights = self.weights_packed(
            step, slot, -self.sign, Fact.LEAVE_ASCENDING, Fact.LEAVE_DESCENDING, self.WEIGHTS_LAYOUT
        )
        enter = self.by_direction(slot, Fact.ENTER_ASCENDING, Fact.ENTER_DESCENDING)
        leave = self.by_direction(slot, Fact.LEAVE_ASCENDING, Fact.LEAVE_DESCENDING)
        return weights, self.power(self.age(slot)) * (enter == leave).astype(jnp.float32)

    def weights_packed(
        self, step: jax.Array, slot: jax.Array, sign: jax.Array, ascending: Fact, descending: Fact, layout: Any
    ) -> jax.Array:
        """lambda to each token's distance from before the chunk (sign 1) or its end (-1), where the segment fits."""
        entries = self.entries_of(step, slot, layout)
        places = plgpu.layout_cast(lax.div(entries, AGES), layout)
        ages = plgpu.layout_cast(entries - places * AGES, layout)
        end = jnp.where(sign > 0, 0, self.age(slot))
        fits = places == self.by_direction(slot, ascending, descending) - self.fact(slot, Fact.ENTER_ASCENDING) + 1
        return jnp.where(fits, self.power(jnp.maximum((ages - end) * sign, 0)), 0.0)

    def tokens(self, step: jax.Array) -> jax.Array:
        """Tokens in the chunk of a step, fewer than C in a ragged last chunk."""
        c = self.chunk
        return jnp.minimum(self.shape.length - self.chunk_at(step) * c, c)

    def entries_of(self, step: jax.Array, slot: jax.Array, layout: Any) -> jax.Array:
        """What the description of the packed chunk of a step, in a slot, says of its tokens, [C]."""
        if layout == ROWS:
            description = self.smem["description"].at[slot]
        else:  # from device memory: layout inference does not end when one buffer is read by rows and by columns
            description = self.given["description"].at[self.row, self.chunk_at(step)]
        return plgpu.load(description.at[pl.ds(0, self.chunk)], layout=layout, optimized=False)

    def plain(self, slot: jax.Array) -> jax.Array:
        """Whether a packed chunk and the states at its ends belong to one segment."""
        return self.fact(slot, Fact.PLAIN) == 1

    def age(self, slot: jax.Array) -> jax.Array:
        """Real tokens of a packed chunk."""
        return self.fact(slot, Fact.AGE_AFTER) - self.fact(slot, Fact.AGE_BEFORE)

    def fact(self, slot: jax.Array, fact: Fact) -> jax.Array:
        return self.smem["description"][slot, self.chunk + fact]

    def by_direction(self, slot: jax.Array, ascending: Fact, descending: Fact) -> jax.Array:
        return jnp.where(self.sign > 0, self.fact(slot, ascending), self.fact(slot, descending))
