"""Mutated safetensors files: our error or a good file, never another exception, a hang or a large allocation."""

import resource

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmx_jax.convert import WeightsFileError
from mmx_jax.convert.safetensors import read_header

GOOD = safetensors.numpy.save(
    {"a.weight": np.ones((3, 4), np.float32), "b": np.ones(5, np.float16), "c": np.zeros((0, 2), np.float32)},
    {"format": "pt"},
)
HEADER = 8 + int.from_bytes(GOOD[:8], "little")
GROWTH_BYTES = 256 * 2**20

TOKENS = [b"[", b"{", b'"', b":", b",", b"0", b"-1", b"1e9", b"99999999999999999999", b"null", b"true", b"\\u0000",
          b"F64", b"BF16", b"\xff", b"__metadata__", b"data_offsets", b"[[[[", b"NaN"]  # fmt: skip

edits = st.one_of(
    st.tuples(st.just("byte"), st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=1)),
    st.tuples(st.just("put"), st.integers(0, HEADER), st.sampled_from(TOKENS)),
    st.tuples(st.just("over"), st.integers(0, HEADER), st.sampled_from(TOKENS)),
    st.tuples(st.just("cut"), st.integers(0, len(GOOD)), st.just(b"")),
    st.tuples(st.just("drop"), st.integers(0, len(GOOD)), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("length"), st.just(0), st.binary(min_size=8, max_size=8)),
    st.tuples(st.just("append"), st.just(0), st.binary(max_size=64)),
)


def mutate(data, kind, at, what):
    if kind in ("byte", "over", "length"):
        return data[:at] + what + data[at + len(what) :]
    if kind == "put":
        longer = data[:at] + what + data[at:]
        # Half of the insertions keep the header's length right, so that what follows it is reached.
        length = int.from_bytes(longer[:8], "little") + len(what) * (at % 2)
        return (length % 2**64).to_bytes(8, "little") + longer[8:]
    if kind == "cut":
        return data[:at]
    if kind == "drop":
        return data[:at] + data[at + len(what) :]
    return data + what


def read(path, data):
    """Reads a mutated file completely, as an import would."""
    path.write_bytes(data)
    try:
        for tensor in read_header(path).values():
            if tensor.shape:
                values = tensor.read_rows(0, tensor.shape[0])
                assert values.shape == tensor.shape
                assert values.nbytes <= len(data)
    except WeightsFileError as error:
        message = str(error)
    else:
        return
    assert str(path) in message


def fuzz(path, examples):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=examples, deadline=2000, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(edits, min_size=1, max_size=4), st.randoms())
    def run(changes, _):
        data = GOOD
        for kind, at, what in changes:
            data = mutate(data, kind, min(at, len(data)), what)
        read(path, data)

    run()
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert growth < GROWTH_BYTES


def test_the_unchanged_file_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    assert read_header(path)["a.weight"].read_rows(1, 3).tolist() == [[1.0] * 4] * 2


def test_mutated_files(tmp_path):
    fuzz(tmp_path / "model.safetensors", 200)


@pytest.mark.full
def test_many_mutated_files(tmp_path):
    fuzz(tmp_path / "model.safetensors", 10_000)
