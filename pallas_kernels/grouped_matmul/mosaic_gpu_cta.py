"""What the grouped matmul's kernels for Hopper (sm_90a) have in common: their launch, and the warpgroups of a CTA.

The CTAs stay: a loader warpgroup goes on to the next tile while two others, each with half of a tile, still write the
last one. CTAs whose tiles are neighbours are a cluster, each of which loads a part of what all multiply with.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper

ALIGNMENT = 8
"""Rows of the swizzle's pattern: tiles of shared memory are filled from, and written to, multiples of them."""
STAGES = 4
REGISTERS = {"increase": 232, "decrease": 40}
WIDTHS = (128, 256)
"""What D and F of the weights [E, D, F] must be multiples of, so that all tiles across are whole."""


def obstacle(x: jax.Array | jax.ShapeDtypeStruct, w: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    """Says why rows x [M, D] cannot be multiplied with w [E, D, F] here, or None when they can."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it is written for bfloat16 and float16, not {x.dtype.name}"
    if reason := hopper.obstacle():
        return reason
    if any(width % least for width, least in zip(w.shape[1:], WIDTHS, strict=True)):
        return f"widths {w.shape[1]} and {w.shape[2]} are no multiples of {WIDTHS[0]} and {WIDTHS[1]}"
    return None


def launch(
    cta: Callable[..., "Cta"],
    operands: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    scratch: Mapping[str, Any],
    *,
    programs: int,
    members: int,
    automatic_barriers: bool = True,
) -> list[jax.Array]:
    """Runs a kernel.

    Args:
        cta: makes its body of references to operands and results, and of what `Cta` takes.
        operands: arrays that it reads.
        results: what it writes.
        scratch: shared memory by name; barriers are added.
        programs: how many CTAs share the work.
        members: how many of them make a cluster.
        automatic_barriers: whether all of a warpgroup wait for each other around every store and copy.
    """

    def body(*refs: Any, **smem: Any) -> None:
        cta(*refs, smem=smem, clusters=programs // members, members=members).run()

    return plgpu.kernel(
        body,
        out_type=list(results),
        scratch_types={
            **scratch,
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            "empty": plgpu.ClusterBarrier(collective_axes=("member",), num_arrivals=2, num_barriers=STAGES),
            "done": plgpu.ClusterBarrier(collective_axes=("member",), num_arrivals=3),
        },
        grid=(programs // members,),
        grid_names=("cluster",),
        cluster=(members,),
        cluster_names=("member",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=0, unsafe_no_auto_barriers=not automatic_barriers
        ),
    )(*operands)


class Cta(ABC):
    """The body of one CTA: a method for each role. Steps are counted over all of its tiles."""

    def __init__(self, *, smem: dict[str, Any], clusters: int, members: int) -> None:
        self.smem, self.clusters, self.members = smem, clusters, members
        self.cluster = lax.axis_index("cluster")
        self.member = lax.axis_index("member")

    @abstractmethod
    def load(self) -> None:
        """Streams what the tiles add up, tile after tile."""

    @abstractmethod
    def multiply(self, half: jax.Array) -> None:
        """Computes half of each tile, and writes it while the next ones are being loaded."""

    def run(self) -> None:
        """Gives every warpgroup its role."""
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 2)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS["decrease"], action="decrease")
            self.load()

        @pl.when(warpgroup < 2)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS["increase"], action="increase")
            self.multiply(warpgroup)

        # A warpgroup that exits while another issues wgmma faults, and so does a CTA that another still writes to.
        plgpu.barrier_arrive(self.smem["done"])
        plgpu.barrier_wait(self.smem["done"])

    def free_slot(self, step: jax.Array) -> jax.Array:
        """Where the operands of a step go, once no one multiplies what was there."""
        slot = lax.rem(step, STAGES)
        pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(self.smem["empty"].at[slot]))
        return slot

    def drain(self, steps: jax.Array) -> None:
        """Waits until all of `steps` are over: every phase must be seen before the CTA ends."""

        @pl.loop(jnp.maximum(steps - STAGES, 0), steps)
        def _(step: jax.Array) -> None:
            plgpu.barrier_wait(self.smem["empty"].at[lax.rem(step, STAGES)])

    def sum_up(
        self, shape: tuple[int, int], before: jax.Array, steps: jax.Array, operands: Callable[[jax.Array], tuple]
    ) -> jax.Array:
        """Returns the sum of the products of the operands in the slots of `steps` after those `before`, in fp32."""
        full, empty = self.smem["full"], self.smem["empty"]

        def release(step: jax.Array) -> None:
            plgpu.barrier_arrive(empty.at[lax.rem(step + STAGES, STAGES)])

        def add_up(acc: Any) -> jax.Array:
            @pl.loop(0, steps)
            def _(step: jax.Array) -> None:
                slot = lax.rem(before + step, STAGES)
                plgpu.barrier_wait(full.at[slot])
                plgpu.wgmma(acc, *operands(slot))
                plgpu.wgmma_wait(1)
                pl.when(step > 0)(lambda: release(before + step - 1))

            return acc[...]

        result = pl.run_scoped(add_up, plgpu.ACC(shape, jnp.float32))
        pl.when(steps > 0)(lambda: release(before + steps - 1))
        return result
