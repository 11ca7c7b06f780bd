"""From pieces of documents to the arrays of one row."""

from collections.abc import Iterable

import numpy as np

from mmx_jax.data.store import TokenStore

Row = dict[str, np.ndarray]
"""The fields of `Batch` for one row: [T] arrays."""


def build_row(
    store: TokenStore,
    pieces: Iterable[tuple[int, int, int]],
    sequence_length: int,
    *,
    source_id: int = 0,
    loss_roles: tuple[str, ...] = (),
) -> Row:
    """Lays pieces of documents side by side; the rest of the row is padding.

    Args:
      store: where the documents are.
      pieces: (document, first token, tokens) of each piece; they fit into the row.
      sequence_length: T.
      source_id: index of the source, the same at all positions.
      loss_roles: in documents with spans only targets of these roles are learned; empty learns all.

    Returns:
      tokens, targets, positions, segment_ids, source_id int32 [T] and loss_mask float32 [T], as `Batch` describes them.
      The target at the end of a piece that its document continues is the document's next token.
    """
    row: Row = {name: np.zeros(sequence_length, np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    row["loss_mask"] = np.zeros(sequence_length, np.float32)
    row["source_id"] = np.full(sequence_length, source_id, np.int32)
    begin = 0
    for segment, (document, start, length) in enumerate(pieces, 1):
        tokens = store.tokens(document)
        end = begin + length
        targets = tokens[start + 1 : start + length + 1]
        row["tokens"][begin:end] = tokens[start : start + length]
        row["targets"][begin : begin + len(targets)] = targets
        row["positions"][begin:end] = np.arange(length)
        row["segment_ids"][begin:end] = segment
        if loss_roles and (spans := store.spans(document)):
            ends = np.array([stop for _, stop in spans])
            learned = np.array([role in loss_roles for role, _ in spans])
            places = np.arange(start + 1, start + 1 + len(targets))
            row["loss_mask"][begin : begin + len(targets)] = learned[np.searchsorted(ends, places, "right")]
        else:
            row["loss_mask"][begin : begin + len(targets)] = 1
        begin = end
    return row
