"""Configuration as JSON and back, and the typing rules that files and flags share."""

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from mmx_jax.config.checks import ConfigError
from mmx_jax.config.run import RunConfig


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as JSON values: dataclasses become objects, tuples become lists.

    Raises:
      ConfigError: for a value that JSON cannot hold.
    """
    return {field.name: _plain(getattr(config, field.name), field.name) for field in fields(config)}


def from_dict[C](data: Mapping[str, Any], kind: type[C] = RunConfig) -> C:  # type: ignore[assignment]
    """The configuration that `to_dict` made; every check runs again.

    A missing key takes its field's default, so that files from before the field existed stay readable.

    Raises:
      ConfigError: for an unknown key, a missing one without default, a value of another type, an impossible value.
    """
    return _build(kind, data, kind.__name__)


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """First key, in field order, at which two results of `to_dict` differ, with both values; None when equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*new, *(name for name in old if name not in new)]:
            found = first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new)):
            found = first_difference(before, after, f"{key}.{index}")
            if found:
                return found
        return None
    return None if old == new else (key, old, new)


@cache
def field_types(kind: type) -> dict[str, Any]:
    """Annotations of a dataclass's fields, by name."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def unknown_key(kind: type, name: str) -> ConfigError:
    """The error for a field that `kind` does not have; names the fields and the nearest one."""
    known = list(field_types(kind))
    near = get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"{kind.__name__} has no field {name!r}.{hint} Its fields are {', '.join(known)}.")


def describe_type(annotation: Any) -> str:
    """The annotation as a reader would write it."""
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


def union_members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the annotation alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def typed(annotation: Any, value: Any, where: str) -> Any:
    """`value`, made of JSON values or Python literals, as the annotation wants it: lists become tuples, ints floats.

    Raises:
      ConfigError: when it is of another type.
    """
    for member in union_members(annotation):
        if member is type(None):
            if value is None:
                return None
        elif is_dataclass(member) and isinstance(member, type):
            if isinstance(value, member):
                return value
            if isinstance(value, Mapping):
                return _build(member, value, where)
        elif get_origin(member) is tuple:
            if isinstance(value, list | tuple):
                return _typed_tuple(get_args(member), value, where)
        elif member is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        elif isinstance(value, member) and not (member is int and isinstance(value, bool)):
            return value
    raise ConfigError(f"{where} = {value!r}: must be {describe_type(annotation)}")


def _typed_tuple(members: tuple[Any, ...], value: list | tuple, where: str) -> tuple:
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        raise ConfigError(f"{where} = {value!r}: must have {len(members)} entries")
    return tuple(typed(member, item, f"{where}.{i}") for i, (member, item) in enumerate(zip(members, value)))


def _build(kind: Any, data: Mapping[str, Any], where: str) -> Any:
    known = field_types(kind)
    for name in data:
        if name not in known:
            raise ConfigError(f"{where}: {unknown_key(kind, name)}")
    for field in fields(kind):
        if field.name not in data and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{where}: {kind.__name__} needs a value for {field.name!r}")
    return kind(**{name: typed(known[name], value, f"{where}.{name}") for name, value in data.items()})


def _plain(value: Any, where: str) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name), f"{where}.{field.name}") for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item, f"{where}.{i}") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"{where} = {value!r}: a {type(value).__name__} has no place in a configuration")
