"""The mixture rule against exact integrals of the weights."""

import time
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx_jax.config import ConfigError
from mmx_jax.data.mixture import CHUNK_ROWS, Mixture

T = 16


def _weight(points: list[tuple[int, float]], tokens: int) -> Fraction:
    if tokens <= points[0][0]:
        return Fraction(points[0][1])
    for (x0, y0), (x1, y1) in pairwise(points):
        if tokens <= x1:
            return Fraction(y0) + (Fraction(y1) - Fraction(y0)) * Fraction(tokens - x0, x1 - x0)
    return Fraction(points[-1][1])


def _walk(weights: list[list[tuple[int, float]]], rows: int) -> float:
    """Largest distance, over all prefixes and sources, between rows handed out and the sum of the exact shares."""
    mixture = Mixture(weights, T)
    owed = [Fraction(0)] * len(weights)
    taken = [0] * len(weights)
    worst = 0.0
    for row in range(rows):
        source, number = mixture.row(row)
        assert number == taken[source], "a source's own rows are numbered without gaps"
        taken[source] += 1
        values = [_weight(points, row * T) for points in weights]
        for s, value in enumerate(values):
            owed[s] += value / sum(values)
            worst = max(worst, abs(float(taken[s] - owed[s])))
    return worst


def test_two_sources_follow_a_changing_curve_within_one_row() -> None:
    """Weights that cross over 2,500 rows: no prefix is a whole row off."""
    end = 2000 * T
    assert _walk([[(0, 0.9), (end, 0.1)], [(0, 0.1), (end // 2, 0.1), (end, 0.9)]], 2500) < 1


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8), st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_any_number_of_sources(begin: list[float], end: list[float]) -> None:
    """Up to eight sources: never further than two rows from the curve, whatever the weights."""
    weights = [[(0, a), (300 * T, b + 0.01)] for a, b in zip(begin, end, strict=False)]
    assert _walk(weights, 500) < (1 if len(weights) <= 2 else 2)


def test_equal_weights_take_turns() -> None:
    mixture = Mixture([[(0, 1.0)]] * 5, T)
    assert [mixture.row(row) for row in range(15)] == [(row % 5, row // 5) for row in range(15)]


def test_a_source_may_start_late_or_end() -> None:
    """Weight 0 takes nothing at all, not even what rounding leaves."""
    mixture = Mixture([[(0, 1.0)], [(100 * T, 0.0), (101 * T, 0.5)], [(0, 1.0), (50 * T, 0.0)]], T)
    rows = [mixture.row(row)[0] for row in range(3000)]
    assert 1 not in rows[:98]
    assert 2 not in rows[53:]
    assert rows[1000:].count(1) == pytest.approx(2000 / 3, abs=1)
    assert mixture.row(10**9)[0] in (0, 1)


def test_all_zero_is_an_error() -> None:
    with pytest.raises(ConfigError, match="all weights are 0 at"):
        Mixture([[(0, 1.0), (10 * T, 0.0)], [(0, 0.0)]], T)


def test_any_row_at_once() -> None:
    """Row 10^8 (and chunk borders) need no replay: below a second with everything, and equal to their neighbours."""
    begin = time.perf_counter()
    weights = [[(0, 3.0), (10**12, 1.0)], [(0, 1.0), (5 * 10**11, 2.0)], [(10**11, 0.0), (10**12, 0.3)]]
    mixture = Mixture(weights, 8192)
    source, number = mixture.row(10**8)
    assert time.perf_counter() - begin < 1
    assert number == pytest.approx(mixture.owed(source, 10**8), abs=2)
    for start in (10**8 // CHUNK_ROWS * CHUNK_ROWS, 7 * CHUNK_ROWS):
        last: dict[int, int] = {}
        for row in range(start - 50, start + 50):
            source, number = mixture.row(row)
            assert number == last.get(source, number - 1) + 1
            last[source] = number
