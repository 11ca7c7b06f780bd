"""What is read from the text of a compiled program, and what its schedule hides; texts written by hand."""

import jax
import pytest

from parallel import hlo
from parallel.roofline import Cost, Roofline
from parallel.topology import CHIPS

CALLED = """
%called (p: bf16[64,128]) -> bf16[128,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  ROOT %g = bf16[128,128]{1,0} all-gather(%p), replica_groups={{0,1},{2,3}}, dimensions={0}
}, execution_thread="sparsecore"
"""
ENTRY = """
ENTRY %main (x: bf16[4096,4096], w: bf16[64,128]) -> bf16[128,128] {{
  %x = bf16[4096,4096]{{1,0}} parameter(0)
  %w = bf16[64,128]{{1,0}} parameter(1)
{body}
}}
"""
START = '  %s = ((), (), s32[]{:S(2)}) call-start(), async_execution_thread="sparsecore", to_apply=%called'
UPDATE = "  %u = ((bf16[64,128]{1,0}), bf16[128,128]{1,0}) call-update(%s, %w)"
PRODUCT = "  %m = bf16[4096,4096]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
DONE = "  ROOT %d = bf16[128,128]{1,0} call-done(%u)"
WAITING = "  ROOT %g = bf16[128,128]{1,0} all-gather(%w), replica_groups={{0,1},{2,3}}, dimensions={0}"
RECEIVED = 64 * 128 * 2
"""Bytes that a chip of a pair receives."""


def _cost(*body: str) -> Cost:
    module = hlo.parse(CALLED + ENTRY.format(body="\n".join(body)))
    return Roofline(CHIPS["h100"], jax.devices()[:4], lambda item, shapes: 0.0).cost(module)


def test_what_another_thread_gathers_starts_with_its_operands() -> None:
    """A start without operands and the update that brings them are one; group and kind are those of what it calls."""
    module = hlo.parse(CALLED + ENTRY.format(body="\n".join((START, PRODUCT, UPDATE, DONE))))
    main = module.computations["main"]
    assert [item.opcode for item in main.instructions] == ["parameter", "parameter", "dot", "call-start", "call-done"]
    start = main.instructions[3]
    assert start.operands == ("w",)
    assert main.operand_shapes(start) == ["bf16[64,128]{1,0}"]
    inner = hlo.collective(start, module)
    assert inner is not None
    assert hlo.collective_kind(inner) == "all-gather"
    assert hlo.first_group(inner, 4) == [0, 1]
    assert all(hlo.collective(item, module) is None for item in (*main.instructions[:3], main.instructions[4]))


@pytest.mark.parametrize(
    ("body", "how", "hidden", "with_matmul"),
    [
        ((START, UPDATE, PRODUCT, DONE), "asynchronous", RECEIVED, 1),
        ((START, PRODUCT, UPDATE, DONE), "asynchronous", 0, 0),
        ((PRODUCT, WAITING), "synchronous", 0, 0),
    ],
    ids=("behind a product", "product before the operands are there", "waited for"),
)
def test_bytes_are_hidden_by_what_runs_meanwhile(
    body: tuple[str, ...], how: str, hidden: int, with_matmul: int
) -> None:
    """137 GFLOP take 160 microseconds, 16 KiB on the links less than one."""
    cost = _cost(*body)
    found = {what: value for (kind, way, what), value in cost.collectives.items() if (kind, way) == ("all-gather", how)}
    assert (found["count"], found["bytes"]) == (1, RECEIVED)
    assert found.get("hidden_bytes", 0) == pytest.approx(hidden, abs=1e-6)
    assert found.get("with_matmul", 0) == with_matmul
    assert cost.exposed == pytest.approx(0 if hidden else found["seconds"])
    assert 0 < found["seconds"] < 1e-6 < cost.seconds
    assert sum(value for (*_, what), value in cost.collectives.items() if what == "count") == 1


BRANCHES = """
%skipped (p: bf16[4096,4096]) -> bf16[4096,4096] {
  ROOT %p = bf16[4096,4096]{1,0} parameter(0)
}

%taken (q: bf16[4096,4096]) -> bf16[4096,4096] {
  %q = bf16[4096,4096]{1,0} parameter(0)
  ROOT %m = bf16[4096,4096]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (c: pred[], x: bf16[4096,4096]) -> bf16[4096,4096] {
  %c = pred[] parameter(0)
  %x = bf16[4096,4096]{1,0} parameter(1)
  ROOT %r = bf16[4096,4096]{1,0} conditional(%c, %x, %x), true_computation=%taken, false_computation=%skipped
}
"""


@pytest.mark.parametrize(("dearest", "products"), [(False, 0), (True, 1)])
def test_one_branch_of_a_conditional_counts(dearest: bool, products: int) -> None:
    """The cheapest, or the dearest: such is the further round of the experts' transport."""
    roofline = Roofline(CHIPS["h100"], jax.devices()[:1], lambda item, shapes: 0.0, dearest=dearest)
    assert roofline.cost(hlo.parse(BRANCHES)).flops == products * 2 * 4096**3
