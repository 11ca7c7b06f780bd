"""int8 weights, one scale for each output channel, quantised at import (recipe §9.3)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx_jax.checkpoint import CheckpointStore
from mmx_jax.convert import ConvertError, compute_logits, export_weights, import_weights, importing, load_params
from mmx_jax.convert.names import tensor_map
from mmx_jax.convert.source import read_config
from mmx_jax.inference import GREEDY, Generator
from mmx_jax.inference.load import load_for_inference
from mmx_jax.model import parameter_spec
from mmx_jax.model.quantize import QuantizedWeight, is_quantizable, quantize_rows
from tests.fidelity.common import tiny_folder

EXCLUDED = ("embed_tokens", "lm_head", "block_sparse_moe.gate.", "norm")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """(config, stored tensors, int8 parameters) of a tiny model."""
    folder = tmp_path_factory.mktemp("int8")
    source, tensors = tiny_folder(folder / "source", shards=1)
    import_weights(source, folder / "float", progress=False)
    import_weights(source, folder / "int8", quantize="int8", progress=False)
    return folder, read_config(source), tensors


def test_one_scale_for_each_output_channel(imported):
    """Published exclusions stay exact; everything else is within half a step of its row's scale."""
    folder, config, tensors = imported
    _, params = load_params(folder / "int8")
    specs = parameter_spec(config)
    for name, tensor in tensor_map(config).items():
        weight = params[tensor.path]
        excluded = any(part in name for part in EXCLUDED)
        assert isinstance(weight, QuantizedWeight) != excluded, name
        assert is_quantizable(specs[tensor.path]) != excluded
        if excluded:
            np.testing.assert_array_equal(tensor.to_stored(np.asarray(weight)[tensor.index]), tensors[name])
            continue
        assert weight.values.dtype == jnp.int8
        ours = tensor.to_stored(np.asarray(weight.widened("float32"))[tensor.index])
        step = np.abs(tensors[name]).max(axis=1, keepdims=True) / 127
        assert np.all(np.abs(ours - tensors[name]) <= 0.5001 * step), name
        assert np.abs(np.asarray(weight.values)).max() == 127
        scales = np.asarray(weight.scale)[tensor.index]
        assert scales.size == tensor.shape[0]


def test_measured_logit_error(imported):
    """The dot policy widens int8 weights in every layer; logits stay close, and are those of the widened weights."""
    folder, config, _ = imported
    config = dataclasses.replace(config, compute_dtype="float32")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24)).astype(np.int32)
    exact = compute_logits(config, load_params(folder / "float")[1], tokens)
    quantized = load_params(folder / "int8")[1]
    ours = compute_logits(config, quantized, tokens)
    error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.03
    is_quantized = lambda leaf: isinstance(leaf, QuantizedWeight)  # noqa: E731
    widened = jax.tree.map(lambda w: w.widened("float32") if is_quantized(w) else w, quantized, is_leaf=is_quantized)
    np.testing.assert_allclose(ours, compute_logits(config, widened, tokens), rtol=1e-4, atol=1e-5)


def test_int8_checkpoint_generates_and_is_scored(imported):
    """Inference restores 8-bit weights as they are and chooses the tokens of its own full forward pass."""
    folder, _, _ = imported
    loaded = load_for_inference(folder / "int8")
    quantized = [path for path, weight in loaded.params.items() if isinstance(weight, QuantizedWeight)]
    assert any("experts" in path or "ffn" in path for path in quantized)
    assert not {"embedding", "head"} & set(quantized)
    config = dataclasses.replace(loaded.model, compute_dtype="float32")
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    generator = Generator(config, loaded.params, slots=1, kv_dtype="float32")
    chosen = generator.generate([prompt], GREEDY, max_new_tokens=4)[0]
    tokens = np.array([prompt + chosen], np.int32)
    logits = compute_logits(config, loaded.params, tokens)
    assert chosen == logits[0, len(prompt) - 1 : -1].argmax(axis=-1).tolist()


def test_int8_checkpoint_is_smaller_verified_and_not_exported(imported):
    folder, _, _ = imported
    store = CheckpointStore(folder / "int8" / "checkpoints")
    assert store.verify(0) == []
    assert store.metadata(0)["quantization"] == "int8"
    with pytest.raises(ConvertError, match="quantised"):
        export_weights(folder / "int8", folder / "out", "hub", progress=False)


def test_pieces_do_not_change_the_scales(imported, tmp_path, monkeypatch):
    folder, _, _ = imported
    monkeypatch.setattr(importing, "PIECE_BYTES", 700)
    import_weights(folder / "source", tmp_path / "work", quantize="int8", progress=False)
    whole, cut = load_params(folder / "int8")[1], load_params(tmp_path / "work")[1]
    assert jax.tree.structure(whole) == jax.tree.structure(cut)
    jax.tree.map(np.testing.assert_array_equal, whole, cut)


def test_rows_of_zeros():
    values, scale = quantize_rows(np.array([[0.0, 0.0], [1.0, -0.5]], np.float32))
    np.testing.assert_array_equal(values, [[0, 0], [127, -64]])
    np.testing.assert_array_equal(scale, np.array([[0], [1 / 127]], np.float32))


def test_rows_whose_scale_is_subnormal():
    """Such rows are zeros: at 127 levels their values would wrap to the other sign."""
    tiny = float(np.finfo(np.float32).tiny)
    largest = np.array([[2.0**-149], [200 * 2.0**-149], [tiny], [126 * tiny], [128 * tiny], [3e38]], np.float32)
    values, scale = quantize_rows(largest * np.array([[1, -1, 0.5]], np.float32))
    np.testing.assert_array_equal(values[:, 0], [0, 0, 0, 0, 127, 127])
    np.testing.assert_array_equal(values[:, 1], -values[:, 0])
    np.testing.assert_array_equal(scale[:, 0] > 0, values[:, 0] > 0)
