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

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lightning.mosaic_gpu_segments import AGES, FACTS, Fact

HEAD_DIM = 128
LOG2E = math.log2(math.e)
TILE = plgpu.Layout.WGMMA
ROWS = TILE.reduce(1)
COLUMNS = TILE.reduce(0)


@dataclasses.dataclass(frozen=True)
class Job:
    """One scan: the positions of the operands that play a, b and c, and whether it walks from the last token down."""

    a: int
    b: int
    c: int
    descending: bool = False


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How a CTA is laid out.

    Attributes:
        tile: columns of c (and of the state) per CTA, 64 or 128.
        stages: chunks in flight; even when there are two output warpgroups, so that each sees every phase it waits for.
        outputs: output warpgroups, 1 or 2; 0 for a launch that only wants states.
        registers: per thread of (state, output, loader) warpgroups.
        terms: bf16 terms that carry the decayed c into the state: 1, or 2 to keep what rounding the first one lost.
        chunk: tokens per step, the 64 rows of one wgmma.
    """

    tile: int = 64
    stages: int = 4
    outputs: int = 1
    registers: tuple[int, int, int] = (216, 240, 40)
    terms: int = 2
    chunk: int = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """A launch: the jobs that share a grid, the pieces every sequence is cut into, and the layout of a CTA."""

    jobs: tuple[Job, ...]
    pieces: int = 1
    tuning: Tuning = Tuning()

    @property
    def warpgroups(self) -> int:
        return 2 + self.tuning.outputs


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
    shape = _Shape(batch, length, heads, dim // tuning.tile, chunks, -(-chunks // plan.pieces))
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
        _Cta(
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


@dataclasses.dataclass(frozen=True)
class _Shape:
    batch: int
    length: int
    heads: int
    tiles: int
    chunks: int
    per_piece: int


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


class _Cta:
    """The body of one CTA: which scan it is, then one method per role."""

    def __init__(
        self,
        plan: Plan,
        shape: _Shape,
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
