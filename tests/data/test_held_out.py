"""Held-out batches and the tables and compressor beside them."""

import lzma
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mmx_jax.config import PrepareConfig, TokenizerConfig
from mmx_jax.data import DataError, TokenStore, baselines, held_out_batches
from mmx_jax.data.prepare import prepare


@pytest.fixture(scope="session")
def held_out(store_folder: Path) -> TokenStore:
    return TokenStore(store_folder, "held_out")


@pytest.mark.parametrize("sequence_length", [16, 100, 100_000])
def test_every_held_out_token_is_scored_once(held_out: TokenStore, sequence_length: int) -> None:
    """All pairs inside documents are scored, whatever the window; bytes are those of all texts but the first pieces."""
    batches = held_out_batches(held_out, sequence_length, 4, source_id=3)
    seen: Counter = Counter()
    for batch in batches:
        assert batch.tokens.shape == (4, sequence_length)
        used = batch.loss_mask > 0
        assert (batch.segment_ids[used] > 0).all()
        assert (batch.source_id == 3).all()
        seen.update(zip(batch.tokens[used].tolist(), batch.targets[used].tolist(), strict=True))
    documents = [held_out.tokens(i).tolist() for i in range(len(held_out))]
    assert seen == Counter(pair for d in documents for pair in pairwise(d))
    assert seen.total() == batches.tokens_scored
    texts = [held_out.tokenizer.decode_bytes(d) for d in documents]
    first = [held_out.tokenizer.decode_bytes(d[:1]) for d in documents]
    assert batches.bytes_scored == sum(map(len, texts)) - sum(map(len, first))
    assert len(list(batches)) == len(batches)


@pytest.mark.parametrize("most", [1, 700, 5000])
def test_a_part_of_the_held_out_text(held_out: TokenStore, most: int) -> None:
    """At most so many tokens are read; the bytes are those of the targets that are scored."""
    batches = held_out_batches(held_out, 64, 8, max_tokens=most)
    targets = [target for batch in batches for target in batch.targets[batch.loss_mask > 0].tolist()]
    assert sum(int((batch.segment_ids > 0).sum()) for batch in batches) == most
    assert batches.bytes_scored == sum(len(held_out.tokenizer.bytes_of(target)) for target in targets)
    assert len(targets) == batches.tokens_scored


def test_nothing_held_out(tmp_path: Path, store_folder: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n")
    config = PrepareConfig(
        inputs=(str(tmp_path / "a.txt"),),
        output=str(tmp_path / "s"),
        tokenizer=TokenizerConfig(path=str(store_folder)),
        held_out_fraction=0.0,
    )
    prepare(config, progress=False)
    with pytest.raises(DataError, match="no document is held out; prepare it with a larger held_out_fraction"):
        held_out_batches(TokenStore(tmp_path / "s", "held_out"), 16, 2)


@pytest.mark.parametrize("most", [None, 3000])
def test_baselines_by_hand(store: TokenStore, held_out: TokenStore, most: int | None) -> None:
    """The tables again with dictionaries; the bigram is a distribution; xz is that of the text itself."""
    result = baselines(store, held_out, max_tokens=most)
    vocab = store.manifest.tokenizer["vocab_size"]
    follow: dict[int, Counter] = {}
    counts: Counter = Counter()
    for i in range(len(store)):
        tokens = store.tokens(i).tolist()
        counts.update(tokens[1:])
        for a, b in pairwise(tokens):
            follow.setdefault(a, Counter())[b] += 1

    def unigram(b: int) -> float:
        return (counts[b] + 1) / (counts.total() + vocab)

    def bigram(a: int, b: int) -> float:
        seen = follow.get(a)
        if not seen:
            return unigram(b)
        return (max(seen[b] - 0.75, 0) + 0.75 * len(seen) * unigram(b)) / seen.total()

    batches = held_out_batches(held_out, 64, 4, max_tokens=most)
    pairs = []
    for batch in batches:
        used = batch.loss_mask > 0
        pairs += zip(batch.tokens[used].tolist(), batch.targets[used].tolist(), strict=True)
    size = batches.bytes_scored
    assert result.unigram == pytest.approx(-sum(math.log2(unigram(b)) for _, b in pairs) / size, rel=1e-9)
    assert result.bigram == pytest.approx(-sum(math.log2(bigram(a, b)) for a, b in pairs) / size, rel=1e-9)
    for a in (pairs[0][0], pairs[-1][0]):
        assert sum(bigram(a, b) for b in range(vocab)) == pytest.approx(1)
    assert result.xz < result.bigram < result.unigram
    if most is None:
        order = held_out_batches(held_out, 64, 4)._documents
        text = b"".join(held_out.tokenizer.decode_bytes(held_out.tokens(int(i))) for i in order)
        assert result.xz == pytest.approx(8 * len(lzma.compress(text, preset=9)) / len(text))
        assert np.isclose(len(text), held_out.byte_lengths.sum())
