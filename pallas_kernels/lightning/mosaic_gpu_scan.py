"""The Hopper kernel that lightning attention is made of: a decayed scan over chunks with the state on chip.

A job is `out_i = sum_j lambda^|i-j| (a_i . b_j) c_j` over j <= i (j >= i when it descends), which with the operands
in different places is the forward and each of the three gradients. A CTA scans one head of one job, for `tile` columns
of c and for one piece of the sequence, and runs as warpgroups:

- the loader streams chunks of a, b and c into a ring of shared-memory stages (TMA; the arrays stay [B, T, N, H]);
- the state warpgroup keeps S^T [tile, H] in fp32 registers, publishes in bf16 the state entering each chunk, and adds
  the chunk: S^T = lambda^C S^T + (decayed c)^T b;
- the output warpgroups take turns at the chunks: P = (a b^T) * M, out = rows * (a S) + P c.

The decay tile M is built once per CTA in registers; no exponent is ever positive. Bytes through shared memory and the
state warpgroup's chain of operations are what a step takes: left operands of products (P, decayed c transposed, of
unpacked rows also a) stay in registers, and the state grows in the accumulators of the matrix units. The interpreter
multiplies only from shared memory and starts accumulators from zero: for it a `staged` twin of the kernel lays these
operands there and adds the chunk's sum to the state in fp32; it is otherwise the same. For 64 columns in two terms it
does not fit into a multiprocessor.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import tiles
from pallas_kernels.lightning.mosaic_gpu_cta import COLUMNS, TILE, TRANSPOSED, Cta, Role, launch
from pallas_kernels.lightning.mosaic_gpu_plan import HEAD_DIM, Job, Plan, Shape
from pallas_kernels.lightning.mosaic_gpu_segments import FACTS


def scan(
    plan: Plan,
    operands: Sequence[jax.Array],
    slopes: jax.Array,
    *,
    length: int,
    description: jax.Array | None = None,
    entering: jax.Array | None = None,
    transposed: bool = False,
) -> tuple[list[jax.Array], jax.Array]:
    """Runs the jobs of a plan in one launch.

    Args:
        plan: what to run.
        operands: bf16 [B, T, N, 128], T a multiple of 8; the jobs name them by position.
        slopes: [N] fp32; one token decays a state by exp(-slope).
        length: tokens that count; those past it are zeros.
        description: what `mosaic_gpu_segments.describe` says of packed rows; None when all tokens are of one segment.
        entering: [J, B, N, P, 128, 128] fp32 state entering each piece of each job's scan, indexed (c dim, b dim); None
            for zeros.
        transposed: the entering states are indexed (b dim, c dim) instead.

    Returns:
        One [B, T, N, 128] array per job, and the fp32 states [J, B, N, 128, 128] after each job's scan.

    Raises:
        ValueError: some piece would be empty.
    """
    batch, _, heads, dim = operands[0].shape
    tuning = plan.tuning
    chunks = -(-length // tuning.chunk)
    shape = Shape(batch, length, heads, dim // tuning.tile, chunks, -(-chunks // plan.pieces), plan.pieces)
    if shape.per_piece * (plan.pieces - 1) >= chunks:
        raise ValueError(f"{chunks} chunks cannot be cut into {plan.pieces} pieces of {shape.per_piece}")
    jobs = len(plan.jobs)
    outputs = [jax.ShapeDtypeStruct(operands[0].shape, operands[0].dtype)] * jobs
    states = jax.ShapeDtypeStruct((jobs, batch, heads, dim, dim), jnp.float32)
    *results, last = launch(
        "lightning_scan",
        _Scan,
        plan,
        shape,
        operands,
        slopes,
        {"description": description, "entering_transposed" if transposed else "entering": entering},
        [*outputs, states],
        scratch=_scratch(plan, operands[0].dtype, packed=description is not None),
        warpgroups=plan.warpgroups,
    )
    return results, last


def _scratch(plan: Plan, dtype: Any, *, packed: bool) -> dict[str, Any]:
    """Shared memory and barriers of one CTA."""
    tuning = plan.tuning
    c, tile, stages = tuning.chunk, tuning.tile, tuning.stages
    scratch = {
        "a": tiles(dtype, stages, c, HEAD_DIM),
        "b": tiles(dtype, stages, c, HEAD_DIM),
        "c": tiles(dtype, stages, c, tile),
        "state": tiles(dtype, 2, tile, HEAD_DIM),
        "out": tiles(dtype, tuning.outputs, c, tile),
        "full": plgpu.Barrier(num_arrivals=3 + packed, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "state_ready": plgpu.Barrier(num_barriers=2),
        "state_free": plgpu.Barrier(num_barriers=2),
        "done": plgpu.Barrier(num_arrivals=plan.warpgroups),
    }
    if tuning.staged:
        scratch["decayed"] = tiles(dtype, tuning.terms, 64, c)
        scratch["scores"] = tiles(dtype, tuning.outputs, c, c)
    if packed:
        scratch["description"] = plgpu.SMEM((stages, c + FACTS), jnp.int32)
    return scratch


class _Scan(Cta):
    """The body of one CTA: a method for each role."""

    WEIGHTS_LAYOUT = COLUMNS

    def __init__(self, plan: Plan, *arguments: Any, **keywords: Any) -> None:
        super().__init__(plan, *arguments, **keywords)
        self.tuning = plan.tuning
        # Parts of the state that one wgmma can make: 64 columns of c each.
        self.parts = range(self.tuning.tile // 64)

    def run(self) -> None:
        """Gives every warpgroup its role."""
        state, output, loader = self.tuning.registers
        turns = range(self.tuning.outputs)
        writers: list[Role] = [(functools.partial(self.write_output, turn), output, "increase") for turn in turns]
        self.share([(self.advance_state, state, "increase"), *writers, (self.load, loader, "decrease")])

    # States in device memory

    def store_state(self, state: tuple[jax.Array, ...]) -> None:
        for part in self.parts:
            columns = pl.ds(self.tile * self.tuning.tile + 64 * part, 64)
            self.states.at[self.job, self.row, self.head, columns][...] = state[part]

    def entering_state(self) -> tuple[jax.Array, ...]:
        """The state entering this CTA's piece."""
        return tuple(self.entering_part(part) for part in self.parts)

    def entering_part(self, part: int) -> jax.Array:
        """A part of the state entering this CTA's piece, [64 columns of c, H]."""
        place = (self.job, self.row, self.head, self.piece)
        columns = pl.ds(self.tile * self.tuning.tile + 64 * part, 64)
        if "entering" in self.given:
            return plgpu.load(self.given["entering"].at[(*place, columns)], layout=TILE, optimized=False)
        if "entering_transposed" in self.given:
            states = self.given["entering_transposed"].at[(*place, slice(None), columns)]
            return plgpu.layout_cast(plgpu.load(states.T, layout=TRANSPOSED, optimized=False), TILE)
        return plgpu.layout_cast(jnp.zeros((64, HEAD_DIM), jnp.float32), TILE)

    # Roles

    def load(self) -> None:
        """Streams the chunks of a, b and c."""
        stages, c, smem = self.tuning.stages, self.tuning.chunk, self.smem
        columns = pl.ds(self.tile * self.tuning.tile, self.tuning.tile)

        @pl.loop(0, self.steps)
        def _(step: jax.Array) -> None:
            slot = lax.rem(step, stages)

            @pl.when(step >= stages)
            def _() -> None:
                plgpu.barrier_wait(smem["empty"].at[slot])

            full = smem["full"].at[slot]
            chunk = self.chunk_at(step)
            rows = pl.ds(chunk * c, c)
            for i, job in enumerate(self.plan.jobs):

                @pl.when(self.job == i)
                def _(job: Job = job) -> None:
                    a_ref, b_ref, c_ref = (self.operands[x] for x in (job.a, job.b, job.c))
                    plgpu.copy_gmem_to_smem(b_ref.at[self.row, rows, self.head], smem["b"].at[slot], full)
                    plgpu.copy_gmem_to_smem(a_ref.at[self.row, rows, self.head], smem["a"].at[slot], full)
                    plgpu.copy_gmem_to_smem(c_ref.at[self.row, rows, self.head, columns], smem["c"].at[slot], full)

            if self.packed:
                plgpu.copy_gmem_to_smem(
                    self.given["description"].at[self.row, chunk], smem["description"].at[slot], full
                )

        self.drain(smem["empty"], stages)

    def advance_state(self) -> None:
        """Carries the state from chunk to chunk and publishes it to the output warpgroups."""
        stages, smem = self.tuning.stages, self.smem
        whole = None if self.ragged else self.leaving(self.tuning.chunk)

        def body(step: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(smem["full"].at[slot])
            weights, kept = self.factors(step, slot, whole)
            advanced = []
            for part in self.parts:
                advanced.append(self.add_chunk(state[part] * kept, slot, part, weights))
                if part == self.parts[-1]:
                    plgpu.barrier_arrive(smem["empty"].at[slot])
                # Between the parts: it keeps this sum before the next product, whose registers it would take.
                following = functools.partial(self.publish, step + 1, part, advanced[part])
                pl.when(step + 1 < self.steps)(following)
            return tuple(advanced)

        start = self.entering_state()
        for part in self.parts:
            self.publish(jnp.int32(0), part, start[part])
        end = lax.fori_loop(0, self.steps, body, start)
        self.drain(smem["state_free"], 2)
        last = jnp.where(self.sign > 0, self.plan.pieces - 1, 0)
        pl.when(self.piece == last)(lambda: self.store_state(end))

    def add_chunk(self, kept: jax.Array, slot: jax.Array, part: int, weights: jax.Array) -> jax.Array:
        """Adds the chunk in a slot to what is kept of a part of the state."""
        c = self.smem["c"].at[slot, :, pl.ds(64 * part, 64)]
        decayed = plgpu.load(c.T, layout=TILE, optimized=False).astype(jnp.float32)
        decayed *= lax.broadcast_in_dim(weights, decayed.shape, [1])
        terms = self.terms(decayed, self.tuning.terms, c.dtype)
        lefts = [self.left(term, "decayed", i) for i, term in enumerate(terms)]

        def update(acc: Any) -> None:
            for left in lefts:
                plgpu.wgmma(acc, left, self.smem["b"].at[slot])
            plgpu.wgmma_wait(0)

        def added(acc: Any) -> jax.Array:
            update(acc)
            return acc[...]

        if self.tuning.staged:  # the interpreter starts accumulators from zero only
            return kept + pl.run_scoped(added, plgpu.ACC((64, HEAD_DIM), jnp.float32))
        # Waiting makes no data dependence; the barrier keeps arithmetic behind it.
        return lax.optimization_barrier(pl.run_state(update)(plgpu.ACC.init(kept)))

    def left(self, operand: jax.Array, place: str, index: int) -> Any:
        """The left operand of a product, where it is multiplied from."""
        if not self.tuning.staged:
            return operand
        ref = self.smem[place].at[index]
        ref[...] = operand
        plgpu.commit_smem()
        return ref

    def publish(self, step: jax.Array, part: int, state: jax.Array) -> None:
        """Shows the output warpgroups a part of the state that enters the chunk of a step."""
        smem, buffer = self.smem, lax.rem(step, 2)
        if part == self.parts[0]:

            @pl.when(step >= 2)
            def _() -> None:
                plgpu.barrier_wait(smem["state_free"].at[buffer])

        smem["state"].at[buffer, pl.ds(64 * part, 64)][...] = state.astype(smem["state"].dtype)
        if part == self.parts[-1]:
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem["state_ready"].at[buffer])

    def write_output(self, turn: int) -> None:
        """Computes the output of every chunk whose turn it is."""
        c, turns, smem = self.tuning.chunk, self.tuning.outputs, self.smem
        decay = self.decay_tile()
        whole = None if self.ragged else self.entering(c)
        out_smem = smem["out"].at[turn]
        scores_acc = plgpu.ACC((c, c), jnp.float32)
        wide_acc = plgpu.ACC((c, self.tuning.tile), jnp.float32)

        def plain(step: jax.Array, slot: jax.Array, scores: Any, carried: Any, local: Any) -> Any:
            a = self.left_a(slot)
            plgpu.wgmma(scores, a, smem["b"].at[slot].T)
            self.carry(step, a, carried)
            found = lax.optimization_barrier(plgpu.wgmma_accumulator_load(scores, wait_n=1))
            left = self.left((found * decay).astype(out_smem.dtype), "scores", turn)
            weights = self.entering(self.tokens(step)) if whole is None else whole
            return self.sums(step, slot, left, carried, local, weights)

        def scores_of(slot: jax.Array, scores: Any) -> jax.Array:
            plgpu.wgmma(scores, self.left_a(slot), smem["b"].at[slot].T)
            return scores[...]

        def packed(step: jax.Array, slot: jax.Array, left: Any, carried: Any, local: Any) -> Any:
            self.carry(step, self.left_a(slot), carried)
            return self.sums(step, slot, left, carried, local, self.entering_packed(step, slot))

        def store_out(far: jax.Array, near: jax.Array) -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[...] = (far + near).astype(out_smem.dtype)

        def write_plain(step: jax.Array, slot: jax.Array) -> None:
            store_out(*pl.run_scoped(functools.partial(plain, step, slot), scores_acc, wide_acc, wide_acc))

        def write_packed(step: jax.Array, slot: jax.Array) -> None:
            # Nothing is in flight while the weights are made: they take the registers of the accumulators.
            scores = lax.optimization_barrier(pl.run_scoped(functools.partial(scores_of, slot), scores_acc))
            scores = (scores * self.decay_tile_of(step, slot)).astype(out_smem.dtype)
            left = self.left(scores, "scores", turn)
            store_out(*pl.run_scoped(functools.partial(packed, step, slot, left), wide_acc, wide_acc))

        @pl.loop(0, lax.div(self.steps + (turns - 1 - turn), turns))
        def _(visit: jax.Array) -> None:
            step = visit * turns + turn
            slot = lax.rem(step, self.tuning.stages)
            plgpu.barrier_wait(smem["full"].at[slot])
            if self.packed:
                # The branch holds the whole step: one between products would cost every chunk registers and overlap.
                pl.when(self.plain(slot))(lambda: write_plain(step, slot))
                pl.when(jnp.logical_not(self.plain(slot)))(lambda: write_packed(step, slot))
            else:
                write_plain(step, slot)
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem["empty"].at[slot])
            self.send(step, out_smem)

        plgpu.wait_smem_to_gmem(0)

    def left_a(self, slot: jax.Array) -> Any:
        """The chunk of a in a slot, the left operand of two products; packed, the registers do not suffice for it."""
        a = self.smem["a"].at[slot]
        return a if self.tuning.staged or self.packed else plgpu.load(a, layout=TILE, optimized=False)

    def carry(self, step: jax.Array, a: Any, carried: Any) -> None:
        """Starts the product with the state entering the chunk."""
        buffer = lax.rem(step, 2)
        plgpu.barrier_wait(self.smem["state_ready"].at[buffer])
        plgpu.wgmma(carried, a, self.smem["state"].at[buffer].T)

    def sums(
        self, step: jax.Array, slot: jax.Array, left: Any, carried: Any, local: Any, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What the state entering the chunk and the chunk itself, by its weighted scores, give to its output."""
        plgpu.wgmma(local, left, self.smem["c"].at[slot])
        far = lax.optimization_barrier(plgpu.wgmma_accumulator_load(carried, wait_n=1))
        plgpu.barrier_arrive(self.smem["state_free"].at[lax.rem(step, 2)])
        far *= lax.broadcast_in_dim(weights, far.shape, [0])
        return far, lax.optimization_barrier(plgpu.wgmma_accumulator_load(local, wait_n=0))

    def send(self, step: jax.Array, out_smem: Any) -> None:
        """Starts copying a chunk's output to where its job's lies."""
        c, tile = self.tuning.chunk, self.tuning.tile
        rows, columns = pl.ds(self.chunk_at(step) * c, c), pl.ds(self.tile * tile, tile)
        for i, out in enumerate(self.outputs):

            @pl.when(self.job == i)
            def _(out: Any = out) -> None:
                plgpu.copy_smem_to_gmem(out_smem, out.at[self.row, rows, self.head, columns])
