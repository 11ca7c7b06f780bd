"""Checks that configuration dataclasses run on construction; errors name class, field, value and what is right."""

from collections.abc import Sequence
from typing import Any


class ConfigError(ValueError):
    """A configuration value that cannot work, or a key that does not exist."""


def fail(owner: object, field: str, problem: str) -> None:
    """Raises `ConfigError` for `field` of the dataclass instance `owner`."""
    raise ConfigError(f"{type(owner).__name__}.{field} = {getattr(owner, field)!r}: {problem}")


def at_least(owner: object, minimum: int | float, *fields: str) -> None:
    """Checks that each numeric field is at least `minimum`; None passes."""
    for field in fields:
        value: Any = getattr(owner, field)
        if value is not None and not value >= minimum:
            fail(owner, field, f"must be at least {minimum}")


def one_of(owner: object, field: str, allowed: Sequence[str]) -> None:
    """Checks that a field holds one of the allowed names."""
    if getattr(owner, field) not in allowed:
        fail(owner, field, f"must be one of {', '.join(map(repr, allowed))}")


def divides(owner: object, divisor: str, dividend: str) -> None:
    """Checks that field `divisor` divides field `dividend`."""
    if getattr(owner, dividend) % getattr(owner, divisor):
        fail(owner, dividend, f"must be a multiple of {divisor} = {getattr(owner, divisor)}")
