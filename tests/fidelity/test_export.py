"""What an export writes beside the weights, and what it leaves alone."""

import json
import os

import numpy as np
import pytest
import sentencepiece

from mmx_jax.convert import ConfigSchemaError, ConvertError, WeightsFileError, export_weights, import_weights
from mmx_jax.convert.source import read_config
from mmx_jax.convert.stored import StoredWeights
from mmx_jax.inference.load import load_for_inference
from tests.fidelity.common import tiny_folder

TEXT = ["to be or not to be", "that is the question", "whether it is nobler in the mind to suffer"]


def train_sentencepiece(folder, pieces, **options):
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4), model_prefix=str(folder / "tokenizer"), model_type="char", vocab_size=pieces,
        hard_vocab_limit=False, minloglevel=2, bos_id=-1, **options,
    )  # fmt: skip
    return folder


def exported(work, output, **options):
    folder = export_weights(work, output, "hub", progress=False, **options)
    return json.loads((folder / "generation_config.json").read_text()), json.loads((folder / "config.json").read_text())


def test_a_folder_of_the_user_stays(tmp_path):
    """Only what an export itself made is ever removed: also when it fails."""
    source, _ = tiny_folder(tmp_path / "source", shards=1)
    import_weights(source, tmp_path / "work", progress=False)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis").write_text("keep")
    exported(tmp_path / "work", tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis").read_text() == "keep"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmx_jax.convert.exporting.create_file", lambda *args: os.open(tmp_path / "none", os.O_RDONLY))
        with pytest.raises(ConvertError, match="was not written"):
            exported(tmp_path / "work", tmp_path / "second")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial", "source", "work"]
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(ConvertError, match="there already"):
        exported(tmp_path / "work", tmp_path / "link")


@pytest.mark.parametrize(("config", "generation", "first", "all_ids"), [
    ({}, {"eos_token_id": 0}, 0, 0),
    ({"eos_token_id": 0}, None, 0, 0),
    ({"eos_token_id": 5}, {"eos_token_id": [7, 3, 7]}, 7, [7, 3]),
    ({"eos_token_id": [4, 9]}, {"temperature": 0.5}, 4, [4, 9]),
    ({"eos_token_id": [4, 9]}, None, 4, [4, 9]),
    ({"eos_token_id": [5, 7]}, {"eos_token_id": []}, 5, [5, 7]),
    ({"eos_token_id": []}, {"eos_token_id": []}, None, []),
    ({}, None, None, None),
])  # fmt: skip
def test_end_of_text_ids_come_back(config, generation, first, all_ids, tmp_path, caplog):
    """INV-42: id 0 is an id; the first of several is the model's, none is lost, and it is said."""
    source, _ = tiny_folder(tmp_path / "source", shards=1, **config)
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    import_weights(source, tmp_path / "work", progress=False)
    assert load_for_inference(tmp_path / "work").model.end_of_text_id == first
    assert ("only at the first" in caplog.text) == (isinstance(all_ids, list) and len(all_ids) > 1)
    written, description = exported(tmp_path / "work", tmp_path / "out")
    assert written.get("eos_token_id") == description["eos_token_id"] == all_ids
    assert written.get("temperature") == (generation or {}).get("temperature")
    assert read_config(tmp_path / "out").end_of_text_id == first


@pytest.mark.parametrize("ids", ["5", True, 1.5, {"a": 1}, [[1]], [1, None], -1, 61, [1, 99], 2**70])
def test_end_of_text_ids_of_a_wrong_type(ids, tmp_path):
    source, _ = tiny_folder(tmp_path / "source", shards=1)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ConfigSchemaError, match="eos_token_id"):
        import_weights(source, tmp_path / "work", progress=False)


def test_a_tokenizer_that_is_named_must_be_one(tmp_path):
    """Missing, none, broken, or with more ids than the model: refused before a byte is written; a good one is used."""
    source, _ = tiny_folder(tmp_path / "source", shards=1)
    import_weights(source, tmp_path / "work", progress=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("[]")
    large, _ = tiny_folder(tmp_path / "few", shards=1, vocab_size=9)
    import_weights(large, tmp_path / "few_work", progress=False)
    good = train_sentencepiece(tmp_path / "good", 40)
    for work, folder, words in (
        ("work", "none", "no such folder"), ("work", "empty", "holds neither"), ("work", "broken", "tokenizer"),
        ("few_work", "good", "vocab_size is 9"),
    ):  # fmt: skip
        with pytest.raises(ConvertError, match=words):
            exported(tmp_path / work, tmp_path / "out", tokenizer=tmp_path / folder)
        assert not (tmp_path / "out").exists()
    exported(tmp_path / "work", tmp_path / "out", tokenizer=good)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (good / "tokenizer.model").read_bytes()


def test_another_tokenizer_folder_keeps_the_end_ids(tmp_path):
    """INV-42: the ids came with the weights; a tokenizer folder is asked for them only when the weights had none."""
    source, _ = tiny_folder(tmp_path / "source", shards=1, eos_token_id=[4, 9])
    import_weights(source, tmp_path / "work", progress=False)
    good = train_sentencepiece(tmp_path / "good", 40)
    (good / "generation_config.json").write_text('{"eos_token_id": 3, "temperature": 0.5}')
    written, _ = exported(tmp_path / "work", tmp_path / "out", tokenizer=good)
    assert (written["eos_token_id"], "temperature" in written) == ([4, 9], False)
    (tmp_path / "work" / "generation_config.json").unlink()
    written, _ = exported(tmp_path / "work", tmp_path / "second", tokenizer=good)
    assert (written["eos_token_id"], written["temperature"]) == (4, 0.5)


def test_suppressed_ids_of_the_source_stay(tmp_path):
    """INV-41: the ids without a token come on top of those that the model's own generation config forbids."""
    source, _ = tiny_folder(tmp_path / "source", shards=1, eos_token_id=5)
    train_sentencepiece(source, 40)
    tokens = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model")).vocab_size()
    (source / "generation_config.json").write_text('{"suppress_tokens": [60, 2, 7]}')
    import_weights(source, tmp_path / "work", progress=False)
    written, _ = exported(tmp_path / "work", tmp_path / "out")
    assert written["suppress_tokens"] == [2, 7, *range(tokens, 61)]
    (tmp_path / "work" / "generation_config.json").write_text('{"suppress_tokens": "2"}')
    with pytest.raises(ConfigSchemaError, match="suppress_tokens"):
        exported(tmp_path / "work", tmp_path / "second")


@pytest.mark.parametrize(("value", "dtype"), [(3.4028e38, "bf16"), (np.nan, None), (-np.inf, "fp32")])
def test_what_is_not_finite_is_not_exported(value, dtype, tmp_path, monkeypatch):
    """Rounding that overflows, or a diverged run: refused with tensor and place, and no folder is left."""
    source, _ = tiny_folder(tmp_path / "source", shards=1)
    import_weights(source, tmp_path / "work", progress=False)
    read = StoredWeights.read_rows

    def diverged(weights, name, start, stop):
        rows = read(weights, name, start, stop).copy()
        if name == "lm_head.weight":
            rows[3, 2] = value
        return rows

    monkeypatch.setattr(StoredWeights, "read_rows", diverged)
    with pytest.raises(ConvertError, match=r"lm_head\.weight in 00000000.* at \(3, 2\) is no finite"):
        exported(tmp_path / "work", tmp_path / "out", dtype=dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "work"]


@pytest.mark.parametrize("form", ["hub", "transformers"])
@pytest.mark.parametrize("nested", [False, True])
def test_values_that_no_field_holds_come_back(form, nested, tmp_path):
    """What only other people's code reads is the source's, not invented."""
    own = {
        "max_position_embeddings": 4096, "initializer_range": 0.006, "router_jitter_noise": 0.01, "bos_token_id": 3,
        "pad_token_id": 2, "output_router_logits": True,
    }  # fmt: skip
    source, _ = tiny_folder(tmp_path / "source", shards=1, **own)
    if nested:
        text = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({"model_type": "minimax_vl_01", "text_config": text}))
    import_weights(source, tmp_path / "work", progress=False)
    folder = export_weights(tmp_path / "work", tmp_path / "out", form, progress=False)
    assert own.items() <= json.loads((folder / "config.json").read_text()).items()


@pytest.mark.parametrize("place", ["checkpoints/00000001", "checkpoints/00000000/out", "checkpoints/a/../b/out"])
def test_nothing_is_written_among_checkpoints(place, tmp_path):
    source, _ = tiny_folder(tmp_path / "source", shards=1)
    import_weights(source, tmp_path / "work", progress=False)
    with pytest.raises(ConvertError, match="checkpoints holds checkpoints"):
        exported(tmp_path / "work", tmp_path / "work" / place)
    exported(tmp_path / "work", tmp_path / "work" / "out")


@pytest.mark.parametrize(("description", "words"), [
    ("{", "Expecting property name"), ("[1]", "one JSON object"), ('{"eos_token": 5}', "eos_token is 5; it must be"),
    ('{"eos_token": {"content": [1]}}', r"eos_token is \[1\]"),
])  # fmt: skip
def test_broken_tokenizer_descriptions(description, words, tmp_path):
    source, _ = tiny_folder(tmp_path / "source", shards=1)
    train_sentencepiece(source, 40)
    (source / "tokenizer_config.json").write_text(description)
    with pytest.raises(WeightsFileError, match=words):
        import_weights(source, tmp_path / "work", progress=False)


def test_advice_on_the_end_of_text_can_be_followed(tmp_path):
    """A conversion has no configuration of ours to set; what it asks for makes the same import work."""
    source, _ = tiny_folder(tmp_path / "source", shards=1)
    train_sentencepiece(source, 40, eos_id=-1)
    with pytest.raises(WeightsFileError, match=r"name it as eos_token in .*tokenizer_config\.json") as caught:
        import_weights(source, tmp_path / "work", progress=False)
    assert "tokenizer.end_of_text" not in str(caught.value)
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "t"}))
    import_weights(source, tmp_path / "work", progress=False)
    model = load_for_inference(tmp_path / "work").model
    assert np.isin(model.end_of_text_id, range(1, 40))
