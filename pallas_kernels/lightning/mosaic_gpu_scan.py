"""The one Hopper kernel behind lightning attention: a decayed scan over chunks with the state on chip.

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

from pallas_kernels.lightning.mosaic_gpu_cta import TILE, Cta
from pallas_kernels.lightning.mosaic_gpu_plan import HEAD_DIM, Job, Plan, Shape
from pallas_kernels.lightning.mosaic_gpu_segments import FACTS, Fact


def scan(
    plan: Plan,
    operands: Sequence[jax.Array],
    slopes: jax.Array,
    *,
    length: int,
    description: jax.Array | None = None,
    initial: jax.Array | None = None,
    piece_states: jax.Array | None = None,
) -> tuple[list[jax.Array], jax.Array]:
    """Runs the jobs of a plan in one launch.

    Args:
        plan: what to run.
        operands: bf16 [B, T, N, 128], T a multiple of 8; the jobs name them by position.
        slopes: [N] fp32; one token decays a state by exp(-slope).
        length: tokens that count; those past it are zeros.
        description: what `mosaic_gpu_segments.describe` says of packed rows; None when all tokens are of one segment.
        initial: [J, B, N, 128, 128] fp32 state entering each job's scan, indexed (c dim, b dim); None for zeros.
        piece_states: [J, B, N, P, 128, 128] fp32, the state that each piece leaves behind on its own, as a launch
            without output warpgroups returns it; needed by a launch with output warpgroups and several pieces.

    Returns:
        One [B, T, N, 128] array per job (none without output warpgroups), and the fp32 states: [J, B, N, 128, 128]
        after each job's scan, or without output warpgroups those that the pieces leave, laid out like `piece_states`.

    Raises:
        ValueError: some piece would be empty.
    """
    batch, _, heads, dim = operands[0].shape
    tuning = plan.tuning
    chunks = -(-length // tuning.chunk)
    shape = Shape(batch, length, heads, dim // tuning.tile, chunks, -(-chunks // plan.pieces))
    if shape.per_piece * (plan.pieces - 1) >= chunks:
        raise ValueError(f"{chunks} chunks cannot be cut into {plan.pieces} pieces of {shape.per_piece}")
    jobs = len(plan.jobs)
    outputs = [jax.ShapeDtypeStruct(operands[0].shape, operands[0].dtype)] * (jobs if tuning.outputs else 0)
    pieces = () if tuning.outputs else (plan.pieces,)
    states = jax.ShapeDtypeStruct((jobs, batch, heads, *pieces, dim, dim), jnp.float32)
    optional = {"description": description, "initial": initial, "piece_states": piece_states}
    given = {name: array for name, array in optional.items() if array is not None}

    def lightning_scan(*refs: Any, **scratch: Any) -> None:
        taken = iter(refs)
        _Warpgroups(
            plan,
            shape,
            operands=[next(taken) for _ in operands],
            slopes=next(taken),
            given={name: next(taken) for name in given},
            outputs=[next(taken) for _ in outputs],
            states=next(taken),
            smem=scratch,
        ).run()

    *results, last = plgpu.kernel(
        lightning_scan,
        out_type=[*outputs, states],
        scratch_types=_scratch(plan, operands[0].dtype, packed=description is not None),
        grid=(batch * heads * plan.pieces * jobs * shape.tiles,),
        grid_names=("cta",),
        num_threads=plan.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(*operands, slopes, *given.values())
    return results, last


def _scratch(plan: Plan, dtype: Any, *, packed: bool) -> dict[str, Any]:
    """Shared memory and barriers of one CTA."""
    tuning = plan.tuning
    c, tile, stages = tuning.chunk, tuning.tile, tuning.stages

    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]

    def tiles(*shape: int) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    copies = 2 + (tuning.outputs > 0) + packed
    scratch = {
        "b": tiles(stages, c, HEAD_DIM),
        "c": tiles(stages, c, tile),
        "decayed": tiles(tuning.terms, c, tile),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=2 if tuning.outputs else 1, num_barriers=stages),
        "done": plgpu.Barrier(num_arrivals=plan.warpgroups),
    }
    if tuning.outputs:
        scratch |= {
            "a": tiles(stages, c, HEAD_DIM),
            "state": tiles(2, tile, HEAD_DIM),
            "scores": tiles(tuning.outputs, c, c),
            "state_ready": plgpu.Barrier(num_barriers=2),
            "state_free": plgpu.Barrier(num_barriers=2),
        }
        if tile != c:  # of one size, the scores' buffer serves the output too
            scratch["out"] = tiles(tuning.outputs, c, tile)
    if packed:
        scratch["description"] = plgpu.SMEM((stages, c + FACTS), jnp.int32)
    return scratch


class _Warpgroups(Cta):
    """The body of one CTA: a method for each role."""

    def run(self) -> None:
        """Gives every warpgroup its role."""
        warpgroup = lax.axis_index("warpgroup")
        outputs = self.tuning.outputs
        state, output, loader = self.tuning.registers
        roles: list[Any] = [(self.advance_state, state, "increase")]
        roles += [(functools.partial(self.write_output, turn), output, "increase") for turn in range(outputs)]
        roles += [(self.load, loader, "decrease")]
        for i, (role, registers, action) in enumerate(roles):

            @pl.when(warpgroup == i)
            def _(role: Any = role, registers: int = registers, action: Any = action) -> None:
                if outputs:
                    plgpu.set_max_registers(registers, action=action)
                role()

        # A warpgroup that exits while another issues wgmma faults, so all leave together.
        plgpu.barrier_arrive(self.smem["done"])
        plgpu.barrier_wait(self.smem["done"])

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
                    if self.tuning.outputs:
                        plgpu.copy_gmem_to_smem(a_ref.at[self.row, rows, self.head], smem["a"].at[slot], full)
                    plgpu.copy_gmem_to_smem(c_ref.at[self.row, rows, self.head, columns], smem["c"].at[slot], full)

            if "description" in self.given:
                plgpu.copy_gmem_to_smem(
                    self.given["description"].at[self.row, chunk], smem["description"].at[slot], full
                )

        self.drain(smem["empty"], stages)

    def advance_state(self) -> None:
        """Carries the state from chunk to chunk and publishes it to the output warpgroups."""
        stages, smem = self.tuning.stages, self.smem
        dtype = smem["decayed"].dtype

        def publish(step: jax.Array, state: tuple[jax.Array, ...]) -> None:
            buffer = lax.rem(step, 2)

            @pl.when(step >= 2)
            def _() -> None:
                plgpu.barrier_wait(smem["state_free"].at[buffer])

            for part in self.parts:
                smem["state"].at[buffer, pl.ds(64 * part, 64)][...] = state[part].astype(dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem["state_ready"].at[buffer])

        def body(step: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            slot = lax.rem(step, stages)
            if self.tuning.outputs:
                publish(step, state)
            plgpu.barrier_wait(smem["full"].at[slot])
            weights, kept = self.leaving(step, slot)
            advanced = []
            for part in self.parts:
                columns = pl.ds(64 * part, 64)
                rest = plgpu.load(smem["c"].at[slot, :, columns], layout=TILE, optimized=False).astype(jnp.float32)
                rest *= lax.broadcast_in_dim(weights, rest.shape, [0])
                for term in range(self.tuning.terms):
                    rounded = rest.astype(dtype)
                    smem["decayed"].at[term, :, columns][...] = rounded
                    rest -= rounded.astype(jnp.float32)
                plgpu.commit_smem()

                def update(acc: Any, columns: Any = columns) -> jax.Array:
                    for term in range(self.tuning.terms):
                        plgpu.wgmma(acc, smem["decayed"].at[term, :, columns].T, smem["b"].at[slot])
                    return acc[...]

                # Reading an accumulator waits for it without a data dependence; the barrier keeps arithmetic behind it.
                added = lax.optimization_barrier(pl.run_scoped(update, plgpu.ACC((64, HEAD_DIM), jnp.float32)))
                advanced.append(state[part] * kept + added)
            plgpu.barrier_arrive(smem["empty"].at[slot])
            return tuple(advanced)

        end = lax.fori_loop(0, self.steps, body, self.entering_state())
        if self.tuning.outputs:
            self.drain(smem["state_free"], 2)
            last = jnp.where(self.sign > 0, self.plan.pieces - 1, 0)
            pl.when(self.piece == last)(lambda: self.store_state(end))
        else:
            self.store_state(end, self.piece)

    def write_output(self, turn: int) -> None:
        """Computes the output of every chunk whose turn it is."""
        stages, c, tile, smem = self.tuning.stages, self.tuning.chunk, self.tuning.tile, self.smem
        decay = self.decay_tile()
        scores_smem = smem["scores"].at[turn]
        out_smem = smem["out"].at[turn] if "out" in smem else scores_smem

        def store(scores: jax.Array, weights: jax.Array) -> None:
            scores_smem[...] = (scores * weights).astype(scores_smem.dtype)

        def products(step: jax.Array, slot: jax.Array, scores: Any, carried: Any, local: Any) -> Any:
            buffer = lax.rem(step, 2)
            plgpu.barrier_wait(smem["full"].at[slot])
            plgpu.wgmma(scores, smem["a"].at[slot], smem["b"].at[slot].T)
            plgpu.barrier_wait(smem["state_ready"].at[buffer])
            plgpu.wgmma(carried, smem["a"].at[slot], smem["state"].at[buffer].T)
            p = lax.optimization_barrier(plgpu.wgmma_accumulator_load(scores, wait_n=1))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if "description" in self.given:
                plain = self.fact(slot, Fact.PLAIN)
                pl.when(plain == 1)(lambda: store(p, decay))
                pl.when(plain == 0)(lambda: store(p, self.decay_tile_of(step, slot)))
            else:
                store(p, decay)
            plgpu.commit_smem()
            plgpu.wgmma(local, scores_smem, smem["c"].at[slot])
            far = lax.optimization_barrier(plgpu.wgmma_accumulator_load(carried, wait_n=1))
            plgpu.barrier_arrive(smem["state_free"].at[buffer])
            far *= lax.broadcast_in_dim(self.entering(step, slot), far.shape, [0])
            return far, lax.optimization_barrier(plgpu.wgmma_accumulator_load(local, wait_n=0))

        turns = self.tuning.outputs

        @pl.loop(0, lax.div(self.steps + (turns - 1 - turn), turns))
        def _(visit: jax.Array) -> None:
            step = visit * turns + turn
            slot = lax.rem(step, stages)
            accumulators = [plgpu.ACC((c, width), jnp.float32) for width in (c, tile, tile)]
            far, near = pl.run_scoped(functools.partial(products, step, slot), *accumulators)
            out_smem[...] = (far + near).astype(out_smem.dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem["empty"].at[slot])
            rows, columns = pl.ds(self.chunk_at(step) * c, c), pl.ds(self.tile * tile, tile)
            for i, out in enumerate(self.outputs):

                @pl.when(self.job == i)
                def _(out: Any = out) -> None:
                    plgpu.copy_smem_to_gmem(out_smem, out.at[self.row, rows, self.head, columns])

        plgpu.wait_smem_to_gmem(0)

    def drain(self, barrier: Any, count: int) -> None:
        """Waits for the arrivals of the last `count` steps: every phase must be seen before the CTA ends."""

        @pl.loop(jnp.maximum(self.steps - count, 0), self.steps)
        def _(step: jax.Array) -> None:
            plgpu.barrier_wait(barrier.at[lax.rem(step, count)])
