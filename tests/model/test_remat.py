"""Rematerialisation: what a policy keeps of attention and experts is not computed again, and no number changes."""

import collections
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx_jax.config import IN_ORDER, LOSSLESS, ExpertTransport, ModelConfig, SequenceSplit
from mmx_jax.data import Batch
from mmx_jax.model import TextModel
from mmx_jax.model.text import REMAT_POLICIES
from mmx_jax.training.loss import next_token_loss
from pallas_kernels import dispatch
from parallel.mesh import make_mesh
from tests.model.common import random_params, relative, rows

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=64, layers=("softmax", "softmax"), num_heads=2, num_kv_heads=1, head_dim=128,
    rotary_dim=64, ffn_hidden_size=64, compute_dtype="float32",
)  # fmt: skip
EXPERTS = replace(CONFIG, num_experts=4, experts_per_token=2)
KERNELS = {
    "gpu": {"forward_kernel", "query_gradient_kernel", "key_gradients_kernel"},
    "tpu": {"softmax_forward", "softmax_backward"},
}
SPLITS = {"whole rows": (1, IN_ORDER), "gather": (2, SequenceSplit()), "ring": (2, SequenceSplit(exchange="ring"))}


def step(remat, split=IN_ORDER, config=CONFIG, transport=LOSSLESS):
    """Loss and gradients of all parameters, jitted, and what to call it with: rows of two documents."""
    ids = np.repeat([[1, 2, 2, 0], [1, 1, 2, 2]], 16, axis=1).astype(np.int32)
    tokens, positions, segment_ids = rows(config, ids)
    batch = Batch(
        tokens=tokens, targets=np.roll(tokens, -1, axis=1), positions=positions, segment_ids=segment_ids,
        loss_mask=(segment_ids > 0).astype(np.float32), source_id=np.zeros_like(tokens),
    )  # fmt: skip

    def loss(params, batch):
        model = TextModel(config, params, remat=remat, transport=transport)
        return next_token_loss(model, batch, vocab_chunk=64, num_sources=1, split=split)[0]

    return jax.jit(jax.value_and_grad(loss)), (random_params(config), jax.tree.map(jnp.asarray, batch))


WORK = ("all_to_all", "dot_general", "ragged_dot_general", "psum_invariant", "pmax")


def kernels(jaxpr, found):
    """Counts the kernels of a program by name, its products and sums over the mesh too, also of its inner ones."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in WORK:
            found[equation.primitive.name] += 1
        if equation.primitive.name == "triton_kernel_call":
            found[equation.params["fn"].__name__] += 1
        if equation.primitive.name == "pallas_call":
            found[equation.params["name"]] += 1
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if inner := getattr(value, "jaxpr", value if hasattr(value, "eqns") else None):
                kernels(inner, found)
    return found


def step_work(remat, sizes, platform, split=IN_ORDER, config=CONFIG, transport=LOSSLESS):
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    with jax.set_mesh(mesh), dispatch.target(platform, 9.0):
        function, arguments = step(remat, split, config, transport)
        return kernels(function.trace(*arguments).jaxpr.jaxpr, collections.Counter())


def step_kernels(remat, ranks, split, platform):
    found = step_work(remat, {"sequence": ranks}, platform, split)
    return collections.Counter({name: count for name, count in found.items() if name not in WORK})


@pytest.mark.parametrize("platform", KERNELS)
@pytest.mark.parametrize(("ranks", "split"), SPLITS.values(), ids=SPLITS.keys())
def test_no_softmax_kernel_runs_twice(ranks, split, platform):
    """Every policy's step has the kernels of a step that keeps everything; one that forgets the results has more."""
    expected = step_kernels("none", ranks, split, platform)
    assert set(expected) == KERNELS[platform]
    for remat in REMAT_POLICIES:
        assert step_kernels(remat, ranks, split, platform) == expected, remat


def test_the_count_sees_a_second_forward(monkeypatch):
    monkeypatch.setitem(REMAT_POLICIES, "layer", jax.checkpoint_policies.nothing_saveable)
    for platform in KERNELS:
        ranks, split = SPLITS["gather"]
        forgetful, keeping = (step_kernels(remat, ranks, split, platform) for remat in ("layer", "none"))
        assert (forgetful - keeping).total() == 1


ONE_ROUND = ExpertTransport(block_factor=2.0, max_rounds=1)


@pytest.mark.parametrize(
    ("ranks", "capacity", "transport"),
    [
        (1, None, LOSSLESS),
        (1, 1.25, LOSSLESS),
        (2, None, ONE_ROUND),
        (2, 1.25, ONE_ROUND),
        (2, 1.25, replace(ONE_ROUND, bucket_factor=1.25)),
        (2, 1.25, ExpertTransport(block_factor=0.5)),
    ],
    ids=("dropless", "capacity", "travelling", "with capacity", "buckets", "several rounds"),
)
def test_experts_that_are_kept_are_not_computed_again(ranks, capacity, transport):
    """With "experts" no product comes twice and no row travels twice; with "dots" some of both do."""
    config = replace(EXPERTS, capacity_factor=capacity)
    every, experts, dots = (
        step_work(remat, {"expert": ranks}, "tpu", config=config, transport=transport)
        for remat in ("none", "experts", "dots")
    )
    assert experts == every
    again = dots - every
    assert set(again) <= set(WORK)
    assert set(again) & {"dot_general", "ragged_dot_general"}
    assert ("all_to_all" in again) == (ranks > 1)


@pytest.mark.parametrize("config", [CONFIG, EXPERTS], ids=("dense", "experts"))
def test_policies_change_no_number(config):
    """Loss and gradients of every policy are those of a step that keeps everything."""
    function, arguments = step("none", config=config)
    loss, gradients = function(*arguments)
    for remat in REMAT_POLICIES:
        again, others = step(remat, config=config)[0](*arguments)
        assert abs(again - loss) <= 1e-6 * loss
        for path, gradient in gradients.items():
            assert relative(others[path], gradient) < 1e-5, (remat, path)
