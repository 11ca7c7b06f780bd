"""Which source a row comes from: a low-discrepancy rule in closed form.

Source s is owed T_s(x) rows after x rows of the stream: the integral of its share of the weights. It takes its k-th row
at the moment x where T_s(x) = k + phase_s, and the rows of the stream are these moments in order (ties: the earlier
source). The phases (s + 1/2) / S spread the sources. So every prefix of the stream holds of each source what is owed,
up to a rounding, and row r needs no look at the rows before it: T is a table at no more than 65,536 places up to the
last point of the weights, and one straight line after it.

All machines must agree on every row. T is therefore kept in integers, and the few floating-point operations are single
additions, multiplications and divisions, which IEEE 754 defines to the last bit.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from jaxtyping import Float64, Int64

from mmx_jax.config import ConfigError

ONE = 1 << 30
"""One row, in the units of T."""
MOST_STEPS = 1 << 16
CHUNK_ROWS = 1024

Weights = Sequence[tuple[int, float]]


class Mixture:
    """Assigns the rows of the global stream to sources."""

    def __init__(self, weights: Sequence[Weights], tokens_per_row: int) -> None:
        """Tabulates what every source is owed.

        Args:
          weights: per source the points (tokens, weight); linear between, constant outside.
          tokens_per_row: T; row r is at r * T tokens.

        Raises:
          ConfigError: all weights are zero somewhere.
        """
        last = max(points[-1][0] for points in weights)
        rows = -(-last // tokens_per_row)
        self._step = max(1, -(-rows // MOST_STEPS))
        steps = -(-rows // self._step)
        self._sources = len(weights)
        # The share of a step is that at its middle; the last entry is the line after the table.
        middles = (np.arange(steps + 1, dtype=np.float64) * self._step + (self._step - 1) / 2) * tokens_per_row
        middles[steps] = max(last, middles[steps])
        self._shares = _integer_shares(np.stack([_interpolate(points, middles) for points in weights]), middles)
        owed = np.cumsum(self._shares[:, :-1] * self._step, axis=1)
        self._owed = np.concatenate([np.zeros((self._sources, 1), np.int64), owed], axis=1)
        self._phases = [(2 * s + 1) * ONE // (2 * self._sources) for s in range(self._sources)]
        self._chunk = lru_cache(maxsize=4)(self._assign)

    def owed(self, source: int, row: int) -> float:
        """Rows that `source` should have had among the first `row` rows."""
        return self._owed_at(source, row) / ONE

    def row(self, row: int) -> tuple[int, int]:
        """Source of a row, and how many rows that source had before: the row's number in the source's own stream."""
        sources, numbers = self._chunk(row // CHUNK_ROWS)
        return int(sources[row % CHUNK_ROWS]), int(numbers[row % CHUNK_ROWS])

    def _owed_at(self, source: int, row: int) -> int:
        step = min(row // self._step, self._owed.shape[1] - 1)
        return int(self._owed[source, step]) + (row - step * self._step) * int(self._shares[source, step])

    def _taken(self, source: int, row: int) -> int:
        """Rows whose moment is before `row`."""
        return max(0, -((self._phases[source] - self._owed_at(source, row)) // ONE))

    def _assign(self, chunk: int) -> tuple[Int64[np.ndarray, "rows"], Int64[np.ndarray, "rows"]]:
        """Source and number of the rows of one chunk."""
        first = chunk * CHUNK_ROWS
        # The moments before x are x of them up to one for each source.
        begin = max(0, first - self._sources - 1)
        end = first + CHUNK_ROWS + self._sources + 1
        moments, sources, numbers = [], [], []
        for source in range(self._sources):
            span = np.arange(self._taken(source, begin), self._taken(source, end), dtype=np.int64)
            moments.append(self._moments(source, span))
            sources.append(np.full(len(span), source))
            numbers.append(span)
        order = np.argsort(np.concatenate(moments), kind="stable")
        skipped = first - sum(self._taken(source, begin) for source in range(self._sources))
        chosen = order[skipped : skipped + CHUNK_ROWS]
        return np.concatenate(sources)[chosen], np.concatenate(numbers)[chosen]

    def _moments(self, source: int, numbers: Int64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
        """Where T_source reaches number + phase."""
        goal = numbers * ONE + self._phases[source]
        step = np.searchsorted(self._owed[source], goal, "left") - 1
        share = self._shares[source][step]
        return step * self._step + (goal - self._owed[source][step]).astype(np.float64) / share.astype(np.float64)


def _interpolate(points: Weights, at: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    result = np.full(len(at), float(points[0][1]))
    for (x0, y0), (x1, y1) in pairwise(points):
        share = (at - x0) / (x1 - x0)
        result = np.where(at >= x0, y0 * (1 - share) + y1 * share, result)
    return np.where(at >= points[-1][0], float(points[-1][1]), result)


def _integer_shares(
    weights: Float64[np.ndarray, "sources n"], tokens: Float64[np.ndarray, "n"]
) -> Int64[np.ndarray, "sources n"]:
    """Shares that sum to ONE exactly; the largest takes what rounding leaves."""
    total = np.zeros(weights.shape[1])
    for row in weights:
        total = total + row
    if not total.all():
        raise ConfigError(f"data.sources: all weights are 0 at {int(tokens[np.argmin(total)])} tokens")
    shares = np.floor(weights / total * ONE).astype(np.int64)
    largest = np.argmax(shares, axis=0)
    shares[largest, np.arange(shares.shape[1])] += ONE - shares.sum(axis=0)
    return shares
