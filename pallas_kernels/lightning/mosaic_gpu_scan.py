"""The Hopper kernel that lightning attention is made of: a decayed scan over chunks with the state on chip.

A job is `out_i = sum_j lambda^|i-j| (a_i . b_j) c_j` over j <= i (j >= i when it descends), which with the operands
in different places is the forward and each of the three gradients. A CTA scans one head of one job, for `tile` columns
of c and for one piece of the sequence, and runs as warpgroups:

- the loader streams chunks of a, b and c into a ring of shared-memory stages (TMA; the arrays stay [B, T, N, H]);
- the state warpgroup keeps S^T [tile, H] in fp32 registers, publishes in bf16 the state entering each chunk, and adds
  the chunk: S^T = lambda^C S^T + (decayed c)^T b;
- the output warpgroups take turns at the chunks: P = (a b^T) * M, out = rows * (a S) + P c.

The decay tile M is built once per CTA in registers; no exponent is ever positive. All left operands of wgmma come from
shared memory, so the interpreter runs this very kernel.
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
from pallas_kernels.lightning.mosaic_gpu_cta import TILE, Cta, Role, launch
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
        {"description": description, "entering": entering},
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
        "decayed": tiles(dtype, tuning.terms, c, tile),
        "state": tiles(dtype, 2, tile, HEAD_DIM),
        "scores": tiles(dtype, tuning.outputs, c, c),
        "full": plgpu.Barrier(num_arrivals=3 + packed, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "state_ready": plgpu.Barrier(num_barriers=2),
        "state_free": plgpu.Barrier(num_barriers=2),
        "done": plgpu.Barrier(num_arrivals=plan.warpgroups),
    }
    if tile != c:  # of one size, the scores' buffer serves the output too
        scratch["out"] = tiles(dtype, tuning.outputs, c, tile)
    if packed:
        scratch["description"] = plgpu.SMEM((stages, c + FACTS), jnp.int32)
    return scratch


class _Scan(Cta):
    """The body of one CTA: a method for each role."""

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

    def place(self, part: int, *piece: jax.Array) -> tuple[Any, ...]:
        """Where a part of this CTA's state lies, in its head's states."""
        return (self.row, self.head, *piece, pl.ds(self.tile * self.tuning.tile + 64 * part, 64))

    def store_state(self, state: tuple[jax.Array, ...]) -> None:
        for part in self.parts:
            self.states.at[(self.job, *self.place(part))][...] = state[part]

    def entering_state(self) -> tuple[jax.Array, ...]:
        """The state entering this CTA's piece."""
        if "entering" not in self.given:
            return tuple(plgpu.layout_cast(jnp.zeros((64, HEAD_DIM), jnp.float32), TILE) for _ in self.parts)
        places = [self.given["entering"].at[(self.job, *self.place(part, self.piece))] for part in self.parts]
        return tuple(plgpu.load(place, layout=TILE, optimized=False) for place in places)

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
                added = self.chunk_part(slot, part, weights)
                if part == self.parts[-1]:
                    plgpu.barrier_arrive(smem["empty"].at[slot])
                advanced.append(state[part] * kept + added)
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

    def chunk_part(self, slot: jax.Array, part: int, weights: jax.Array) -> jax.Array:
        """What the chunk in a slot adds to a part of the state."""
        decayed, columns = self.smem["decayed"], pl.ds(64 * part, 64)
        rest = plgpu.load(self.smem["c"].at[slot, :, columns], layout=TILE, optimized=False).astype(jnp.float32)
        rest *= lax.broadcast_in_dim(weights, rest.shape, [0])
        for term in range(self.tuning.terms):
            rounded = rest.astype(decayed.dtype)
            decayed.at[term, :, columns][...] = rounded
            rest -= rounded.astype(jnp.float32)
        plgpu.commit_smem()

        def update(acc: Any) -> jax.Array:
            for term in range(self.tuning.terms):
                plgpu.wgmma(acc, decayed.at[term, :, columns].T, self.smem["b"].at[slot])
            return acc[...]

        # Reading an accumulator waits for it without a data dependence; the barrier keeps arithmetic behind it.
        return lax.optimization_barrier(pl.run_scoped(update, plgpu.ACC((64, HEAD_DIM), jnp.float32)))

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
        out_smem = smem["out" if "out" in smem else "scores"].at[turn]
        scores_acc = plgpu.ACC((c, c), jnp.float32)
        wide_acc = plgpu.ACC((c, self.tuning.tile), jnp.float32)

        def plain(step: jax.Array, slot: jax.Array, scores: Any, carried: Any, local: Any) -> Any:
            plgpu.wgmma(scores, smem["a"].at[slot], smem["b"].at[slot].T)
            self.carry(step, slot, carried)
            found = lax.optimization_barrier(plgpu.wgmma_accumulator_load(scores, wait_n=1))
            self.store_scores(turn, found * decay)
            weights = self.entering(self.tokens(step)) if whole is None else whole
            return self.sums(turn, step, slot, carried, local, weights)

        def scores_of(slot: jax.Array, scores: Any) -> jax.Array:
            plgpu.wgmma(scores, smem["a"].at[slot], smem["b"].at[slot].T)
            return scores[...]

        def packed(step: jax.Array, slot: jax.Array, carried: Any, local: Any) -> Any:
            self.carry(step, slot, carried)
            return self.sums(turn, step, slot, carried, local, self.entering_packed(slot))

        def store_out(far: jax.Array, near: jax.Array) -> None:
            if "out" not in smem:  # the last product may still be reading the scores for another warp
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[...] = (far + near).astype(out_smem.dtype)

        def write_plain(step: jax.Array, slot: jax.Array) -> None:
            store_out(*pl.run_scoped(functools.partial(plain, step, slot), scores_acc, wide_acc, wide_acc))

        def write_packed(step: jax.Array, slot: jax.Array) -> None:
            # Nothing is in flight while the weights are made: they take the registers of the accumulators.
            scores = lax.optimization_barrier(pl.run_scoped(functools.partial(scores_of, slot), scores_acc))
            self.store_scores(turn, scores * self.decay_tile_of(step, slot))
            store_out(*pl.run_scoped(functools.partial(packed, step, slot), wide_acc, wide_acc))

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

    def carry(self, step: jax.Array, slot: jax.Array, carried: Any) -> None:
        """Starts the product with the state entering the chunk."""
        buffer = lax.rem(step, 2)
        plgpu.barrier_wait(self.smem["state_ready"].at[buffer])
        plgpu.wgmma(carried, self.smem["a"].at[slot], self.smem["state"].at[buffer].T)

    def store_scores(self, turn: int, scores: jax.Array) -> None:
        """Puts the weighted scores where the product with c reads them, once the buffer's last copy has left."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        ref = self.smem["scores"].at[turn]
        ref[...] = scores.astype(ref.dtype)
        plgpu.commit_smem()

    def sums(
        self, turn: int, step: jax.Array, slot: jax.Array, carried: Any, local: Any, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What the state entering the chunk and the chunk itself give to its output."""
        plgpu.wgmma(local, self.smem["scores"].at[turn], self.smem["c"].at[slot])
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
