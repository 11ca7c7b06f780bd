"""Chunks, names and sealed JSON: properties that must hold for every shape and every content."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx_jax.checkpoint import layout

LIMIT = 512
SHAPES = st.lists(st.one_of(st.integers(0, 9), st.sampled_from([16, 24, 31, 48])), max_size=3).map(tuple)


@settings(max_examples=200, deadline=None)
@given(shape=SHAPES, itemsize=st.sampled_from([1, 2, 4, 8]))
def test_chunks_tile_the_shard(shape: tuple[int, ...], itemsize: int) -> None:
    """Chunks divide the shard, keep to the limit unless a dimension cannot be cut well, and are not crumbs."""
    chunk = layout.chunk_shape(shape, itemsize, LIMIT)
    nbytes = math.prod(chunk) * itemsize
    dtype = {1: "int8", 2: "bfloat16", 4: "float32", 8: "int64"}[itemsize]
    record = layout.ArrayRecord("a", shape, dtype, chunk)
    assert record.chunk_nbytes == nbytes
    covered = np.zeros(shape, np.int32)
    for index in record.chunks():
        covered[record.chunk_slices(index)] += 1
    assert np.all(covered == 1)
    total = math.prod(shape) * itemsize
    if 0 < total <= LIMIT:
        assert chunk == shape, "a small shard is one chunk"
    if total > LIMIT:
        assert nbytes * 16 >= LIMIT, "no crumbs"
        if 31 not in shape:
            assert nbytes <= LIMIT


def test_chunk_is_one_piece_of_memory() -> None:
    """A stack of expert weights is cut along its leading axes, so that a chunk is contiguous."""
    assert layout.chunk_shape((10, 7, 4, 6144, 9216), 4) == (1, 1, 1, 3072, 9216)
    stack = np.zeros((4, 3, 8, 16), np.float32)
    chunk = layout.chunk_shape(stack.shape, 4, 1000)
    record = layout.ArrayRecord("a", stack.shape, "float32", chunk)
    assert all(stack[record.chunk_slices(index)].flags.c_contiguous for index in record.chunks())


def test_chunk_must_divide() -> None:
    with pytest.raises(ValueError, match=r"'w'.*\(4,\) does not divide shape \(6,\)"):
        layout.ArrayRecord("w", (6,), "float32", (4,))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(content=st.dictionaries(st.text(), JSON, max_size=4), data=st.data())
def test_sealed_json_notices_any_changed_byte(content: dict, data: st.DataObject) -> None:
    sealed = layout.seal(content)
    assert layout.unseal(sealed) == json.loads(json.dumps(content))
    position = data.draw(st.integers(0, len(sealed) - 1))
    changed = bytearray(sealed)
    changed[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ValueError, match=r"sealed|checksum"):
        layout.unseal(bytes(changed))
    with pytest.raises(ValueError, match=r"sealed|checksum"):
        layout.unseal(sealed[:position])
