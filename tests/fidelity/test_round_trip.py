"""Released weights in and out again, bit by bit, through every door (INV-03)."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mmx_jax.checkpoint import CheckpointStore
from mmx_jax.convert import compare_weights, export_weights, import_weights, importing, load_safetensors, parse_config
from mmx_jax.convert.names import TensorSlice, decay_buffers, tensor_map
from mmx_jax.convert.source import read_config
from mmx_jax.inference.load import load_for_inference
from mmx_jax.model import parameter_spec
from mmx_jax.training.progress import Progress
from parallel.mesh import make_mesh
from parallel.sharding import Rules
from tests.fidelity.common import hub_config, tiny_folder, tiny_weights, write_folder

BF16 = ml_dtypes.bfloat16


def read_all(folder):
    """All tensors of a folder, by the safetensors library."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= safetensors.numpy.load_file(file)
    return out


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        np.testing.assert_array_equal(ours[name].reshape(-1).view(np.uint8), value.reshape(-1).view(np.uint8), name)


@pytest.mark.parametrize(("form", "shards", "dtype"), [("hub", 4, BF16), ("transformers", 1, np.float32)])
def test_there_and_back(tmp_path, form, shards, dtype):
    """HF -> ours -> HF, also across formats; only transformers' own buffers come on top."""
    source, tensors = tiny_folder(tmp_path / "source", form, shards, dtype)
    import_weights(source, tmp_path / "work", progress=False)
    assert CheckpointStore(tmp_path / "work" / "checkpoints").verify(0) == []
    for target in ("hub", "transformers"):
        folder = export_weights(tmp_path / "work", tmp_path / target, target, max_shard=20_000, progress=False)
        ours = read_all(folder)
        config = read_config(folder)
        buffers = dict(decay_buffers(config, 256)) if target == "transformers" else {}
        assert_same_bits({name: ours[name] for name in tensors}, tensors)
        assert ours.keys() - tensors.keys() == buffers.keys()
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == ours.keys()
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in ours.values())
        assert len(set(index["weight_map"].values())) > 5
        assert config == read_config(source)
        assert {d.problem for d in compare_weights(source, folder)} == {"equal"}
    assert {d.problem for d in compare_weights(tmp_path / "work", source)} == {"equal"}


def test_pieces_of_large_tensors(tmp_path, monkeypatch):
    """Tensors larger than a piece are cut by rows; the result is the same."""
    source, tensors = tiny_folder(tmp_path / "source", shards=2)
    monkeypatch.setattr(importing, "PIECE_BYTES", 700)
    monkeypatch.setattr("mmx_jax.convert.exporting.PIECE_BYTES", 500)
    import_weights(source, tmp_path / "work", progress=False)
    assert len(list((tmp_path / "work/checkpoints/00000000/arrays/params.head").iterdir())) > 2
    assert_same_bits(read_all(export_weights(tmp_path / "work", tmp_path / "out", "hub", progress=False)), tensors)


@pytest.mark.parametrize(("rows", "row_bytes", "pieces"), [
    (64, 8, 8), (63, 8, 9), (61, 8, 61), (5, 128, 5), (521, 1, 1), (65537, 1, 1), (2 * 65537, 1, 2),
])  # fmt: skip
def test_pieces_never_are_crumbs(rows, row_bytes, pieces):
    """64 bytes a piece: pieces divide the rows, at most 8 times as many as are needed, else fewer and larger ones."""
    tensor = TensorSlice("a", "a", (), (rows, 1), ((0,), (1,)))
    assert rows / tensor.units_per_piece(row_bytes, 64) == pieces


def mesh_shardings(config, **axes):
    mesh = make_mesh({"data": 1, "fsdp": 1, "expert": 1, "sequence": 1, "tensor": 1} | axes)
    rules = Rules()
    return {p: rules.sharding(mesh, s.axes, s.shape, p) for p, s in parameter_spec(config).items()}


WIDE = {"hidden_size": 32, "intermediate_size": 16, "vocab_size": 64}


def test_through_a_sharded_restore(tmp_path):
    """Restored on expert=4, tensor=2, saved from there with other chunks, exported: the same bits (issue 5, 2)."""
    source, tensors = tiny_folder(tmp_path / "source", **WIDE)
    config = read_config(source)
    import_weights(source, tmp_path / "work", progress=False)
    shardings = mesh_shardings(config, expert=4, tensor=2)
    store = CheckpointStore(tmp_path / "work" / "checkpoints")
    tree = {
        path: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=shardings[path])
        for path, spec in parameter_spec(config).items()
    }
    restored = store.restore({"params": tree})
    assert len(restored.tree["params"]["layers/0/0/ffn/gate"].sharding.device_set) == 8
    with CheckpointStore(tmp_path / "other" / "checkpoints") as other:
        other.save(7, restored.tree, restored.metadata)
    folder = export_weights(tmp_path / "other", tmp_path / "out", "hub", progress=False)
    assert_same_bits(read_all(folder), tensors)


@pytest.mark.parametrize("axes", [{"expert": 4, "tensor": 2}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_straight_into_sharded_arrays(tmp_path, axes):
    """init_from: the same values on any mesh as the import restores."""
    source, tensors = tiny_folder(tmp_path / "source", shards=3, dtype=BF16, **WIDE)
    config = read_config(source)
    shardings = mesh_shardings(config, **axes)
    params = load_safetensors(source, config, shardings)
    for name, tensor in tensor_map(config).items():
        array = params[tensor.path]
        assert array.sharding == shardings[tensor.path]
        assert array.dtype == jnp.float32
        ours = tensor.to_stored(np.asarray(array)[tensor.index])
        np.testing.assert_array_equal(ours, tensors[name].astype(np.float32), name)


def test_loading_reads_only_own_rows(tmp_path, monkeypatch):
    """A process whose devices hold half of the experts reads half of the experts."""
    source, _ = tiny_folder(tmp_path / "source", shards=1, **WIDE)
    config = read_config(source)
    read = []
    original = importing.SourceFolder.read_rows
    monkeypatch.setattr(
        importing.SourceFolder, "read_rows", lambda s, n, a, b: read.append((n, a, b)) or original(s, n, a, b)
    )

    class OneOfTwo:
        """Stands for a process that has the first of two expert shards."""

        def addressable_devices_indices_map(self, shape):
            return {jax.devices()[0]: (slice(None), slice(None), slice(0, 2), slice(None), slice(None))}

    from concurrent.futures import ThreadPoolExecutor

    from mmx_jax.convert import loading

    folder = importing.SourceFolder(source, config)
    spec = parameter_spec(config)["layers/0/0/ffn/gate"]
    slices = [t for t in folder.tensors.values() if t.path == spec.path]
    with ThreadPoolExecutor(1) as pool:
        pending = loading._Pending(folder, spec, slices, OneOfTwo(), "float32", pool)
        for future in pending.futures:
            future.result()
    assert {name.split(".experts.")[1].split(".")[0] for name, _, _ in read} == {"0", "1"}
    assert sum(b - a for _, a, b in read) == 3 * 2 * 16


def test_dtypes(tmp_path):
    """--dtype rounds once and restores in fp32; tensors of one parameter that differ in dtype become fp32."""
    source, tensors = tiny_folder(tmp_path / "source")
    import_weights(source, tmp_path / "bf16", dtype="bf16", progress=False)
    out = read_all(export_weights(tmp_path / "bf16", tmp_path / "out", "hub", progress=False))
    assert_same_bits(out, {name: value.astype(BF16) for name, value in tensors.items()})
    mixed = {name: value if name.endswith("gate.weight") or ".0." in name else value.astype(BF16)
             for name, value in tensors.items()}  # fmt: skip
    write_folder(tmp_path / "mixed", hub_config(), mixed)
    import_weights(tmp_path / "mixed", tmp_path / "work", progress=False)
    out = read_all(export_weights(tmp_path / "work", tmp_path / "out2", "hub", progress=False))
    for name, value in mixed.items():
        np.testing.assert_array_equal(out[name].astype(np.float32), value.astype(np.float32))


def test_vision_text_part(tmp_path):
    """MiniMax-VL-01: the text model is taken, with its prefix off, the vision part left alone."""
    config = hub_config(shared_intermediate_size=[0])
    tensors = tiny_weights(parse_config(config))
    stored = {f"language_model.{name}": value for name, value in tensors.items()}
    stored |= {
        "image_newline": np.ones(24, np.float32),
        "vision_tower.vision_model.pre_layrnorm.bias": np.ones(3, np.float32),
    }
    source = write_folder(tmp_path / "vl", {"model_type": "minimax_vl_01", "text_config": config}, stored, 2)
    import_weights(source, tmp_path / "work", progress=False)
    assert_same_bits(read_all(export_weights(tmp_path / "work", tmp_path / "out", "hub", progress=False)), tensors)


def test_decay_buffers_of_transformers_are_ignored(tmp_path):
    source, tensors = tiny_folder(tmp_path / "source", "transformers", shards=1)
    buffers = dict(decay_buffers(read_config(source), 8))
    write_folder(tmp_path / "with", json.loads((source / "config.json").read_text()), tensors | buffers, 2)
    import_weights(tmp_path / "with", tmp_path / "work", progress=False)
    assert_same_bits(read_all(export_weights(tmp_path / "work", tmp_path / "out", "hub", progress=False)), tensors)


def test_resumes_where_it_stopped(tmp_path, monkeypatch):
    """A killed import keeps its chunks, writes only the rest, and ends as one that was never stopped."""
    source, tensors = tiny_folder(tmp_path / "source")
    original, written = importing.layout.write_chunk, []

    def dying(store, record, index, value):
        if len(written) == 40:
            raise KeyboardInterrupt
        written.append(record.name)
        return original(store, record, index, value)

    monkeypatch.setattr(importing, "workers", lambda working_bytes: 1)
    monkeypatch.setattr(importing.layout, "write_chunk", dying)
    with pytest.raises(KeyboardInterrupt):
        import_weights(source, tmp_path / "work", progress=False)
    assert CheckpointStore(tmp_path / "work" / "checkpoints").steps() == []
    first = len(written)
    monkeypatch.setattr(importing.layout, "write_chunk", lambda *args: written.append(0) or original(*args))
    import_weights(source, tmp_path / "work", progress=False)
    assert len(written) == len(tensors)
    assert first == 40
    assert CheckpointStore(tmp_path / "work" / "checkpoints").verify(0) == []
    assert_same_bits(read_all(export_weights(tmp_path / "work", tmp_path / "out", "hub", progress=False)), tensors)


def test_changed_source_starts_anew(tmp_path, monkeypatch):
    """Chunks of another source are not taken over."""
    source, tensors = tiny_folder(tmp_path / "source", shards=1)
    original = importing._Import.commit
    monkeypatch.setattr(importing._Import, "commit", lambda *args: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        import_weights(source, tmp_path / "work", progress=False)
    monkeypatch.setattr(importing._Import, "commit", original)
    changed = {name: value + 1 for name, value in tensors.items()}
    write_folder(source, hub_config(), changed)
    import_weights(source, tmp_path / "work", progress=False)
    assert_same_bits(read_all(export_weights(tmp_path / "work", tmp_path / "out", "hub", progress=False)), changed)


def test_changed_config_starts_anew(tmp_path, monkeypatch):
    """The same tensors under another config.json (4 heads x 16 for 8 x 8) are other arrays: nothing is taken over."""
    source, tensors = tiny_folder(tmp_path / "source", shards=1)
    original = importing._Import.commit
    monkeypatch.setattr(importing._Import, "commit", lambda *args: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        import_weights(source, tmp_path / "work", progress=False)
    monkeypatch.setattr(importing._Import, "commit", original)
    other = hub_config(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    (source / "config.json").write_text(json.dumps(other))
    import_weights(source, tmp_path / "work", progress=False)
    assert CheckpointStore(tmp_path / "work" / "checkpoints").verify(0) == []
    assert_same_bits(read_all(export_weights(tmp_path / "work", tmp_path / "out", "hub", progress=False)), tensors)


def test_imported_weights_serve_inference(tmp_path):
    """An imported workdir is a workdir: the command that generates reads it."""
    source, _ = tiny_folder(tmp_path / "source", shards=1, eos_token_id=20)
    import_weights(source, tmp_path / "work", progress=False)
    loaded = load_for_inference(tmp_path / "work")
    assert loaded.model == read_config(source)
    assert loaded.model.end_of_text_id == 20
    assert Progress.from_dict(loaded.metadata["progress"]) == Progress(stage="imported")


def test_diff_opens_the_workdir_of_a_run(tmp_path):
    """A run's workdir has a config.json of its own; its steps are what is compared."""
    source, _ = tiny_folder(tmp_path / "source", shards=1)
    import_weights(source, tmp_path / "work", progress=False)
    (tmp_path / "work" / "config.json").write_text("{}")
    assert {d.problem for d in compare_weights(tmp_path / "work", source)} == {"equal"}


def test_diff_names_what_differs(tmp_path):
    source, tensors = tiny_folder(tmp_path / "source", shards=1)
    name = "model.layers.3.block_sparse_moe.experts.2.w2.weight"
    other = dict(tensors)
    other[name] = tensors[name].copy()
    other[name][4, 5] += 0.25
    other["lm_head.weight"] = tensors["lm_head.weight"].T.copy()
    del other["model.norm.weight"]
    other["extra"] = np.ones(3, np.float32)
    write_folder(tmp_path / "other", hub_config(), other)
    found = {d.name: d for d in compare_weights(source, tmp_path / "other") if d.problem != "equal"}
    assert {name: d.problem for name, d in found.items()} == {
        name: "values", "lm_head.weight": "shape", "model.norm.weight": "only in the first",
        "extra": "only in the second",
    }  # fmt: skip
    assert found[name].largest == pytest.approx(0.25)


def test_equal_values_of_other_bits_are_told(tmp_path):
    """-0.0 is 0.0, but the bits are others; scalars, empty tensors and infinite ones compare too."""
    one = {"zero": [0.0, 1.0], "scalar": 2.0, "same": [1.0], "empty": np.zeros((0, 3)), "flat": np.zeros((3, 0)),
           "nan": [np.nan, np.inf, 1.0], "far": [np.inf, 1.0, -3.0]}  # fmt: skip
    two = one | {"zero": [-0.0, 1.0], "scalar": 2.5, "far": [np.nan, 1.0, -3.0]}
    for name, tensors in (("a", one), ("b", two)):
        (tmp_path / name).mkdir()
        arrays = {key: np.array(value, np.float32) for key, value in tensors.items()}
        safetensors.numpy.save_file(arrays, tmp_path / name / "model.safetensors")
    found = {d.name: d for d in compare_weights(tmp_path / "a", tmp_path / "b")}
    assert {name: d.problem for name, d in found.items()} == {
        "zero": "bits", "scalar": "values", "same": "equal", "empty": "equal", "flat": "equal", "nan": "equal",
        "far": "values",
    }  # fmt: skip
    assert (found["scalar"].largest, found["scalar"].relative) == (0.5, 0.25)
    assert found["far"].largest == np.inf
