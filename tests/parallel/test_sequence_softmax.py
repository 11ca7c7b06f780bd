"""Context-parallel softmax attention alone: key heads that are fewer than ranks, low precision, what travels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import dispatch
from pallas_kernels.softmax import softmax_attention
from parallel import context
from parallel.mesh import make_mesh
from parallel.sharding import ShardingError
from parallel.stripes import arrange, partition

BATCH, LENGTH, DIM = 2, 64, 8


# On one worker: what one device gives is computed once for all cases.
pytestmark = pytest.mark.xdist_group("sequence_softmax")


def inputs(heads, key_heads, dtype=jnp.float32, dim=DIM):
    """Queries, keys, values, the gradient of the output, and causal ranges: one document, and three with padding."""
    rng = np.random.default_rng(0)
    q, do = (jnp.asarray(rng.normal(size=(BATCH, LENGTH, heads, dim)), dtype) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(BATCH, LENGTH, key_heads, dim)), dtype) for _ in range(2))
    place = np.arange(LENGTH)
    start = np.where(place < 5, 0, np.where(place < 41, 5, 41))
    end = np.where((place >= 20) & (place < 37), start, place + 1)
    ranges = (jnp.asarray(np.stack([x, y]), jnp.int32) for x, y in ((0 * place, start), (place + 1, end)))
    return q, k, v, do, *ranges


def alone(q, k, v, do, start, end):
    """Output and gradients by the dense form on one device, in fp32."""

    def attend(*x):
        return softmax_attention(*x, scale=0.3, k_start=start, k_end=end, implementation="dense")

    o, pullback = jax.vjp(attend, *(x.astype(jnp.float32) for x in (q, k, v)))
    return o, *pullback(do.astype(jnp.float32))


def apart(sizes, order, exchange, *arrays):
    """The same on a mesh, in natural order again."""
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])

    def gradients(q, k, v, do, start, end):
        def attend(*x):
            return context.softmax_attention(*x, start, end, scale=0.3, order=order, exchange=exchange)

        o, pullback = jax.vjp(attend, q, k, v)
        return o, *pullback(do)

    with jax.set_mesh(mesh):
        where = np.asarray(jax.jit(lambda x: arrange(x, order))(np.arange(BATCH * LENGTH).reshape(BATCH, -1)))[0]
        sharding = NamedSharding(mesh, partition("batch", "sequence"))
        placed = (jax.device_put(np.asarray(x)[:, where], sharding) for x in arrays)
        results = jax.jit(gradients)(*placed)
    return [np.asarray(x)[:, np.argsort(where)] for x in results]


@pytest.mark.parametrize(("order", "exchange"), [("zigzag", "gather"), ("contiguous", "ring")])
def test_fewer_key_heads_than_tensor_ranks(order, exchange):
    """INV-21, INV-39: with two key heads on four ranks each rank reads one, and its gradient is summed over two."""
    arrays = inputs(heads=8, key_heads=2)
    for actual, expected in zip(apart({"sequence": 2, "tensor": 4}, order, exchange, *arrays), alone(*arrays)):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_bf16_is_added_up_in_fp32(exchange):
    """Gradients keep the dtype of the arrays; eight ranks' parts cost no more precision than one rounding or two."""
    arrays = inputs(heads=4, key_heads=2, dtype=jnp.bfloat16)
    for actual, expected in zip(apart({"sequence": 8}, "zigzag", exchange, *arrays), alone(*arrays)):
        assert actual.dtype == jnp.bfloat16
        error = np.linalg.norm(actual.astype(np.float32) - expected) / np.linalg.norm(expected)
        assert error < 1e-2


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_the_kernels_of_tpus(exchange):
    """INV-39: interpreted, on the two stripes of each of two ranks, gathered or passed around."""
    arrays = inputs(heads=4, key_heads=2, dim=128)
    with dispatch.target("tpu"), pltpu.force_tpu_interpret_mode():
        results = apart({"sequence": 2}, "zigzag", exchange, *arrays)
    for actual, expected in zip(results, alone(*arrays)):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_key_heads_that_do_not_fit_are_named():
    arrays = inputs(heads=12, key_heads=3)
    with pytest.raises(ShardingError, match=r"3 key heads and 2 ranks of mesh axes.*tensor"):
        apart({"sequence": 2, "tensor": 2}, "zigzag", "gather", *arrays)


@pytest.mark.parametrize(
    ("exchange", "present", "absent"),
    [
        ("gather", {"all-gather", "reduce-scatter"}, {"collective-permute"}),
        ("ring", {"collective-permute"}, {"all-gather", "reduce-scatter"}),
    ],
)
def test_what_travels(exchange, present, absent):
    """Gathering holds whole rows of keys; around the ring no rank ever does."""
    mesh = make_mesh({"sequence": 4}, jax.devices()[:4])
    q, k, v, do, start, end = inputs(heads=4, key_heads=2)

    def loss(q, k, v):
        o = context.softmax_attention(q, k, v, start, end, scale=0.3, order="zigzag", exchange=exchange)
        return (o * do).sum()

    tokens = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), in_shardings=(tokens,) * 3)
        text = gradient.lower(q, k, v).compile().as_text()
    kinds = {kind for kind in present | absent if f" {kind}(" in text or f" {kind}-start(" in text}
    assert kinds == present
