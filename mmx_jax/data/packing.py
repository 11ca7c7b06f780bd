"""Which tokens share a row: plans over a window of documents, in pure numpy.

A plan cuts documents into pieces and puts every piece into a row. A row's pieces are segments of their own: positions
start at 0 in each, because the state of a lightning layer is not carried from one row to the next, so that a piece that
continues a document is, to the model, a beginning.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64


@dataclass(frozen=True)
class Plan:
    """Pieces in row order; the pieces of row r are those from row_starts[r] to row_starts[r + 1]."""

    row_starts: Int64[np.ndarray, "row_bounds"]
    unit: Int64[np.ndarray, "pieces"]
    """Which of the planned lengths the piece is cut from."""
    start: Int64[np.ndarray, "pieces"]
    """First token of the piece in it."""
    length: Int64[np.ndarray, "pieces"]

    @property
    def rows(self) -> int:
        return len(self.row_starts) - 1

    def padding_share(self, sequence_length: int) -> float:
        """Share of all positions that hold no token."""
        return 1 - int(self.length.sum()) / max(1, self.rows * sequence_length)


def cut(lengths: Int64[np.ndarray, "n"], most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts every length into parts of `most` and a rest: (index of the length, start, length) of the parts."""
    parts = -(-lengths // most)
    unit = np.repeat(np.arange(len(lengths), dtype=np.int64), parts)
    start = most * (np.arange(len(unit), dtype=np.int64) - np.repeat(np.cumsum(parts) - parts, parts))
    return unit, start, np.minimum(most, lengths[unit] - start)


def plan_concat(lengths: Int64[np.ndarray, "n"], sequence_length: int) -> Plan:
    """Concat-and-split: documents end to end, cut at row ends; only the last row has padding.

    Args:
      lengths: tokens of each document, at least 1.
      sequence_length: T.
    """
    starts = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    begins = np.union1d(starts, np.arange(0, total, sequence_length, dtype=np.int64))
    unit = np.searchsorted(starts, begins, "right") - 1
    rows = -(-total // sequence_length)
    row_starts = np.searchsorted(begins, np.arange(rows + 1, dtype=np.int64) * sequence_length)
    return Plan(row_starts, unit, begins - starts[unit], np.diff(begins, append=total))


def plan_best_fit(lengths: Int64[np.ndarray, "n"], sequence_length: int) -> Plan:
    """Best-fit decreasing: pieces are whole documents, or T-long cuts of longer ones with their rest.

    Each piece, longest first, goes into the row with the least room that still holds it.

    Args:
      lengths: tokens of each document, at least 1.
      sequence_length: T.
    """
    unit, start, length = cut(lengths, sequence_length)
    order = np.argsort(-length, kind="stable")
    row = np.empty(len(order), np.int64)
    full = int(np.count_nonzero(length == sequence_length))
    row[:full] = np.arange(full)
    rows = full
    free: list[tuple[int, int]] = []
    for i, size in enumerate(length[order[full:]].tolist(), full):
        place = bisect_left(free, (size, 0))
        if place < len(free):
            room, target = free.pop(place)
        else:
            room, target, rows = sequence_length, rows, rows + 1
        row[i] = target
        if room > size:
            insort(free, (room - size, target))
    by_row = np.argsort(row, kind="stable")
    order = order[by_row]
    return Plan(np.searchsorted(row[by_row], np.arange(rows + 1)), unit[order], start[order], length[order])


PACKERS = {"concat": plan_concat, "best_fit": plan_best_fit}
