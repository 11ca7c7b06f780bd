"""What is saved comes back: every kind of leaf, on any mesh, whole or in part, while training goes on."""

import json
import threading
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmx_jax.checkpoint import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointStore,
    layout,
)
from mmx_jax.checkpoint.writer import StepHandler, StepRestore, StepSave

SHAPE = (16, 8, 24)


def mesh(devices: int, names: tuple[str, ...] = ("fsdp", "tensor")) -> Mesh:
    shape = {8: (4, 2), 4: (2, 2), 1: (1, 1)}[devices]
    return Mesh(np.array(jax.devices()[:devices]).reshape(shape), names)


def values(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def equal(left: object, right: object) -> bool:
    def same(a: object, b: object) -> bool:
        if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert type(a) is type(b)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
        return np.asarray(a).tobytes() == np.asarray(b).tobytes()

    assert jax.tree.structure(left) == jax.tree.structure(right)
    return all(jax.tree.leaves(jax.tree.map(same, left, right)))


def test_every_kind_of_leaf(tmp_path: Path) -> None:
    params = {
        "embedding": jax.device_put(values(0), NamedSharding(mesh(8), P("fsdp", None, "tensor"))),
        "scan/0/attention/qkv": jax.device_put(values(1).astype(jnp.bfloat16), NamedSharding(mesh(8), P(None, "fsdp"))),
        "scale": jnp.float32(0.25),
        "bytes": jnp.arange(-8, 8, dtype=jnp.int8),
        "mask": jnp.array([True, False, True]),
    }
    trained = {name: value for name, value in params.items() if value.dtype == jnp.float32}
    tree = {
        "params": params,
        "optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(trained),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(8, impl="rbg"), 3),
        "zeros": jnp.zeros((4, 4)),
        "nothing": np.zeros((0, 3)),
        "host": np.arange(5, dtype=np.int64),
        "number": 3,
        "ratio": 0.1,
        "flag": True,
        "none": None,
        "odd name/with spaces %": np.float64(1 / 3) * np.ones(2),
    }
    metadata = {"tokens": 123, "config": {"model": {"layers": [1, 2]}}, "ratio": 0.1, "text": "λ"}
    with CheckpointStore(tmp_path) as store:
        store.save(5, tree, metadata)
        restored = store.restore(tree)
        assert store.verify(5) == []
        assert store.metadata(5) == metadata
    assert (restored.step, restored.metadata) == (5, metadata)
    assert equal(restored.tree, tree)
    for name, value in params.items():
        assert restored.tree["params"][name].sharding.is_equivalent_to(value.sharding, value.ndim)


@pytest.mark.parametrize("saved_on", [8, 1])
@pytest.mark.parametrize("restored_on", [8, 4, 1])
def test_another_mesh(tmp_path: Path, saved_on: int, restored_on: int) -> None:
    """8 -> 4 -> 1 devices, split along other axes than at the save, and verified: a wrong bit is seen from any mesh."""
    source = {
        "a": jax.device_put(values(2), NamedSharding(mesh(saved_on), P("fsdp", "tensor"))),
        "b": jax.device_put(values(3), NamedSharding(mesh(saved_on), P(None, None, ("tensor", "fsdp")))),
        "c": jax.device_put(values(4), NamedSharding(mesh(saved_on), P())),
    }
    specs = {"a": P(None, ("fsdp", "tensor")), "b": P("tensor", "fsdp"), "c": P("fsdp", None, "tensor")}
    abstract = {
        name: jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=NamedSharding(mesh(restored_on), spec))
        for name, spec in specs.items()
    }
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"params": source}, {})
        restored = store.restore({"params": abstract}).tree["params"]
        for i, name in enumerate("abc"):
            assert np.array_equal(np.asarray(restored[name]), values(2 + i))
            assert restored[name].sharding == abstract[name].sharding
        files = sorted((tmp_path / "00000001/arrays").glob("params.[ab]/c.*"))
        assert len(files) == 2 * saved_on, "one chunk a shard"
        assert len(list((tmp_path / "00000001/arrays").glob("params.c/c.*"))) == 1, "replicas are written once"
        for file in files:
            data = file.read_bytes()
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            with pytest.raises(CheckpointError, match=file.name):
                store.restore({"params": abstract}, 1)
            file.write_bytes(data)
        assert np.array_equal(np.asarray(store.restore({"params": abstract}, 1).tree["params"]["b"]), values(3))


def test_format_is_what_the_documentation_says(tmp_path: Path) -> None:
    """The files, read with numpy, json and zlib alone, hold the arrays and their checksums."""
    sharding = NamedSharding(mesh(8), P("fsdp", None, "tensor"))
    with CheckpointStore(tmp_path) as store:
        store.save(1200, {"params": {"scan/0/qkv": jax.device_put(values(5), sharding)}}, {"tokens": 9})
    step = tmp_path / "00001200"
    sealed = json.loads((step / "checksums.json").read_text())
    about = sealed["content"]["arrays"]["params/scan/0/qkv"]
    assert {k: about[k] for k in ("shape", "dtype", "chunk")} == {
        "shape": [16, 8, 24],
        "dtype": "float32",
        "chunk": [4, 8, 12],
    }
    whole = np.zeros(SHAPE, np.float32)
    for i in range(4):
        for j in range(2):
            data = (step / f"arrays/params.scan.0.qkv/c.{i}.0.{j}").read_bytes()
            assert f"{zlib.crc32(data):08x}" == about["files"][f"c.{i}.0.{j}"]
            whole[4 * i : 4 * i + 4, :, 12 * j : 12 * j + 12] = np.frombuffer(data, np.float32).reshape(4, 8, 12)
    assert np.array_equal(whole, values(5))
    metadata = (step / "metadata.json").read_bytes()
    assert json.loads(metadata) == {"format": 1, "step": 1200, "permanent": False, "metadata": {"tokens": 9}}
    assert sealed["content"]["metadata.json"] == f"{zlib.crc32(metadata):08x}"


def test_step_written_chunk_by_chunk(tmp_path: Path) -> None:
    """An import writes one source tensor a chunk; the trainer's restore reads slices of it on a mesh, and verifies."""
    groups, run, experts, width, hidden = 2, 2, 4, 8, 6
    record = layout.ArrayRecord("params/w", (groups, run, experts, width, hidden), "bfloat16", (1, 1, 1, width, hidden))
    stack = values(6, record.shape).astype(jnp.bfloat16)
    temporary = tmp_path / "import.tmp"
    temporary.mkdir()
    layout.write_metadata(temporary, 0, {"source": "elsewhere"}, permanent=True)
    checksums = {layout.ARRAY_FILE: layout.create_array(temporary, record)}
    array = layout.open_for_chunks(temporary, record)
    for index in list(record.chunks())[:-1]:
        checksums[record.chunk_file(index)] = layout.write_chunk(
            array, record, index, stack[record.chunk_slices(index)]
        )
    with pytest.raises(ValueError, match=r"params/w.*c\.1\.1\.3\.0\.0"):
        layout.write_checksums(temporary, [record], {record.name: checksums})
    last = (1, 1, 3, 0, 0)
    checksums[record.chunk_file(last)] = layout.write_chunk(array, record, last, stack[record.chunk_slices(last)])
    layout.write_checksums(temporary, [record], {record.name: checksums})
    temporary.rename(tmp_path / "00000000")
    sharding = NamedSharding(mesh(8), P(None, None, "tensor", None, None))
    store = CheckpointStore(tmp_path)
    restored = store.restore({"params": {"w": jax.ShapeDtypeStruct(record.shape, jnp.bfloat16, sharding=sharding)}})
    assert np.array_equal(np.asarray(restored.tree["params"]["w"]), stack)
    assert store.verify(0) == []
    wide = store.restore({"params": {"w": jax.ShapeDtypeStruct(record.shape, jnp.float32)}}, cast=True)
    assert np.array_equal(np.asarray(wide.tree["params"]["w"]), stack.astype(np.float32))


def test_orbax_alone_drives_the_handler(tmp_path: Path) -> None:
    """The step handler is an ordinary Orbax handler: what it writes that way, the store restores, and the reverse."""
    tree = {"params": {"w": jax.device_put(values(12), NamedSharding(mesh(8), P("tensor")))}}
    with ocp.Checkpointer(StepHandler()) as checkpointer:
        checkpointer.save(tmp_path / "00000003", args=StepSave(tree, 3, {"tokens": 1}))
        restored = checkpointer.restore(tmp_path / "00000003", args=StepRestore(tree))
    assert equal(restored, tree)
    assert equal(CheckpointStore(tmp_path).restore(tree, 3).tree, tree)


def test_part_of_a_tree(tmp_path: Path) -> None:
    """Parameters alone are restored without touching the optimizer's files."""
    tree = {"params": {"w": jnp.asarray(values(7))}, "optimizer": {"mu": jnp.asarray(values(8))}}
    with CheckpointStore(tmp_path) as store:
        store.save(1, tree, {})
        store.wait()
        (tmp_path / "00000001/arrays/optimizer.mu/c.0.0.0").unlink()
        part = store.restore({"params": {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}})
        assert np.array_equal(np.asarray(part.tree["params"]["w"]), values(7))
        with pytest.raises(CheckpointError, match="optimizer/mu"):
            store.restore(tree)


def test_another_configuration_is_named(tmp_path: Path) -> None:
    tree = {
        "params": {"w": jnp.zeros((4, 8)), "v": jnp.zeros(3), "gate": jnp.zeros(2)},
        "optimizer": {"n": jnp.zeros(1)},
    }
    with CheckpointStore(tmp_path) as store:
        store.save(1, tree, {})
        asked = {"w": jax.ShapeDtypeStruct((4, 16), jnp.float32), "v": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}
        with pytest.raises(CheckpointMismatchError) as caught:
            store.restore({"params": {**asked, "bias": jax.ShapeDtypeStruct((7,), jnp.float32)}})
    for text in (
        "params/w: stored with shape (4, 8), asked for with (4, 16)",
        "params/v: stored as float32, asked for as bfloat16",
        "params/bias: asked for with shape (7,), not stored",
        "params/gate: stored with shape (2,), not asked for",
    ):
        assert text in str(caught.value)
    assert "optimizer/" not in str(caught.value)


def test_names_and_metadata_that_cannot_be_stored(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(CheckpointError, match=r"'a/b/c'.*share"):
            store.save(1, {"a": {"b/c": jnp.zeros(1)}, "a/b": {"c": jnp.zeros(1)}}, {})
        with pytest.raises(CheckpointError, match="cannot name a folder"):
            store.save(1, jnp.zeros(1), {})
        with pytest.raises(CheckpointError, match=r"metadata is not JSON.*int32"):
            store.save(1, {"a": jnp.zeros(1)}, {"step": np.int32(3)})
        with pytest.raises(CheckpointError, match=r"'name'.*no array of numbers"):
            store.save(1, {"name": "text"}, {})
        with pytest.raises(CheckpointError, match=r"step -1 .*0 or more"):
            store.save(-1, {"a": jnp.zeros(1)}, {})
        with pytest.raises(CheckpointNotFoundError, match="holds no checkpoint"):
            store.restore({"a": jnp.zeros(1)})
        store.save(1, {"a": jnp.zeros(1)}, {})
        with pytest.raises(CheckpointError, match=r"step 1 .*saved already"):
            store.save(1, {"a": jnp.zeros(1)}, {})
        with pytest.raises(CheckpointNotFoundError, match=r"step 4 .*complete steps: 1"):
            store.restore({"a": jnp.zeros(1)}, 4)


def test_object_store_address_is_refused() -> None:
    with pytest.raises(CheckpointError, match="mount the bucket"):
        CheckpointStore("gs://bucket/run")


def test_saving_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """save() returns while no byte is written yet, the state may be donated, and the step holds the old values."""
    disk_is_slow = threading.Event()
    write_chunk = layout.write_chunk

    def slow(*arguments: object) -> str:
        assert disk_is_slow.wait(30)
        return write_chunk(*arguments)

    monkeypatch.setattr(layout, "write_chunk", slow)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"w": jax.device_put(values(9), NamedSharding(mesh(8), P("fsdp", "tensor"))), "n": jnp.int32(0)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"params": state}, {})
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        assert store.steps() == []
        disk_is_slow.set()
        restored = store.restore({"params": abstract})
    assert int(restored.tree["params"]["n"]) == 0
    assert np.array_equal(np.asarray(restored.tree["params"]["w"]), values(9))


def test_restored_arrays_may_be_donated(tmp_path: Path) -> None:
    """A donating step on restored arrays computes what it computes on fresh ones."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"params": {"w": jnp.asarray(values(10)), "m": jnp.asarray(values(11))}}, {})
        abstract = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
        state = store.restore({"params": {"w": abstract, "m": abstract}}).tree
        for _ in range(4):
            state = step(state)
        again = store.restore({"params": {"w": abstract, "m": abstract}}).tree
    np.testing.assert_allclose(np.asarray(state["params"]["m"]), values(11) * 16 + 15, rtol=1e-6, atol=1e-6)
    assert np.array_equal(np.asarray(again["params"]["w"]), values(10))
