"""The states that pieces of a sequence leave behind on their own, on Hopper: what CTAs that start amid one begin with.

A piece leaves `sum_t lambda^(tokens after t) c_t b_t^T`. A CTA walks one piece of one head from the end at which the
state leaves: weights only shrink on the way, so that the sum stays in the accumulators of the matrix units, and the
chunks read last, which are still in the cache, are those that a scan begins with. Two warpgroups share each chunk, for
64 columns of c each; where they also take the transposed state (64 columns of b each), no byte is read for it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import tiles
from pallas_kernels.lightning.mosaic_gpu_cta import TILE, Cta, Role, launch
from pallas_kernels.lightning.mosaic_gpu_plan import HEAD_DIM, Gather, Job, Shape
from pallas_kernels.lightning.mosaic_gpu_segments import FACTS, Fact

HALVES = 2
SLAB = 8
"""Rows of a state that a CTA sums."""
AHEAD = 16
"""States that are being read while one is added."""
BUFFERS = 2
"""Chunks whose weighted columns are in shared memory: while one is multiplied the next one is written."""


def gather(
    plan: Gather,
    operands: Sequence[jax.Array],
    slopes: jax.Array,
    *,
    length: int,
    description: jax.Array | None = None,
) -> jax.Array:
    """Returns the states of the pieces of every sequence, in one launch.

    Args:
        plan: what to take.
        operands: bf16 [B, T, N, 128], T a multiple of 8; the jobs name them by position.
        slopes: [N] fp32; one token decays a state by exp(-slope).
        length: tokens that count; those past it are zeros.
        description: what `mosaic_gpu_segments.describe` says of packed rows; None when all tokens are of one segment.

    Returns:
        [J, B, N, P, 128, 128] fp32, for each job its states (c dim, b dim), followed by the transposed ones where the
        plan asks for them. P counts the parts of pieces, without the last piece of each scan where the plan skips it.

    Raises:
        ValueError: some part would be empty.
    """
    batch, _, heads, dim = operands[0].shape
    shape = _shape(plan, batch, heads, length)
    states = jax.ShapeDtypeStruct((len(plan.jobs) * plan.orientations, batch, heads, shape.ctas, dim, dim), jnp.float32)
    (found,) = launch(
        "lightning_states",
        _Gather,
        plan,
        shape,
        operands,
        slopes,
        {"description": description},
        [states],
        scratch=_scratch(plan, operands[0].dtype, packed=description is not None),
        warpgroups=HALVES + 1,
    )
    return found


def enter(
    plan: Gather,
    jobs: Sequence[Job],
    states: jax.Array,
    slopes: jax.Array,
    *,
    length: int,
    description: jax.Array | None = None,
    initial: jax.Array | None = None,
) -> jax.Array:
    """Returns the state entering each piece of each job's scan, in one launch: the sum of those before it, decayed.

    Args:
        plan: the launch that took the states, without the last piece of each scan.
        jobs: what the leading axis of `states` stands for.
        states: [J, B, N, .., 128, 128], what `gather` returned.
        slopes, length, description: as given to it.
        initial: [J, B, N, 128, 128] fp32 state entering each scan; None for zeros.

    Returns:
        [J, B, N, P, 128, 128] fp32.
    """
    count, batch, heads, _, dim, _ = states.shape
    shape = dataclasses.replace(_shape(plan, batch, heads, length), tiles=dim // SLAB, ctas=1)
    (entering,) = launch(
        "lightning_enter",
        _Sum,
        dataclasses.replace(plan, jobs=tuple(jobs)),
        shape,
        [states],
        slopes,
        {"description": description, "initial": initial},
        [jax.ShapeDtypeStruct((count, batch, heads, plan.pieces, dim, dim), jnp.float32)],
    )
    return entering


def _shape(plan: Gather, batch: int, heads: int, length: int) -> Shape:
    chunks, skipped = -(-length // plan.chunk), int(plan.skip_last)
    ctas = (plan.pieces - skipped) * plan.split
    shape = Shape(batch, length, heads, 1, chunks, -(-chunks // plan.pieces), ctas, plan.split, skipped)
    before_last = shape.per_part * (plan.split - 1)
    if before_last >= shape.per_piece or shape.per_piece * (plan.pieces - 1) + before_last >= chunks:
        raise ValueError(f"{chunks} chunks cannot be cut into {plan.pieces} pieces of {plan.split} parts")
    return shape


class _Sum(Cta):
    """A CTA that sums some rows of one head's states, piece after piece."""

    plan: Gather

    def run(self) -> None:
        """Stores the rows that enter each piece, in the order of the scan."""
        pieces, split = self.plan.pieces, self.plan.split
        rows, place = pl.ds(self.tile * SLAB, SLAB), (self.job, self.row, self.head)
        parts = (pieces - 1) * split

        def load(i: int) -> jax.Array:
            return self.operands[0][(*place, self.ordered(i, parts), rows)]

        found = [load(i) for i in range(min(AHEAD, parts))]
        if "initial" in self.given:
            state = self.given["initial"][(*place, rows)]
        else:
            state = jnp.zeros((SLAB, HEAD_DIM), jnp.float32)
        self.states[(*place, self.ordered(0, pieces), rows)] = state
        for i in range(parts):
            if i + AHEAD < parts:
                found.append(load(i + AHEAD))
            piece, part = divmod(i, split)
            state = state * self.transmission(self.ordered(piece, pieces), self.ordered(part, split)) + found[i]
            if part == split - 1:
                self.states[(*place, self.ordered(piece + 1, pieces), rows)] = state

    def ordered(self, index: int, count: int) -> jax.Array:
        """Where in reading order the scan is after `index` of `count` steps."""
        return jnp.where(self.sign > 0, index, count - 1 - index)

    def transmission(self, piece: jax.Array, part: jax.Array) -> jax.Array:
        """What remains of a state that crosses a part of a piece."""
        first, end = self.chunks_of(piece, part)
        if not self.packed:
            return self.power(jnp.minimum(end * self.chunk, self.shape.length) - first * self.chunk)
        facts = self.given["description"].at[self.row, :, pl.ds(self.chunk, FACTS)]
        age = facts[end - 1, Fact.AGE_AFTER] - facts[first, Fact.AGE_BEFORE]
        ascending = facts[end - 1, Fact.LEAVE_ASCENDING] == facts[first, Fact.ENTER_ASCENDING]
        descending = facts[first, Fact.LEAVE_DESCENDING] == facts[end - 1, Fact.ENTER_DESCENDING]
        same = jnp.where(self.sign > 0, ascending.astype(jnp.int32), descending.astype(jnp.int32))
        return self.power(age) * same.astype(jnp.float32)


def _scratch(plan: Gather, dtype: Any, *, packed: bool) -> dict[str, Any]:
    """Shared memory and barriers of one CTA."""
    scratch = {
        "b": tiles(dtype, plan.stages, plan.chunk, HEAD_DIM),
        "c": tiles(dtype, plan.stages, plan.chunk, HEAD_DIM),
        "weighted": tiles(dtype, HALVES, BUFFERS, plan.orientations, plan.terms, plan.chunk, HEAD_DIM // HALVES),
        "full": plgpu.Barrier(num_arrivals=2 + packed, num_barriers=plan.stages),
        "empty": plgpu.Barrier(num_arrivals=HALVES, num_barriers=plan.stages),
        "done": plgpu.Barrier(num_arrivals=HALVES + 1),
    }
    if packed:
        scratch["description"] = plgpu.SMEM((plan.stages, plan.chunk + FACTS), jnp.int32)
    return scratch


class _Gather(Cta):
    """The body of one CTA: a method for each role."""

    plan: Gather

    def run(self) -> None:
        """Gives every warpgroup its role."""
        sums, loader = self.plan.registers
        halves: list[Role] = [(functools.partial(self.add_up, half), sums, "increase") for half in range(HALVES)]
        self.share([*halves, (self.load, loader, "decrease")])

    def chunk_at(self, step: jax.Array) -> jax.Array:
        """Index of the chunk handled in a step: from the end at which the state leaves."""
        return self.first + jnp.where(self.sign > 0, self.steps - 1 - step, step)

    def load(self) -> None:
        """Streams the chunks of b and c."""
        stages, smem = self.plan.stages, self.smem

        @pl.loop(0, self.steps)
        def _(step: jax.Array) -> None:
            slot = lax.rem(step, stages)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(smem["empty"].at[slot]))
            full, chunk = smem["full"].at[slot], self.chunk_at(step)
            rows = pl.ds(chunk * self.plan.chunk, self.plan.chunk)
            for i, job in enumerate(self.plan.jobs):

                @pl.when(self.job == i)
                def _(job: Any = job) -> None:
                    for name, operand in (("b", job.b), ("c", job.c)):
                        source = self.operands[operand].at[self.row, rows, self.head]
                        plgpu.copy_gmem_to_smem(source, smem[name].at[slot], full)

            if self.packed:
                source = self.given["description"].at[self.row, chunk]
                plgpu.copy_gmem_to_smem(source, smem["description"].at[slot], full)

        self.drain(smem["empty"], stages)

    def add_up(self, half: int) -> None:
        """Adds up half of the state, and of the transposed one."""
        plan, stages, smem = self.plan, self.plan.stages, self.smem
        columns = pl.ds(HEAD_DIM // HALVES * half, HEAD_DIM // HALVES)
        pairs = [(smem["c"], smem["b"]), (smem["b"], smem["c"])][: plan.orientations]
        products = plan.orientations * plan.terms
        whole = None if self.ragged else self.leaving(plan.chunk)

        def free(step: jax.Array) -> None:
            plgpu.barrier_arrive(smem["empty"].at[lax.rem(step, stages)])

        def add_chunk(step: jax.Array, crossed: jax.Array, sums: tuple[Any, ...]) -> jax.Array:
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(smem["full"].at[slot])
            weights, kept = self.factors(step, slot, whole)
            weights *= crossed
            wides = []
            for left, _ in pairs:
                wide = plgpu.load(left.at[slot, :, columns], layout=TILE, optimized=False).astype(jnp.float32)
                wides.append(wide * lax.broadcast_in_dim(weights, wide.shape, [0]))
            plgpu.wgmma_wait(products)
            pl.when(step >= BUFFERS)(lambda: free(step - BUFFERS))
            # A barrier, too: no warp is still multiplying what is written now.
            plgpu.commit_smem()
            weighted = smem["weighted"].at[half, lax.rem(step, BUFFERS)]
            for i, wide in enumerate(wides):
                for term, rounded in enumerate(self.terms(wide, plan.terms, weighted.dtype)):
                    weighted.at[i, term][...] = rounded
            plgpu.commit_smem()
            for i, (_, right) in enumerate(pairs):
                for term in range(plan.terms):
                    plgpu.wgmma(sums[i], weighted.at[i, term].T, right.at[slot])
            return crossed * kept

        def walk(*sums: Any) -> tuple[jax.Array, ...]:
            lax.fori_loop(0, self.steps, functools.partial(add_chunk, sums=sums), jnp.float32(1))
            return tuple(one[...] for one in sums)

        accumulators = [plgpu.ACC((HEAD_DIM // HALVES, HEAD_DIM), jnp.float32)] * plan.orientations
        states = lax.optimization_barrier(pl.run_scoped(walk, *accumulators))
        pl.loop(jnp.maximum(self.steps - BUFFERS, 0), self.steps)(free)
        for i, state in enumerate(states):
            index = self.job * plan.orientations + i
            self.states.at[index, self.row, self.head, self.part, columns][...] = state
