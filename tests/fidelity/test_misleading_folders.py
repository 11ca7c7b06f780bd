"""Folders that others could read as another model, or as more than they hold: refused before a byte of data is read."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tokenizers

from mmx_jax.convert import ConvertError, WeightsFileError, WeightsMismatchError, check_conversion, import_weights
from mmx_jax.convert.source import read_config
from tests.fidelity.common import hub_config, tiny_folder, write_folder


@pytest.fixture
def source(tmp_path):
    return tiny_folder(tmp_path / "source", shards=1)[0]


def tokenizer_json(pieces):
    """A byte-level tokenizer.json of so many ids; the last is its end of text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet(), key=lambda piece: (piece != "a", piece))
    vocabulary = {piece: token for token, piece in enumerate(alphabet[: pieces - 1])} | {"</s>": pieces - 1}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend.to_str()


@pytest.mark.parametrize(("pieces", "eos", "words"), [
    (62, 5, ("has 62 ids", "vocab_size is 61")), (40, 55, ("has 40 ids", "id 55")), (40, [3, 40], ("id 40",)),
])  # fmt: skip
def test_tokenizers_that_do_not_fit(pieces, eos, words, source, tmp_path):
    """INV-41: ids without a token are never sampled, so that generation could not end at one."""
    (source / "tokenizer.json").write_text(tokenizer_json(pieces))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(WeightsFileError) as caught:
        import_weights(source, tmp_path / "work", progress=False)
    for word in ("tokenizer.json", *words):
        assert word in str(caught.value)
    (source / "tokenizer.json").write_text(tokenizer_json(61))
    assert read_config(source).trained_vocab_size == 61


def test_a_tokenizer_without_the_letter_a(source):
    (source / "tokenizer.json").write_text(tokenizer_json(1))
    with pytest.raises(WeightsFileError, match="no piece for the letter 'a'"):
        read_config(source)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.json",
                                  "tokenizer_config.json", "chat_template.jinja"])  # fmt: skip
def test_links_to_nothing_are_not_absent(name, source, tmp_path):
    (source / name).symlink_to(tmp_path / "nothing")
    with pytest.raises(ConvertError, match=re.escape(name)):
        import_weights(source, tmp_path / "work", progress=False)
    assert not (tmp_path / "work").exists()


BUFFER = "model.layers.{}.self_attn.{}"


@pytest.mark.parametrize(("form", "name", "values", "words"), [
    ("hub", BUFFER.format(0, "slope_rate"), np.zeros((8, 1, 1), np.float32), "only the transformers format"),
    ("native", BUFFER.format(7, "slope_rate"), np.zeros((8, 1, 1), np.float32), "no lightning layer"),
    ("native", BUFFER.format(99, "slope_rate"), np.zeros((8, 1, 1), np.float32), "no lightning layer"),
    ("native", BUFFER.format(0, "slope_rate"), np.zeros((8, 1, 1), np.int64), "I64"),
    ("native", BUFFER.format(0, "query_decay"), np.zeros((8, 9, 1), np.float32), "[8, 8, 1]"),
    ("native", BUFFER.format(0, "key_decay"), np.zeros((8, 8, 1), np.float32), None),
    ("native", BUFFER.format(0, "diagonal_decay"), np.zeros((1, 8, 8, 8), np.float32), None),
])  # fmt: skip
def test_decay_buffers_are_those_of_transformers(form, name, values, words, tmp_path):
    """Only what its code writes beside such a model is left out."""
    source, tensors = tiny_folder(tmp_path / "source", form, shards=1)
    config = json.loads((source / "config.json").read_text())
    write_folder(source, config, tensors | {name: values})
    if words is None:
        assert check_conversion(None, source).complete
        return
    with pytest.raises(WeightsMismatchError) as caught:
        check_conversion(None, source)
    assert name in str(caught.value)
    assert words in str(caught.value)


def test_a_tensor_with_and_without_the_prefix(tmp_path):
    _, tensors = tiny_folder(tmp_path / "text", shards=1)
    head = tensors["lm_head.weight"]
    prefixed = {f"language_model.{name}": value for name, value in tensors.items()} | {"lm_head.weight": head + 1}
    source = write_folder(tmp_path / "vision", {"model_type": "minimax_vl_01", "text_config": hub_config()}, prefixed)
    with pytest.raises(WeightsMismatchError, match=r"'lm_head\.weight'.* are both there"):
        import_weights(source, tmp_path / "work", progress=False)


def test_check_holds_the_folders_config_against_ours(source):
    config = read_config(source)
    assert check_conversion(config, source).complete
    other = check_conversion(dataclasses.replace(config, rope_base=1e4, ffn_alpha=2.5), source)
    assert not other.complete
    assert other.differences == (
        f"rope_base is 10000.0, {source / 'config.json'} says 10000000.0", "ffn_alpha is 2.5, the file says 2.0",
    )  # fmt: skip
    assert set(other.differences) <= {line.removeprefix("config.json ") for line in other.lines()}
