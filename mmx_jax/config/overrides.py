"""Command lines: `--config configs/x.py[:argument]` and `--config.a.b=value` for any field of its RunConfig."""

import ast
import importlib.util
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin

from absl import app, flags, logging

from mmx_jax.config.checks import ConfigError
from mmx_jax.config.command_line import fail_with, parse_flags
from mmx_jax.config.run import RunConfig
from mmx_jax.config.serialize import describe_type, field_types, typed, union_members, unknown_key

PREFIX = "--config."
_CONFIG = flags.DEFINE_string("config", None, "Configuration file, with an argument for its get_config after a colon.")


def run_with_config(main: Callable[[RunConfig], int | None]) -> None:
    """Entry point of a program: reads the command line, calls `main` with the configuration, exits with its code.

    A command line or configuration that cannot work ends with exit code 2 and one line on stderr that names the key.
    """
    overrides: dict[str, str] = {}

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            rest, found = split_overrides(argv)
        except ConfigError as error:
            fail_with(error)
        overrides.update(found)
        rest = parse_flags(rest)
        if flags.FLAGS["verbosity"].using_default_value:
            logging.set_verbosity(logging.WARNING)  # below it, libraries tell of every file that they write
        return rest

    def start(argv: Sequence[str]) -> int | None:
        try:
            if len(argv) > 1:
                raise ConfigError(f"unexpected argument {argv[1]!r}; fields are set with --config.a.b=value")
            if _CONFIG.value is None:
                raise ConfigError("--config is missing: name a file, as in --config configs/quickstart.py")
            config = apply_overrides(load_config(_CONFIG.value), overrides)
        except ConfigError as error:
            fail_with(error)
        return main(config)

    app.run(start, flags_parser=parse)


def load_config(location: str) -> RunConfig:
    """Calls `get_config()` of a file, or `get_config(argument)` for "file.py:argument".

    Raises:
      ConfigError: names the file when it does not exist, does not import, or returns something else.
    """
    name, _, argument = location.partition(":")
    path = Path(name)
    if not path.is_file():
        beside = sorted(str(file) for file in path.parent.glob("*.py") if file.name != "__init__.py")
        raise ConfigError(f"{name}: no such file" + (f"; there are {', '.join(beside)}" if beside else ""))
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{name}: is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = module.get_config
        if argument and not inspect.signature(get_config).parameters:
            raise ConfigError(f"get_config() takes no argument, got {argument!r}")
        config = get_config(argument) if argument else get_config()
    except Exception as error:
        line = next(
            (f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == str(path)), 0
        )
        place = f"{name}:{line}" if line and not isinstance(error, ConfigError) else name
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        raise ConfigError(f"{place}: cannot be loaded: {kind}{error}") from error
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{name}: get_config() must return a RunConfig, got {type(config).__name__}")
    return config


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.a.b=value` and `--config.a.b value` out of a command line.

    Returns:
      The other arguments, and the values by dotted path.

    Raises:
      ConfigError: for a key without a value.
    """
    rest: list[str] = []
    found: dict[str, str] = {}
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith(PREFIX):
            rest.append(argument)
            continue
        key, equals, value = argument.removeprefix(PREFIX).partition("=")
        if not equals:
            following = next(arguments, None)
            if following is None or following.startswith("--"):
                raise ConfigError(f"--config.{key} needs a value: --config.{key}=value")
            value = following
        found[key] = value
    return rest, found


def apply_overrides(config: RunConfig, overrides: Mapping[str, str]) -> RunConfig:
    """The configuration with the fields at dotted paths set from text; numbers in a path are places in a tuple.

    All values of one object are set at once, so that fields which depend on each other may change together.

    Raises:
      ConfigError: for an unknown key, a value of another type, or one that the configuration's checks refuse.
    """
    tree: dict[str, Any] = {}
    for path, text in overrides.items():
        *parents, last = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--config.{path}: {name!r} is set as a whole as well")
        if isinstance(node.get(last), dict):
            raise ConfigError(f"--config.{path}: fields of it are set as well")
        node[last] = text
    return _replaced(type(config), config, tree, "config")


def _replaced(annotation: Any, value: Any, change: Any, where: str) -> Any:
    """`value` (annotated so) with a change: text for the whole, or changes by field name or place."""
    if isinstance(change, str):
        return parse_value(annotation, change, f"--{where}")
    if isinstance(value, tuple):
        items = list(value)
        for place, inner in change.items():
            if not place.isdecimal() or int(place) >= len(items):
                raise ConfigError(f"--{where}.{place}: no such place; {where} has places 0 to {len(items) - 1}")
            items[int(place)] = _replaced(
                _item_type(annotation, int(place)), items[int(place)], inner, f"{where}.{place}"
            )
        return tuple(items)
    if not is_dataclass(value) or isinstance(value, type):
        raise ConfigError(f"--{where}.{next(iter(change))}: {where} = {value!r} has no fields")
    hints = field_types(type(value))
    changes = {}
    for name, inner in change.items():
        if name not in hints:
            raise ConfigError(f"--{where}.{name}: {unknown_key(type(value), name)}")
        changes[name] = _replaced(hints[name], getattr(value, name), inner, f"{where}.{name}")
    try:
        return replace(value, **changes)
    except ConfigError as error:
        raise ConfigError(f"{', '.join(f'--{where}.{name}' for name in changes)}: {error}") from error


def parse_value(annotation: Any, text: str, where: str) -> Any:
    """A value from the command line: None, bools, numbers (1e-3, 1_000), tuples ("(1, 2)" or "a,b"), plain strings.

    A tuple of strings may be one string in quotes of its own, commas and all: "'a, b'".

    Raises:
      ConfigError: when the text is no such value.
    """
    members = union_members(annotation)
    if type(None) in members and text in ("None", "none", "null"):
        return None
    if str in members:
        return text
    if bool in members and text.lower() in ("true", "false"):
        return text.lower() == "true"
    value = _literal(text)
    if int in members and isinstance(value, float) and value.is_integer():
        value = int(value)
    for member in members:
        if get_origin(member) is tuple and not isinstance(value, tuple | list):
            quoted = isinstance(value, str) and value != text
            parts = [value] if quoted else [part.strip() for part in text.split(",") if part.strip()]
            value = tuple(parse_value(_item_type(member, i), part, f"{where}.{i}") for i, part in enumerate(parts))
        elif is_dataclass(member):
            raise ConfigError(f"{where}: is a {describe_type(member)}; set its fields, as in {where}.<field>=value")
    return typed(annotation, value, where)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _item_type(annotation: Any, place: int) -> Any:
    for member in union_members(annotation):
        arguments = get_args(member)
        if get_origin(member) is tuple:
            repeated = len(arguments) == 2 and arguments[1] is Ellipsis
            return arguments[0] if repeated else arguments[min(place, len(arguments) - 1)]
    return Any
