"""What the estimate counts of the TPU's softmax kernels: the tiles that they compute, each piece its share."""

from dataclasses import replace

import jax
import pytest

from mmx_jax.training import ahead
from parallel import hlo
from parallel.mesh import make_mesh
from parallel.topology import parse_topology
from tests.parallel.test_topology import RUN, STAGE

ROWS, LENGTH, HEADS, WIDTH, TILE = 4, 4096, 2, 128, 512
QUERIES = f"bf16[{ROWS // 2 * LENGTH // 2},{HEADS * WIDTH}]{{1,0}}"
CALLS = f"""
ENTRY %main (p: {QUERIES}, n: s32[], l: s32[128]) -> {QUERIES} {{
  %p = {QUERIES} parameter(0)
  %n = s32[] parameter(1)
  %l = s32[128] parameter(2)
  %softmax_forward.1 = ({QUERIES}, f32[2,1,4096]{{2,1,0}}) custom-call(%n, %l, %l, %l, %p, %p)
  %softmax_backward.2 = (f32[1024,{WIDTH}]{{1,0}}, f32[8192,128]{{1,0}}) custom-call(%n, %l, %l, %l, %p, %p)
  ROOT %o = {QUERIES} get-tuple-element(%softmax_forward.1), index=0
}}
"""


def test_tiles_on_and_under_the_diagonal_are_counted() -> None:
    """Forward: two products of each tile, of all queries. Backward: five, of a fourth of them and one of two heads."""
    stage = replace(STAGE, sequence_length=LENGTH, batch=replace(STAGE.batch, micro_batch=ROWS))
    target = ahead.Target(replace(RUN, stages=(stage,)), parse_topology("v5p:2x2x1"))
    flops = ahead._kernel_flops(target, make_mesh({"data": 2, "sequence": 2}, jax.devices()[:4]))
    main = hlo.parse(CALLS).computations["main"]
    forward, backward = (flops(main.by_name[name], main.operand_shapes(main.by_name[name]))
                         for name in ("softmax_forward.1", "softmax_backward.2"))  # fmt: skip
    tiles = LENGTH // TILE
    product = 2 * (tiles * (tiles + 1) // 2 * TILE**2) * WIDTH * HEADS * ROWS / 4  # of a chip
    assert forward == pytest.approx(2 * product, rel=1e-3)
    assert backward == pytest.approx(5 * product / 8, rel=1e-3)
