"""Bad input: each case names file and tensor, and leaves nothing that looks like a whole result."""

import errno
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest

from mmx_jax.checkpoint import CheckpointDamagedError, CheckpointStore
from mmx_jax.convert import (
    ConfigSchemaError,
    ConvertError,
    WeightsFileError,
    WeightsMismatchError,
    export_weights,
    exporting,
    import_weights,
    importing,
    load_safetensors,
)
from mmx_jax.convert.__main__ import parse_size
from mmx_jax.convert.safetensors import read_folder, read_header
from mmx_jax.convert.source import is_finite, read_config
from tests.fidelity.common import hub_config, tiny_folder, tiny_weights, write_folder

INDEX = "model.safetensors.index.json"
GATE = "model.layers.2.block_sparse_moe.experts.1.w1.weight"


def write_raw(path, header, data=b"", length=None):
    """A safetensors file with any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def assert_refused(source, work, error, *words):
    """Import and direct loading both refuse, name what the words say, and leave no step."""
    for attempt in (lambda: import_weights(source, work, progress=False),
                    lambda: load_safetensors(source, read_config(source))):  # fmt: skip
        with pytest.raises(error) as caught:
            attempt()
        for word in words:
            assert word in str(caught.value), str(caught.value)
    assert CheckpointStore(work / "checkpoints").steps() == []


@pytest.fixture
def source(tmp_path):
    return tiny_folder(tmp_path / "source", shards=3)[0]


def edit_index(source, change):
    index = json.loads((source / INDEX).read_text())
    change(index["weight_map"])
    (source / INDEX).write_text(json.dumps(index))
    return index["weight_map"]


def test_missing_shard(source, tmp_path):
    file = json.loads((source / INDEX).read_text())["weight_map"][GATE]
    (source / file).unlink()
    assert_refused(source, tmp_path / "work", WeightsFileError, file, "is missing", "model.")


def test_missing_index(source, tmp_path):
    (source / INDEX).unlink()
    assert_refused(source, tmp_path / "work", WeightsFileError, INDEX, "is missing", "3 safetensors files")


def test_truncated_shard(source, tmp_path):
    file = source / "model-00002-of-00003.safetensors"
    os.truncate(file, file.stat().st_size - 5)
    assert_refused(source, tmp_path / "work", WeightsFileError, file.name, "tensor 'model.", "truncated")


def test_shard_cut_after_its_header_was_read(source, tmp_path, monkeypatch):
    """A file that shrinks while it is read is noticed as well."""
    original = importing.SourceFolder.__init__

    def cut(self, *args):
        original(self, *args)
        for file in source.glob("*.safetensors"):
            os.truncate(file, file.stat().st_size // 2)

    monkeypatch.setattr(importing.SourceFolder, "__init__", cut)
    with pytest.raises(WeightsFileError, match="ends inside tensor"):
        import_weights(source, tmp_path / "work", progress=False)
    assert CheckpointStore(tmp_path / "work" / "checkpoints").steps() == []


HEADERS = {
    "past the end": ({"a": entry(0, 16, (4,))}, b"\0" * 8, "outside"),
    "size against shape": ({"a": entry(0, 8, (4,))}, b"\0" * 8, "needs 16 bytes"),
    "reversed": ({"a": entry(8, 0)}, b"\0" * 8, "outside"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12, "overlaps"),
    "gap": ({"a": entry(0, 8), "b": entry(12, 20)}, b"\0" * 20, "leaves a gap"),
    "trailing bytes": ({"a": entry(0, 8)}, b"\0" * 12, "belong to no tensor"),
    "negative": ({"a": entry(-8, 0)}, b"\0" * 8, "natural"),
    "negative shape": ({"a": entry(0, 8, (-1, -2))}, b"\0" * 8, "natural"),
    "huge shape": ({"a": entry(0, 8, (2**62, 2**62))}, b"\0" * 8, "needs"),
    "many dims": ({"a": entry(0, 8, (1,) * 1000)}, b"\0" * 8, "at most 32"),
    "fraction": ({"a": entry(0.0, 8.0)}, b"\0" * 8, "natural"),
    "true": ({"a": entry(False, 8)}, b"\0" * 8, "natural"),
    "dtype": ({"a": entry(0, 8, dtype="F33")}, b"\0" * 8, "F33"),
    "dtype of no text": ({"a": entry(0, 8, dtype=["F32"])}, b"\0" * 8, "dtype"),
    "no entry": ({"a": 3}, b"", "exactly dtype, shape and data_offsets"),
    "more keys": ({"a": entry(0, 8) | {"code": 1}}, b"\0" * 8, "exactly"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "list": (b"[1, 2]", b"", "does not start"),
    "broken json": (b'{"a": ', b"", "JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", "JSON"),
    "duplicate": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                  b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4, "'a' appears twice"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "JSON"),
    "long number": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,4]}}', b"", "JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_lying_headers(case, tmp_path):
    header, data, word = HEADERS[case]
    with pytest.raises(WeightsFileError, match=word) as caught:
        read_header(write_raw(tmp_path / "model.safetensors", header, data))
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [2**63, 10**9, 3])
def test_lying_header_length(length, tmp_path):
    with pytest.raises(WeightsFileError, match=r"claims a header|JSON"):
        read_header(write_raw(tmp_path / "model.safetensors", {"a": entry(0, 8)}, b"\0" * 8, length))


@pytest.mark.parametrize("size", [0, 1, 7, 8])
def test_tiny_files(size, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\1" * size)
    with pytest.raises(WeightsFileError, match=r"model\.safetensors"):
        read_header(path)


def test_missing_unexpected_and_duplicate_keys(tmp_path):
    tensors = tiny_weights(read_config(tiny_folder(tmp_path / "good")[0]))
    gate = tensors.pop(GATE)
    source = write_folder(tmp_path / "bad", hub_config(), tensors | {"model.layers.2.bias": gate})
    assert_refused(source, tmp_path / "work", WeightsMismatchError, f"{GATE}: missing", "model.layers.2.bias in model",
                   "unexpected")  # fmt: skip
    source = write_folder(tmp_path / "twice", hub_config(), tensors | {GATE: gate}, shards=2)
    holder = json.loads((source / INDEX).read_text())["weight_map"][GATE]
    other = next(f for f in source.glob("*.safetensors") if f.name != holder)
    held = {name: t for name, t in tensors.items() if json.loads((source / INDEX).read_text())["weight_map"][name]
            == other.name}  # fmt: skip
    import safetensors.numpy

    safetensors.numpy.save_file(held | {GATE: gate}, other)
    assert_refused(source, tmp_path / "work", WeightsFileError, other.name, GATE, holder)
    text = (source / INDEX).read_text().replace('"weight_map": {', f'"weight_map": {{"{GATE}": "{other.name}", ')
    (source / INDEX).write_text(text)
    assert_refused(source, tmp_path / "work", WeightsFileError, INDEX, GATE, "twice")


def test_tensor_that_is_not_where_the_index_says(source, tmp_path):
    name = "model.norm.weight"
    edit_index(source, lambda weights: weights.update({name: sorted(set(weights.values()) - {weights[name]})[0]}))
    assert_refused(source, tmp_path / "work", WeightsFileError, name)


@pytest.mark.parametrize(("values", "words"), [
    (np.zeros((20, 23), np.float32), ("[20, 23]", "[20, 24]")),
    (np.zeros((24, 20), np.float32), ("[24, 20]",)),
    (np.zeros((20, 24), np.int8), ("I8", "F32")),
])  # fmt: skip
def test_wrong_shape_or_dtype(values, words, tmp_path):
    source, tensors = tiny_folder(tmp_path / "source", shards=1)
    write_folder(source, hub_config(), tensors | {GATE: values})
    assert_refused(source, tmp_path / "work", WeightsMismatchError, GATE, "model.safetensors", *words)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(value, tmp_path):
    source, tensors = tiny_folder(tmp_path / "source", shards=1)
    bad = tensors[GATE].copy()
    bad[3, 17] = value
    write_folder(source, hub_config(), tensors | {GATE: bad})
    assert_refused(source, tmp_path / "work", WeightsMismatchError, GATE, "model.safetensors", "(3, 17)")


def test_values_that_overflow_the_dtype_asked_for(tmp_path):
    source, tensors = tiny_folder(tmp_path / "source", shards=1)
    bad = tensors[GATE].astype(np.float64)
    bad[0, 1] = 1e39
    write_folder(source, hub_config(), tensors | {GATE: bad})
    for attempt in (lambda: import_weights(source, tmp_path / "work", dtype="fp32", progress=False),
                    lambda: load_safetensors(source, read_config(source))):  # fmt: skip
        with pytest.raises(WeightsMismatchError) as caught:
            attempt()
        assert GATE in str(caught.value)
        assert "(0, 1)" in str(caught.value)


def test_rounding_of_f64_must_be_asked_for(tmp_path):
    """A checkpoint holds fp32 at most: without --dtype nothing is rounded unsaid."""
    source, tensors = tiny_folder(tmp_path / "source", shards=1)
    write_folder(source, hub_config(), tensors | {GATE: tensors[GATE].astype(np.float64) * (1 + 1e-12)})
    with pytest.raises(WeightsFileError, match=rf"{GATE}.* is F64.*--dtype fp32"):
        import_weights(source, tmp_path / "work", progress=False)
    assert not (tmp_path / "work").exists()
    import_weights(source, tmp_path / "work", dtype="fp32", progress=False)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_finiteness_by_bits(dtype):
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    values = np.array([0.0, -0.0, float(ml_dtypes.finfo(kind).max), float(ml_dtypes.finfo(kind).tiny)], kind)
    assert is_finite(values)
    for bad in (np.nan, np.inf, -np.inf):
        assert not is_finite(np.append(values, np.array([bad], kind)))


class Danger:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickles_are_refused(name, tmp_path):
    source, work = tmp_path / "source", tmp_path / "work"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(hub_config()))
    (source / name).write_bytes(pickle.dumps(Danger(tmp_path / "ran")))
    assert_refused(source, work, WeightsFileError, name, "pickle")
    assert not (tmp_path / "ran").exists()


def test_index_of_pickles_is_refused(source, tmp_path):
    edit_index(source, lambda weights: weights.update({GATE: "pytorch_model-00001.bin"}))
    assert_refused(source, tmp_path / "work", WeightsFileError, GATE, "pickles")


@pytest.mark.parametrize("path", ["../other.safetensors", "a" * 5000 + ".safetensors", "\ud800.safetensors", "", "..",
                                  "/etc/passwd.safetensors", "a/b.safetensors", "a\\b.safetensors", "x\0.safetensors",
                                  3])  # fmt: skip
def test_paths_that_leave_the_folder(path, source, tmp_path):
    shutil.copyfile(source / "model-00001-of-00003.safetensors", tmp_path / "other.safetensors")
    edit_index(source, lambda weights: weights.update({GATE: path}))
    assert_refused(source, tmp_path / "work", WeightsFileError, INDEX, GATE, "plain name")


def test_index_without_a_map(source):
    (source / INDEX).write_text("{}")
    with pytest.raises(WeightsFileError, match="weight_map"):
        read_folder(source)


def test_full_disk_midway(source, tmp_path, monkeypatch):
    """No step appears, the message says what to do, and the same command then goes on."""
    original, count = importing.layout.write_chunk, []

    def full(*args):
        count.append(1)
        if len(count) == 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    monkeypatch.setattr(importing.layout, "write_chunk", full)
    with pytest.raises(ConvertError, match=r"No space left on device.*same command"):
        import_weights(source, tmp_path / "work", progress=False)
    store = CheckpointStore(tmp_path / "work" / "checkpoints")
    assert store.steps() == []
    import_weights(source, tmp_path / "work", progress=False)
    assert store.verify(0) == []


def test_advice_fits_the_error(source, tmp_path, monkeypatch):
    """Room is asked for when the disk is full, and only then."""

    def denied(*args):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(importing.layout, "write_chunk", denied)
    with pytest.raises(ConvertError, match=r"Permission denied.*same command") as caught:
        import_weights(source, tmp_path / "work", progress=False)
    assert "room" not in str(caught.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX, "tokenizer_config.json",
                                  "model-00002-of-00003.safetensors"])  # fmt: skip
def test_pipes_are_refused_and_not_waited_for(name, source, tmp_path):
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    with pytest.raises(ConvertError, match=rf"{re.escape(name)}.*is no regular file"):
        import_weights(source, tmp_path / "work", progress=False)
    assert not (tmp_path / "work").exists()


def test_too_little_room_is_said_first(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(importing.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConvertError, match=r"needs \d+ kB, but 1\.00 kB are free"):
        import_weights(source, tmp_path / "work", progress=False)


def test_export_on_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch):
    import_weights(source, tmp_path / "work", progress=False)
    monkeypatch.setattr(
        exporting.os, "posix_fallocate", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    )
    with pytest.raises(ConvertError, match="was not written"):
        export_weights(tmp_path / "work", tmp_path / "out", "hub", progress=False)
    assert not any(path.name.startswith("out") for path in tmp_path.iterdir())


def test_export_of_a_damaged_checkpoint(source, tmp_path):
    """A flipped bit is found by its checksum, named, and nothing is exported."""
    step = import_weights(source, tmp_path / "work", progress=False)
    file = step / "arrays/params.head" / "c.0.0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointDamagedError, match=r"params/head.*c\.0\.0"):
        export_weights(tmp_path / "work", tmp_path / "out", "hub", progress=False)
    assert not any(path.name.startswith("out") for path in tmp_path.iterdir())


@pytest.mark.parametrize(("changes", "words"), [
    ({"hidden_size": 32}, ("model.embed_tokens.weight", "[61, 24]", "[61, 32]")),
    ({"num_local_experts": 5}, ("experts.4.w1.weight: missing",)),
    ({"num_local_experts": 3}, ("experts.3.w1.weight", "unexpected")),
    ({"attn_type_list": [0, 0, 1, 0]}, ("layers.2.self_attn.q_proj.weight: missing", "qkv_proj")),
    ({"num_hidden_layers": 3, "attn_type_list": [0, 0, 1]}, ("layers.3", "unexpected")),
])  # fmt: skip
def test_config_that_contradicts_the_tensors(changes, words, source, tmp_path):
    (source / "config.json").write_text(json.dumps(hub_config(**changes)))
    with pytest.raises(WeightsMismatchError) as caught:
        import_weights(source, tmp_path / "work", progress=False)
    text = "\n".join(caught.value.differences)
    for word in words:
        assert word in text


def test_missing_or_broken_config(source, tmp_path):
    (source / "config.json").write_text("[1]")
    with pytest.raises(ConfigSchemaError, match=r"config\.json"):
        import_weights(source, tmp_path / "work", progress=False)
    (source / "config.json").unlink()
    with pytest.raises(ConfigSchemaError, match=r"config\.json"):
        import_weights(source, tmp_path / "work", progress=False)


def test_nothing_is_overwritten(source, tmp_path):
    import_weights(source, tmp_path / "work", progress=False)
    with pytest.raises(ConvertError, match="there already"):
        import_weights(source, tmp_path / "work", progress=False)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConvertError, match="there already"):
        export_weights(tmp_path / "work", tmp_path / "out", "hub", progress=False)


def test_no_checkpoint(tmp_path):
    with pytest.raises(ConvertError, match="holds no checkpoint"):
        export_weights(tmp_path, tmp_path / "out", "hub", progress=False)


def test_sizes():
    assert parse_size("5GB") == 5 * 10**9
    assert parse_size("1.5 MiB") == 3 * 2**19
    for bad in ("5 apples", "", "-1GB", "0", "5", "0.1", "0.1KB", "999KB", "1e9GB", "9" * 5000 + "GB", "infGB"):
        with pytest.raises(ConvertError, match="size"):
            parse_size(bad)
