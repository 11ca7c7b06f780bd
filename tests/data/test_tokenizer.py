"""Tokenizers: lossless, incremental, and readers of other people's files."""

import json
from pathlib import Path

import psutil
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmx_jax.config import TokenizerConfig
from mmx_jax.data import Tokenizer, TokenizerError, check_vocabulary, load_tokenizer, train_tokenizer
from mmx_jax.data import tokenizer as tokenizer_module
from mmx_jax.data.tokenizer import CHUNK_CHARACTERS
from tests.data.tokenizers import sentencepiece_with_prefix

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
CODE = st.text(" \t\n\r\x00_\u2581<0xE>aeé中🙂", max_size=60)


@pytest.fixture(scope="session")
def tokenizer(store_folder: Path) -> Tokenizer:
    return load_tokenizer(store_folder)


@settings(max_examples=200, deadline=None)
@given(st.one_of(TEXT, CODE))
@example("a\u2581 b\u2581\u2581")
@example(" \t\r\n  two  spaces  \r\n\r\n")
@example("<0x41> <unk> <|end_of_text|> \ufffd\ufeff\x00")
def test_round_trip_is_lossless(tokenizer: Tokenizer, text: str) -> None:
    """INV-43: encode/decode round-trips arbitrary UTF-8; so do the incremental decoder and the table of bytes."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text_id not in ids
    assert int(tokenizer.piece_bytes[ids].sum()) == len(text.encode()) if ids else not text
    decoder = tokenizer.stream_decoder()
    parts = [decoder.push(token) for token in ids]
    assert "".join(parts) + decoder.finish() == text
    assert not any("\ufffd" in part for part in parts) or "\ufffd" in text


@settings(max_examples=50, deadline=None)
@given(st.text("ab \n\t中", max_size=400), st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_chunks_have_no_influence(tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    """However the text is cut into chunks, the ids are the same, and they decode to the text."""
    pieces, position = [], 0
    while position < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[position : position + size])
        position += size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "CHUNK_CHARACTERS", 32)
        whole = [token for ids, _ in tokenizer.encode_chunks([text]) for token in ids.tolist()]
        cut = [token for ids, _ in tokenizer.encode_chunks(pieces) for token in ids.tolist()]
    assert cut == whole
    assert tokenizer.decode(whole) == text


def test_runs_equal_the_text_encoded_whole(tokenizer: Tokenizer, corpus: Path) -> None:
    """Where lines or spaces exist, encoding in runs gives exactly the ids of the whole text."""
    text = "".join(path.read_text() for path in sorted(corpus.glob("*.py")))[: 5 * CHUNK_CHARACTERS]
    for variant in (text, text.replace("\n", " ")):
        runs = list(tokenizer.encode_chunks([variant]))
        assert len(runs) > 4
        assert [token for ids, _ in runs for token in ids.tolist()] == tokenizer.encode(variant)
        assert sum(size for _, size in runs) == len(variant.encode())


def test_streaming_waits_for_whole_characters(tokenizer: Tokenizer) -> None:
    """Bytes of an unfinished character are held back; what never becomes whole is replaced at the end."""
    ids = tokenizer.encode("\U0001f642")
    assert len(ids) == 4
    decoder = tokenizer.stream_decoder()
    assert [decoder.push(token) for token in ids] == ["", "", "", "\U0001f642"]
    assert decoder.finish() == ""
    decoder = tokenizer.stream_decoder()
    assert decoder.push(ids[0]) == ""
    assert decoder.finish() == "\ufffd"


def test_training_leaves_no_escape(tokenizer: Tokenizer) -> None:
    """Line feeds, tabs and indentation are pieces; a carriage return is a byte."""
    assert [tokenizer.bytes_of(token) for token in tokenizer.encode("\n\t\r")] == [b"\n", b"\t", b"\r"]
    assert len(tokenizer.encode("        return")) <= 3
    assert tokenizer.vocab_size == 512
    assert tokenizer.piece_bytes[tokenizer.end_of_text_id] == 0


def _byte_level(folder: Path) -> Path:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|start|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat, then the hat"] * 20, trainer)
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_reads_byte_level_json(tmp_path: Path) -> None:
    """INV-43: a byte-level tokenizer.json round-trips any text, agrees with its library, and data cannot forge ids."""
    path = _byte_level(tmp_path)
    tokenizer = load_tokenizer(path)
    library = tokenizers.Tokenizer.from_file(str(path))
    for text in ("the cat\n\n  sat", "naïve 中文 🙂\x00\r\n", ""):
        ids = tokenizer.encode(text)
        assert ids == library.encode(text).ids
        assert tokenizer.decode(ids) == text == library.decode(ids)
    forged = "the <|endoftext|> cat"
    assert tokenizer.end_of_text_id not in tokenizer.encode(forged)
    assert tokenizer.decode(tokenizer.encode(forged)) == forged
    assert tokenizer.encode("<|start|>a", special=True)[0] == library.token_to_id("<|start|>")
    assert tokenizer.vocab_size == library.get_vocab_size()


def test_reads_models_with_a_prefix_space(tmp_path: Path) -> None:
    """The space that such models put before every text comes off at the start of a text, and only there."""
    tokenizer = load_tokenizer(sentencepiece_with_prefix(tmp_path))
    assert tokenizer.end_of_text == "</s>"
    for text in ("the cat", " the cat", "中 the"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        decoder = tokenizer.stream_decoder()
        assert "".join(map(decoder.push, tokenizer.encode(text))) + decoder.finish() == text
    decoder = tokenizer.stream_decoder(continuation=True)
    assert "".join(map(decoder.push, tokenizer.encode("the"))) == " the"
    assert tokenizer.decode(tokenizer.encode("the"), continuation=True) == " the"


def test_end_of_text_is_found_or_named(tmp_path: Path) -> None:
    """By argument, by tokenizer_config.json, by the usual names; otherwise an error says what to set."""
    path = _byte_level(tmp_path)
    assert load_tokenizer(path, "<|start|>").end_of_text == "<|start|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|start|>"}}))
    assert load_tokenizer(path).end_of_text == "<|start|>"
    with pytest.raises(TokenizerError, match=r"tokenizer\.json.*<nothing>.*tokenizer\.end_of_text"):
        load_tokenizer(path, "<nothing>")
    loaded = load_tokenizer(path)
    (tmp_path / "copy").mkdir()
    loaded.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").end_of_text_id == loaded.end_of_text_id


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    """Each error names the file."""
    (tmp_path / "a.model").write_bytes(b"not a model")
    (tmp_path / "a.json").write_text("{}")
    for name, words in {"a.model": "SentencePiece", "a.json": "tokenizer.json", "b.model": "no such"}.items():
        with pytest.raises(TokenizerError, match=f"{name}.*{words}"):
            load_tokenizer(tmp_path / name)
    path = _byte_level(tmp_path)
    for content in ("{", "[]", '{"eos_token": 7}'):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: no tokenizer configuration"):
            load_tokenizer(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.model nor"):
        load_tokenizer(tmp_path / "empty")


def test_too_little_text_for_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"5000 pieces.*smaller tokenizer\.vocab_size"):
        train_tokenizer(["a few words only\n"], tmp_path / "t.model", TokenizerConfig(vocab_size=5000))


def test_another_size_than_the_model() -> None:
    """Bad input: a tokenizer that does not fit the embedding; padding to a multiple of 256 is allowed."""
    check_vocabulary(200_026, 200_064)
    check_vocabulary(4096, 4096)
    for model in (200_000, 100_000, 210_000):
        with pytest.raises(TokenizerError, match=rf"200026 ids.*{model}.*model\.vocab_size"):
            check_vocabulary(200_026, model)


@pytest.mark.parametrize("megabytes", [5, pytest.param(100, marks=pytest.mark.full)])
def test_one_enormous_word(tokenizer: Tokenizer, megabytes: int) -> None:
    """A line without any white space is encoded in bounded memory."""
    process = psutil.Process()
    block = "abcdefghij" * 100_000
    size, before, most = 0, process.memory_info().rss, 0
    for _, run in tokenizer.encode_chunks(block for _ in range(megabytes)):
        size += run
        most = max(most, process.memory_info().rss)
    assert size == megabytes * 1_000_000
    assert most - before < 100_000_000
