"""Checks that configuration dataclasses run on construction; errors name class, field, value and what is right."""

import math
from collections.abc import Sequence
from typing import Any

SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""Positive numbers that fp32 holds without loss of digits."""


class ConfigError(ValueError):
    """A configuration value that cannot work, or a key that does not exist."""


def fail(owner: object, field: str, problem: str) -> None:
    """Raises `ConfigError` for `field` of the dataclass instance `owner`."""
    raise ConfigError(f"{type(owner).__name__}.{field} = {getattr(owner, field)!r}: {problem}")


def at_least(owner: object, minimum: int | float, *fields: str) -> None:
    """Checks that each numeric field is finite and at least `minimum`; None passes."""
    for field in fields:
        value: Any = getattr(owner, field)
        if value is not None and not minimum <= value < math.inf:
            fail(owner, field, f"must be at least {minimum}" + (" and finite" if value == math.inf else ""))


def positive(owner: object, *fields: str, above: float = 0.0) -> None:
    """Checks that each numeric field is greater than `above` and stays so, and finite, in fp32; None passes."""
    for field in fields:
        value: Any = getattr(owner, field)
        if value is not None and not (value > above and SMALLEST <= value <= LARGEST):
            fail(owner, field, f"must be greater than {above:g} and finite in fp32")


def seed_fits(owner: Any) -> None:
    """Checks that field `seed` has 32 bits: of a wider one the random number generators would drop the others."""
    if not 0 <= owner.seed < 2**32:
        fail(owner, "seed", f"must be from 0 to {2**32 - 1}")


def one_of(owner: object, field: str, allowed: Sequence[str]) -> None:
    """Checks that a field holds one of the allowed names."""
    if getattr(owner, field) not in allowed:
        fail(owner, field, f"must be one of {', '.join(map(repr, allowed))}")


def divides(owner: object, divisor: str, dividend: str) -> None:
    """Checks that field `divisor` divides field `dividend`."""
    if getattr(owner, dividend) % getattr(owner, divisor):
        fail(owner, dividend, f"must be a multiple of {divisor} = {getattr(owner, divisor)}")
