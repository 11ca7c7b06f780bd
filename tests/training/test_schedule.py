"""Learning rate and batch size against the report's numbers (recipe §4.5, §16.9)."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.minimax_text_01 import get_config
from mmx_jax.config import BatchConfig, ScheduleConfig, SchedulePhase
from mmx_jax.training.schedule import decay_start, for_round, learning_rate, sequences_per_step

TRILLION = 10**12
STAGE = get_config().stages[0]


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (0, 2e-4),
        (7.2 * TRILLION - 1, 2e-4),
        (7.2 * TRILLION, 1.3e-4),
        (10.4 * TRILLION - 1, 1.3e-4),
        (10.4 * TRILLION, 1.3e-4),
        (10.9 * TRILLION, math.sqrt(1.3e-4 * 3e-5)),
        (11.4 * TRILLION - 1, 3e-5),
        (11.4 * TRILLION, 3e-5),
    ],
)
def test_learning_rate_of_the_report(tokens: float, rate: float) -> None:
    """2e-4 for 7.2T tokens, 1.3e-4 for 3.2T, exponentially to 3e-5 over the last 1T (recipe §4.5)."""
    assert learning_rate(STAGE.schedule, 100_000, int(tokens)) == pytest.approx(rate, rel=1e-6)


def test_warm_up_takes_500_steps() -> None:
    rates = [learning_rate(STAGE.schedule, step, 0) for step in (0, 249, 499, 500)]
    assert rates == pytest.approx([2e-4 / 500, 1e-4, 2e-4, 2e-4])


@pytest.mark.parametrize(
    ("tokens", "millions"),
    [(0, 16), (69e9 - 1, 16), (69e9, 32), (790e9 - 1, 32), (790e9, 64), (4.7e12 - 1, 64), (4.7e12, 128), (11e12, 128)],
)
def test_batch_of_the_report(tokens: float, millions: int) -> None:
    """ "16M" is 2,048 rows of 8,192; doubled at 69B, 790B and 4.7T tokens."""
    assert sequences_per_step(STAGE.batch, int(tokens)) == 2048 * millions // 16


def test_number_of_steps_of_the_report() -> None:
    """About 140K updates reach 11.4T tokens (recipe §4.5 counts 16.0M where a step has 16.8M tokens)."""
    tokens = steps = 0
    while tokens < STAGE.schedule.tokens:
        sequences = sequences_per_step(STAGE.batch, tokens)
        tokens, steps = tokens + sequences * STAGE.sequence_length, steps + 1
    assert steps * 2**24 / 16e6 == pytest.approx(140_200, rel=0.002)


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.6), ("cosine", 0.6), ("exponential", math.sqrt(0.2))])
def test_shapes_of_a_decay(shape: str, middle: float) -> None:
    phases = (SchedulePhase(until_tokens=100, learning_rate=1.0),
              SchedulePhase(until_tokens=300, learning_rate=0.2, shape=shape))  # fmt: skip
    schedule = ScheduleConfig(phases=phases, warmup_steps=0)
    rates = [learning_rate(schedule, 0, tokens) for tokens in range(100, 301)]
    assert rates[100] == pytest.approx(middle)
    assert (rates[0], rates[-1]) == pytest.approx((1.0, 0.2))
    assert rates == sorted(rates, reverse=True)


@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(1, 6))
def test_rounds_share_the_stable_part_and_decay_alike(stable: int, decay: int, number: int) -> None:
    """Each round adds one budget to where the round before began to decay, and decays as long and as far."""
    phases = (SchedulePhase(until_tokens=stable, learning_rate=1.0),
              SchedulePhase(until_tokens=stable + decay, learning_rate=0.1, shape="linear"))  # fmt: skip
    first = ScheduleConfig(phases=phases, warmup_steps=3)
    earlier, later = for_round(first, number), for_round(first, number + 1)
    assert later.tokens - decay_start(earlier) == first.tokens
    assert later.tokens - decay_start(later) == decay
    at_old_start = learning_rate(later, 10, decay_start(earlier))
    assert at_old_start == learning_rate(first, 10, stable - 1), "the rate goes on where the decay had begun"
    assert for_round(first, 1) == first


def test_a_stage_without_decay_goes_on_from_its_end() -> None:
    schedule = ScheduleConfig(phases=(SchedulePhase(until_tokens=50, learning_rate=1.0),))
    assert decay_start(schedule) == 50
    assert for_round(schedule, 3).tokens == 150


def test_a_ramp_holds_from_its_token_on() -> None:
    batch = BatchConfig(micro_batch=2, ramp=((0, 2), (10, 4), (30, 8)))
    assert [sequences_per_step(batch, tokens) for tokens in (0, 9, 10, 29, 30, 99)] == [2, 2, 4, 4, 8, 8]
