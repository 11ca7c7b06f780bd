"""Learning rate and batch size as pure functions of steps and tokens (report §4.2, recipe §4.5)."""

import math
from dataclasses import replace

from mmx_jax.config import BatchConfig, ScheduleConfig


def learning_rate(schedule: ScheduleConfig, step: int, tokens: int) -> float:
    """Learning rate of the update after `step` updates and `tokens` trained tokens of the stage.

    A phase holds from the token on which the one before it ends; after the last phase its rate stays.
    """
    start, before = 0, 0.0
    for phase in schedule.phases:
        if tokens < phase.until_tokens:
            fraction = (tokens - start) / (phase.until_tokens - start)
            rate = _between(phase.shape, before, phase.learning_rate, fraction)
            break
        start, before = phase.until_tokens, phase.learning_rate
    else:
        rate = before
    return rate * min(1.0, (step + 1) / max(schedule.warmup_steps, 1))


def _between(shape: str, before: float, after: float, fraction: float) -> float:
    if shape == "linear":
        return before + (after - before) * fraction
    if shape == "exponential":
        return before * (after / before) ** fraction
    if shape == "cosine":
        return after + (before - after) * 0.5 * (1.0 + math.cos(math.pi * fraction))
    return after


def sequences_per_step(batch: BatchConfig, tokens: int) -> int:
    """Sequences of the step after `tokens` trained tokens of the stage."""
    return next(sequences for start, sequences in reversed(batch.ramp) if tokens >= start)


def decay_start(schedule: ScheduleConfig) -> int:
    """Tokens at which the final decay begins; the end of the stage when its last phase is constant."""
    if schedule.phases[-1].shape == "constant" or len(schedule.phases) == 1:
        return schedule.tokens
    return schedule.phases[-2].until_tokens


def for_round(schedule: ScheduleConfig, round_number: int) -> ScheduleConfig:
    """The schedule of the `round_number`-th budget of a stage that is continued after its end.

    Each round goes on from where the one before it began to decay, trains one more budget, and decays as long as the
    first: with s the stable share of the budget, round r decays from r s budgets on and ends at 1 + (r - 1) s budgets.
    """
    if round_number == 1:
        return schedule
    stable = decay_start(schedule)
    decay = schedule.tokens - stable
    phases = list(schedule.phases)
    last_stable = -2 if decay else -1
    phases[last_stable] = replace(phases[last_stable], until_tokens=stable * round_number)
    if decay:
        phases[-1] = replace(phases[-1], until_tokens=stable * round_number + decay)
    return replace(schedule, phases=tuple(phases))
