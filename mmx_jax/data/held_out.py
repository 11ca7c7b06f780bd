"""Held-out text as evaluation batches, and how many bytes they score."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

from mmx_jax.data.batch import Batch
from mmx_jax.data.errors import DataError
from mmx_jax.data.packing import plan_best_fit
from mmx_jax.data.rows import Row, build_row
from mmx_jax.data.shuffle import permutation
from mmx_jax.data.store import TokenStore


def covered(store: TokenStore, max_tokens: int | None) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Documents that an evaluation reads, and how many tokens of each.

    Args:
      store: the held-out split.
      max_tokens: the evaluation stops after so many; None reads all. Documents come in one fixed random order, so that
        a part of them stands for the whole; of the last one the beginning is read.
    """
    documents = permutation(len(store), 0)
    lengths = store.lengths[documents]
    if max_tokens is not None:
        lengths = np.minimum(lengths, np.maximum(0, max_tokens - (np.cumsum(lengths) - lengths)))
    return documents[lengths > 0], lengths[lengths > 0]


class HeldOutBatches:
    """Batches that score the covered tokens once each, except the first of every document, which nothing precedes.

    Longer documents are cut into windows of T tokens; every window is read without the ones before it, and predicts the
    first token of the next. Short documents share rows as segments. Iterating again gives the same batches.
    """

    def __init__(
        self, store: TokenStore, sequence_length: int, batch_size: int, max_tokens: int | None, source_id: int
    ) -> None:
        self._store = store
        self._sequence_length = sequence_length
        self._batch_size = batch_size
        self._source_id = source_id
        self._documents, self._lengths = covered(store, max_tokens)
        self._plan = plan_best_fit(self._lengths, sequence_length)
        ends = self._lengths == store.lengths[self._documents]
        self.documents = len(self._documents)
        self.tokens_scored = int(self._lengths.sum()) - int(np.count_nonzero(ends))
        """Targets that count; more than `max_tokens` by none."""
        self.bytes_scored = self._count_bytes()
        """UTF-8 bytes of the text of these targets; end of text has none."""

    def _count_bytes(self) -> int:
        piece_bytes = self._store.tokenizer.piece_bytes
        total = 0
        for document, length in zip(self._documents.tolist(), self._lengths.tolist()):
            tokens = self._store.tokens(document)
            # A document's end predicts nothing; elsewhere the last covered token predicts one more.
            if length == len(tokens):
                total += self._store.bytes(document) - int(piece_bytes[tokens[0]])
            else:
                total += int(piece_bytes[tokens[1 : length + 1]].sum())
        return total

    def __len__(self) -> int:
        return -(-self._plan.rows // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, self._plan.rows, self._batch_size):
            rows = range(first, first + self._batch_size)
            yield Batch.stack([self._row(row) for row in rows])

    def _row(self, row: int) -> Row:
        """A row of the plan; rows after the last are all padding, so that every batch has one shape."""
        pieces = []
        if row < self._plan.rows:
            place = slice(int(self._plan.row_starts[row]), int(self._plan.row_starts[row + 1]))
            documents = self._documents[self._plan.unit[place]].tolist()
            pieces = list(zip(documents, self._plan.start[place].tolist(), self._plan.length[place].tolist()))
        return build_row(self._store, pieces, self._sequence_length, source_id=self._source_id)


def held_out_batches(
    store: TokenStore, sequence_length: int, batch_size: int, max_tokens: int | None = None, *, source_id: int = 0
) -> HeldOutBatches:
    """Evaluation batches of a store's held-out split.

    Args:
      store: opened with split="held_out".
      sequence_length: T.
      batch_size: rows of a batch; the last batch is filled with padding.
      max_tokens: at most so many tokens are read; None reads all.
      source_id: written into the batches.

    Returns:
      An iterable of `Batch` (numpy arrays [batch_size, T]) with `tokens_scored` and `bytes_scored`: bits per byte is
      the sum of -log2 p(target) over the loss mask, divided by `bytes_scored`.

    Raises:
      DataError: the split has no document.
    """
    if not len(store):
        raise DataError(
            f"{store.folder}: no document is held out; prepare it with a larger held_out_fraction, or cut "
            "documents with document_bytes"
        )
    return HeldOutBatches(store, sequence_length, batch_size, max_tokens, source_id)
