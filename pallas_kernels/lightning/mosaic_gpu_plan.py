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
        outputs: output warpgroups, 1 or 2; 0 for a launch that only wants states.
        registers: per thread of (state, output, loader) warpgroups, multiples of 8.
        terms: bf16 terms that carry the decayed c into the state: 1, or 2 to keep what rounding the first one lost.
        chunk: tokens per step, the 64 rows of one wgmma.
    """

    tile: int = 64
    stages: int = 4
    outputs: int = 1
    registers: tuple[int, int, int] = (216, 240, 40)
    terms: int = 2
    chunk: int = 64

    def __post_init__(self) -> None:
        """Raises ValueError where the warpgroups would wait for ever for registers that the launch did not get."""
        warpgroups = 2 + self.outputs
        launched = REGISTERS // (THREADS * warpgroups) // 8 * 8 * warpgroups
        state, output, loader = self.registers
        wanted = state + output * self.outputs + loader
        if self.outputs and wanted > launched:
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


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a launch: of the arrays, and how the work is cut."""

    batch: int
    length: int
    heads: int
    tiles: int
    chunks: int
    per_piece: int
