"""The accelerated kernels lower inside `jax.shard_map`, without the hardware."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from parallel import context, lasp, local
from parallel.mesh import make_mesh

PLATFORMS = {"sm_90": ("gpu", 9.0, "cuda"), "sm_80": ("gpu", 8.0, "cuda"), "tpu": ("tpu", None, "tpu")}
TRITON = "triton_kernel_call"


def lowered(platform, loss, key_heads):
    """StableHLO of the gradient of a loss of q, k, v and segment ids, for a platform that need not be there."""
    kind, capability, lowering = PLATFORMS[platform]
    q, k = (jax.ShapeDtypeStruct((2, 1024, heads, 128), jnp.bfloat16) for heads in (8, key_heads))
    ids = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
    mesh = make_mesh({"data": 2, "sequence": 2, "tensor": 2})
    with jax.set_mesh(mesh), dispatch.target(kind, capability):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k, ids)
        return traced.lower(lowering_platforms=(lowering,)).as_text()


@pytest.mark.parametrize(
    ("platform", "kernel"), [("sm_90", "mosaic_gpu"), ("sm_80", TRITON), ("tpu", "tpu_custom_call")]
)
def test_lightning(platform, kernel):
    """LASP+ runs the kernels of its platform: two states, the mixing and its gradients."""

    def loss(q, k, v, ids):
        slopes = 2.0 ** -jnp.arange(1.0, 9.0)
        o = lasp.lightning_attention(q, k, v, slopes, ids, lasp.passage(ids, "zigzag"), order="zigzag")
        return o.astype(jnp.float32).sum()

    assert lowered(platform, loss, key_heads=8).count(f"@{kernel}") >= 3


def softmax_loss(q, k, v, ids, exchange):
    end = jnp.broadcast_to(jnp.arange(1, 1025, dtype=jnp.int32), ids.shape)
    o = context.softmax_attention(q, k, v, end * 0, end, scale=0.1, order="zigzag", exchange=exchange)
    return o.astype(jnp.float32).sum()


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_softmax_on_gpus(exchange):
    """Forward and backward are Triton's, both over whole rows and over a ring's pieces."""
    loss = functools.partial(softmax_loss, exchange=exchange)
    assert lowered("sm_90", loss, key_heads=2).count(TRITON) >= 3


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_softmax_on_tpus(exchange):
    """Forward and backward are the kernels over ranges, both over whole rows and over a ring's pieces."""
    text = lowered("tpu", functools.partial(softmax_loss, exchange=exchange), key_heads=2)
    for kernel in ("softmax_forward", "softmax_backward"):
        assert kernel in text


@pytest.mark.parametrize(("sizes", "kernels"), [({"fsdp": 4, "sequence": 2}, 2), ({"data": 4, "tensor": 2}, 0)])
def test_norm_gate_on_gpus(sizes, kernels):
    """Each device runs Triton's kernels, forward and backward, on its own tokens; the compiler splits heads."""
    x = jax.ShapeDtypeStruct((4, 1024, 8, 128), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((8, 128), jnp.float32)

    def loss(x, gate, weight):
        return local.norm_gate(x, gate, weight, 1e-6).astype(jnp.float32).sum()

    with jax.set_mesh(make_mesh(sizes)), dispatch.target("gpu", 9.0):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, weight)
        assert traced.lower(lowering_platforms=("cuda",)).as_text().count(f"@{TRITON}") == kernels
