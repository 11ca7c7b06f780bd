"""Mesh axes and sharding rules: what fits is built, what does not is named."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

from mmx_jax.config import ModelConfig, hybrid_layers
from mmx_jax.model import parameter_spec
from pallas_kernels import lightning
from parallel import local
from parallel.mesh import AXES, MeshError, make_mesh, resolve_sizes
from parallel.sharding import Rules, ShardingError, constrain


def test_every_axis_exists_with_size_one():
    mesh = make_mesh({}, devices=jax.devices()[:1])
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1)


def test_minus_one_takes_the_devices_that_are_left():
    assert resolve_sizes({"fsdp": -1, "tensor": 2}, 8) == {
        "data": 1, "fsdp": 4, "expert": 1, "sequence": 1, "tensor": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model": 2}, "unknown mesh axes.*model.*data, fsdp, expert, sequence, tensor"),
        ({"fsdp": -1, "tensor": 3}, "'fsdp' cannot be filled: 8 devices are no multiple of 3"),
        ({"data": 4}, "needs 4 devices, there are 8"),
        ({"data": 0, "fsdp": -1}, r"\{'data': 0\}: a size is at least 1, or -1"),
        ({"data": -2, "fsdp": -4}, r"\{'data': -2, 'fsdp': -4\}: a size is at least 1"),
        ({"data": -1, "fsdp": -1}, "data, fsdp: only one may be -1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
    with pytest.raises(MeshError, match=message):
        resolve_sizes(sizes, 8)


def test_rules_raise_with_names():
    rules = Rules()
    with pytest.raises(ShardingError, match="no rule for logical axis 'width'"):
        rules.spec(("width",))
    with pytest.raises(ShardingError, match=r"'heads' and 'ffn' .* both use mesh axis 'tensor'"):
        rules.spec(("heads", "ffn"))
    with pytest.raises(ShardingError, match=r"names mesh axes \['model'\]"):
        Rules(heads=("model",))
    mesh = make_mesh({"tensor": 8})
    with pytest.raises(ShardingError, match=r"qkv: dimension 1 \(heads\) has size 4, .* 8 shards"):
        rules.sharding(mesh, ("embed", "heads"), (64, 4), "qkv")


def test_key_heads_that_are_fewer_than_their_shards_are_not_split():
    """Every device holds all of them (INV-21 by `parallel.local`); more heads than shards must divide."""
    rules, axes = Rules(), ("embed", "kv_heads", None)
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    assert rules.sharding(mesh, axes, (64, 2, 8), "key").spec == P(("fsdp", "expert"), None, None)
    assert rules.sharding(mesh, axes, (64, 8, 8), "key").spec == P(("fsdp", "expert"), ("tensor",), None)
    with pytest.raises(ShardingError, match=r"key: dimension 1 \(kv_heads\) has size 6, .* 4 shards"):
        rules.sharding(mesh, axes, (64, 6, 8), "key")


def test_key_heads_that_fit_no_way_are_named():
    mesh = make_mesh({"tensor": 4}, jax.devices()[:4])
    q, keys, ids = jnp.zeros((1, 8, 12, 8)), jnp.zeros((1, 8, 3, 8)), jnp.zeros((1, 8), jnp.int32)
    with jax.set_mesh(mesh), pytest.raises(ShardingError, match=r"3 key/value heads and the 4 shards .*'tensor'"):
        jax.eval_shape(lambda: local.softmax_attention(q, keys, keys, ids, ids, scale=1.0))


def test_every_parameter_of_the_table_has_a_partition_on_every_kind_of_mesh():
    model = ModelConfig(
        vocab_size=128, hidden_size=64, layers=hybrid_layers(8), num_heads=8, num_kv_heads=8, head_dim=8, rotary_dim=4,
        ffn_hidden_size=64, num_experts=8,
    )  # fmt: skip
    for sizes in ({"fsdp": 8}, {"expert": 8}, {"tensor": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}):
        mesh = make_mesh(sizes)
        for path, spec in parameter_spec(model).items():
            assert Rules().sharding(mesh, spec.axes, spec.shape, path).mesh == mesh


def test_constrain_splits_on_the_mesh_in_use_and_is_nothing_without_one():
    x = jnp.ones((8, 16, 4))
    assert constrain(x, "batch", "sequence", None) is x
    mesh = make_mesh({"data": 4, "sequence": 2})
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x * 2, "batch", "sequence", None))(x)
    assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, P("data", "sequence")), y.ndim)


@pytest.fixture
def topology(compiler: None) -> Callable[..., list[jax.Device]]:
    """Devices of TPU slices that are not there."""
    return lambda name, **options: list(topologies.get_topology_desc(name, "tpu", **options).devices)


@pytest.mark.xdist_group("libtpu")
@pytest.mark.tpu_compiler
def test_only_data_and_fsdp_cross_slices(topology):
    """Two slices of 16 chips: the outer halves of data, or of fsdp, are slices; what cannot be halved is named."""
    devices = topology("v6e:4x4", num_slices=2)
    for sizes in ({"data": 2, "fsdp": 8, "expert": 2}, {"fsdp": 8, "tensor": 4}, {"data": 4, "fsdp": 4, "expert": 2}):
        mesh = make_mesh(sizes, devices)
        assert {axis: size for axis, size in mesh.shape.items() if size > 1} == sizes
        outer = mesh.devices.reshape(2, -1) if sizes.get("data") != 4 else mesh.devices.reshape(2, 2, -1)
        for half in range(2):
            assert {device.slice_index for device in outer[half].flat} == {half}
    with pytest.raises(MeshError, match="on 2 slices: data times fsdp must be a multiple of 2"):
        make_mesh({"expert": 8, "tensor": 4}, devices)


@pytest.mark.xdist_group("libtpu")
@pytest.mark.tpu_compiler
def test_neighbours_on_an_axis_are_neighbours_in_the_slice(topology):
    """Sizes that are products of the torus's own axes, and sizes that are not; every chip is used once."""
    devices = topology("v5p:4x4x8")
    for sizes in ({"fsdp": 16, "expert": 8}, {"fsdp": 16, "expert": 4, "tensor": 2}):
        mesh = make_mesh(sizes, devices)
        assert sorted(device.id for device in mesh.devices.flat) == sorted(device.id for device in devices)
        ring = [np.array(device.coords) for device in mesh.devices[0, 0, :, 0, 0]]
        steps = np.abs(np.diff(ring, axis=0))
        assert np.minimum(steps, np.array([4, 4, 8]) - steps).sum(axis=1).max() == 1


def test_cached_lightning_runs_on_its_own_rows_and_heads(monkeypatch: pytest.MonkeyPatch):
    """INV-31 on a mesh: prefill and decode give each device's kernels its part, and one device's results."""
    mesh = make_mesh({"data": 2, "tensor": 2}, devices=jax.devices()[:4])
    q, k, v = jax.random.normal(jax.random.key(0), (3, 4, 70, 2, 16))
    slopes, ids = jnp.array([0.5, 0.01]), jnp.ones((4, 70), jnp.int32).at[1, :9].set(0)
    state = jax.random.normal(jax.random.key(1), (4, 2, 16, 16))
    seen = []

    def step(q, k, v, state, slopes, *, original=lightning.decode_step):
        seen.append(q.shape)
        return original(q, k, v, state, slopes)

    monkeypatch.setattr(lightning, "decode_step", step)

    def run(q, k, v, slopes, ids, state):
        o, state = local.continued_lightning_attention(q, k, v, slopes, ids, state)
        return o, state, *local.decode_step(q[:, 0], k[:, 0], v[:, 0], state, slopes)

    expected = run(q, k, v, slopes, ids, state)
    with jax.set_mesh(mesh):
        actual = jax.jit(run)(q, k, v, slopes, ids, state)
    assert seen == [(4, 2, 16), (2, 1, 16)]
    for got, wanted in zip(actual, expected):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
