"""Packing plans against what any packing must satisfy, and against a slow best-fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx_jax.data.packing import PACKERS, Plan, plan_best_fit, plan_concat

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60).map(lambda x: np.array(x, np.int64))


def _rows(plan: Plan) -> list[list[tuple[int, int, int]]]:
    pieces = list(zip(plan.unit.tolist(), plan.start.tolist(), plan.length.tolist(), strict=True))
    return [pieces[a:b] for a, b in zip(plan.row_starts, plan.row_starts[1:], strict=False)]


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.sampled_from(sorted(PACKERS)))
def test_every_token_exactly_once(lengths: np.ndarray, sequence_length: int, packing: str) -> None:
    """Every token of every document is in exactly one piece; no row is empty or too long; the padding adds up."""
    plan = PACKERS[packing](lengths, sequence_length)
    seen = [np.zeros(n, int) for n in lengths]
    rows = _rows(plan)
    assert sum(map(len, rows)) == len(plan.unit)
    for row in rows:
        assert 0 < sum(length for _, _, length in row) <= sequence_length
        for unit, start, length in row:
            assert length > 0
            seen[unit][start : start + length] += 1
    assert all((count == 1).all() for count in seen)
    filled = lengths.sum() / (len(rows) * sequence_length)
    assert plan.padding_share(sequence_length) == pytest.approx(1 - filled)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 40))
def test_concat_is_the_cut_concatenation(lengths: np.ndarray, sequence_length: int) -> None:
    """Oracle: write all tokens into one list and cut it."""
    stream = [(unit, t) for unit, n in enumerate(lengths.tolist()) for t in range(n)]
    expected = [stream[i : i + sequence_length] for i in range(0, len(stream), sequence_length)]
    rows = _rows(plan_concat(lengths, sequence_length))
    assert [[(u, s + t) for u, s, n in row for t in range(n)] for row in rows] == expected
    assert all(len({u for u, _, _ in row}) == len(row) for row in rows)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 40))
def test_best_fit_decreasing(lengths: np.ndarray, sequence_length: int) -> None:
    """Oracle: look at every row for every piece. Whole documents stay whole."""
    pieces = []
    for unit, n in enumerate(lengths.tolist()):
        pieces += [(min(sequence_length, n - s), unit, s) for s in range(0, n, sequence_length)]
    rows: list[list[tuple[int, int, int]]] = []
    for length, unit, start in sorted(pieces, key=lambda piece: -piece[0]):
        rooms = [(sequence_length - sum(x[2] for x in row), i) for i, row in enumerate(rows)]
        fitting = [(room, i) for room, i in rooms if room >= length]
        if fitting:
            rows[min(fitting)[1]].append((unit, start, length))
        else:
            rows.append([(unit, start, length)])
    assert _rows(plan_best_fit(lengths, sequence_length)) == rows


def test_best_fit_row_count_ignores_order() -> None:
    """A shuffled window packs into as many rows, which is why the length of an epoch is constant."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 300, 500)
    counts = {plan_best_fit(rng.permutation(lengths), 128).rows for _ in range(5)}
    assert len(counts) == 1


def test_padding_is_small_on_natural_lengths() -> None:
    """Best-fit over a window of log-normal documents wastes below 1 %; concat only the end of the last row."""
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 4000).astype(np.int64) + 2
    assert plan_best_fit(lengths, 2048).padding_share(2048) < 0.01
    assert plan_concat(lengths, 2048).padding_share(2048) < 1 / plan_concat(lengths, 2048).rows
