"""What one launch of the Hopper scan kernel computes and how a CTA of it is laid out."""

import dataclasses

HEAD_DIM = 128
THREADS = 128
"""Threads of a warpgroup."""

REGISTERS = 65536
"""Registers of a multiprocessor; a thread is launched with a multiple of 8."""


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
        outputs: output warpgroups, 1 or 2.
        registers: per thread of (state, output, loader) warpgroups, multiples of 8.
        terms: bf16 terms that carry the decayed c into the state: 1, or 2 to keep what rounding the first one lost.
        staged: left operands of products pass through shared memory and sums of chunks are added to the state in fp32:
            for the interpreter, which multiplies only from there and starts accumulators from zero.
        chunk: tokens per step, the 64 rows of one wgmma.
    """

    tile: int = 64
    stages: int = 4
    outputs: int = 1
    registers: tuple[int, int, int] = (216, 240, 40)
    terms: int = 2
    staged: bool = False
    chunk: int = 64

    def __post_init__(self) -> None:
        """Raises ValueError where the warpgroups would wait for ever for registers that the launch did not get."""
        warpgroups = 2 + self.outputs
        launched = REGISTERS // (THREADS * warpgroups) // 8 * 8 * warpgroups
        state, output, loader = self.registers
        wanted = state + output * self.outputs + loader
        if wanted > launched:
            raise ValueError(
                f"registers {self.registers} of {warpgroups} warpgroups are {wanted}, more than {launched}"
            )


@dataclasses.dataclass(frozen=True)
class Plan:
    """A launch: the jobs that share a grid, the pieces every sequence is cut into, and the layout of a CTA."""

    jobs: tuple[Job, ...]
    pieces: int = 1
    tuning: Tuning = Tuning()

    @property
    def warpgroups(self) -> int:
        return 2 + self.tuning.outputs

    @property
    def chunk(self) -> int:
        return self.tuning.chunk


@dataclasses.dataclass(frozen=True)
class Gather:
    """A launch that takes the states which pieces leave behind.

    Attributes:
        jobs: scans whose states are taken.
        pieces: how many every sequence is cut into.
        split: parts of a piece that have CTAs, and states, of their own.
        orientations: 2 to take each state transposed, too.
        skip_last: leave out the last piece of each scan, whose state no other piece begins with.
        terms, chunk: as in `Tuning`.
    """

    jobs: tuple[Job, ...]
    pieces: int
    split: int = 1
    orientations: int = 1
    skip_last: bool = True
    terms: int = 2
    chunk: int = 64

    registers = (232, 40)
    """Of the warpgroups that add up, and of the loader."""

    @property
    def stages(self) -> int:
        """Chunks in flight: what the weighted columns leave of the shared memory."""
        return 3 if self.orientations * self.terms > 2 else 4


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a launch: of the arrays, and how the work is cut.

    A piece has `per_piece` chunks, in `split` parts of `per_part`. Of each scan, `ctas` parts in a row have CTAs, from
    the piece after the first `skipped` ones in descending scans.
    """

    batch: int
    length: int
    heads: int
    tiles: int
    chunks: int
    per_piece: int
    ctas: int
    split: int = 1
    skipped: int = 0

    @property
    def per_part(self) -> int:
        return -(-self.per_piece // self.split)
