"""What needs no neural network: unigram and bigram tables of the tokens, and `xz -9` of the text.

The tables score exactly the targets that `held_out_batches` scores, per the same bytes; xz compresses the whole text of
the same documents.
"""

import lzma
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from mmx_jax.data.errors import DataError
from mmx_jax.data.held_out import covered
from mmx_jax.data.store import TokenStore

DISCOUNT = 0.75
PAIRS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of held-out text, lower is better."""

    unigram: float
    bigram: float
    xz: float


def baselines(
    train: TokenStore, held_out: TokenStore, *, max_tokens: int | None = None, max_train_tokens: int = 50_000_000
) -> Baselines:
    """Fits the tables on training tokens and scores held-out text.

    Args:
      train: the training split.
      held_out: the held-out split of a store of the same tokenizer.
      max_tokens: held-out tokens, as in `held_out_batches`.
      max_train_tokens: the tables are fitted on so many tokens of training documents in a fixed random order.

    Raises:
      DataError: one of the splits has no document.
    """
    for store in (train, held_out):
        if not len(store):
            raise DataError(f"{store.folder}: the split {store.split!r} has no document")
    vocab_size = train.manifest.tokenizer["vocab_size"]
    unigram, pairs, counts = _count(train, vocab_size, max_train_tokens)
    left, right, text = _held_out_pairs(held_out, max_tokens)
    size = int(held_out.tokenizer.piece_bytes[right].sum())
    single = (unigram + 1) / (unigram.sum() + vocab_size)
    unigram_bits = -np.log2(single[right]).sum()
    bigram_bits = -np.log2(_bigram(left, right, pairs, counts, single, vocab_size)).sum()
    return Baselines(
        unigram=float(unigram_bits) / size,
        bigram=float(bigram_bits) / size,
        xz=8 * len(lzma.compress(text, preset=9)) / len(text),
    )


def _count(
    store: TokenStore, vocab_size: int, max_tokens: int
) -> tuple[Int64[np.ndarray, "V"], Int64[np.ndarray, "pairs"], Int64[np.ndarray, "pairs"]]:
    """Counts of the tokens that follow another of their document, and of the pairs (left * V + right, sorted)."""
    unigram = np.zeros(vocab_size, np.int64)
    pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    pending: list[np.ndarray] = []

    def merge() -> None:
        nonlocal pairs, counts
        new, new_counts = np.unique(np.concatenate(pending), return_counts=True)
        pairs, place = np.unique(np.concatenate([pairs, new]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([counts, new_counts])).astype(np.int64)
        pending.clear()

    for document, length in zip(*covered(store, max_tokens), strict=True):
        for start in range(0, int(length) - 1, PAIRS_AT_ONCE):
            tokens = store.tokens(int(document))[start : min(start + PAIRS_AT_ONCE + 1, int(length))].astype(np.int64)
            unigram += np.bincount(tokens[1:], minlength=vocab_size)
            pending.append(tokens[:-1] * vocab_size + tokens[1:])
            if sum(map(len, pending)) >= PAIRS_AT_ONCE:
                merge()
    if pending:
        merge()
    return unigram, pairs, counts


def _held_out_pairs(
    store: TokenStore, max_tokens: int | None
) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"], bytes]:
    """Context and target of every scored target, and the text that they cover, first tokens included."""
    left, right, text = [], [], []
    for document, length in zip(*covered(store, max_tokens), strict=True):
        tokens = store.tokens(int(document))[: int(length) + 1].astype(np.int64)
        left.append(tokens[:-1])
        right.append(tokens[1:])
        text.append(store.tokenizer.decode_bytes(tokens))
    return np.concatenate(left), np.concatenate(right), b"".join(text)


def _bigram(
    left: Int64[np.ndarray, "n"],
    right: Int64[np.ndarray, "n"],
    pairs: Int64[np.ndarray, "pairs"],
    counts: Int64[np.ndarray, "pairs"],
    unigram: Float64[np.ndarray, "V"],
    vocab_size: int,
) -> Float64[np.ndarray, "n"]:
    """Interpolated absolute discounting (Ney, Essen, Kneser 1994): p = max(c - d, 0) / c(left) + backoff * unigram."""
    contexts = pairs // vocab_size
    total = np.bincount(contexts, counts, minlength=vocab_size)
    kinds = np.bincount(contexts, minlength=vocab_size)
    wanted = left * vocab_size + right
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[place] == wanted, counts[place], 0)
    seen = np.maximum(total[left], 1)
    backoff = np.where(total[left] > 0, DISCOUNT * kinds[left] / seen, 1.0)
    return np.maximum(count - DISCOUNT, 0) / seen + backoff * unigram[right]
