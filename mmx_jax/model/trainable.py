"""Which parameters a stage trains, and how fast: its trainable groups read against the parameter spec."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from mmx_jax.config import ConfigError, RunConfig, TrainableGroup
from mmx_jax.model.spec import ParamSpec, parameter_spec

SHOWN = 3
"""So many patterns are proposed for one that matches nothing."""


def learning_rate_factors(specs: Mapping[str, ParamSpec], groups: tuple[TrainableGroup, ...]) -> dict[str, float]:
    """Factor on the learning rate by parameter path; 0 for frozen ones and for those that no group names.

    Raises:
      ConfigError: for a group that names no parameter, or when nothing is left to train.
    """
    for group in groups:
        if not any(fnmatchcase(path, group.pattern) for path in specs):
            near = ", ".join(map(repr, near_patterns(group.pattern, specs)))
            raise ConfigError(f"trainable: pattern {group.pattern!r} matches no parameter; near ones that do: {near}")
    factors = {
        path: next((group.learning_rate_factor for group in groups if fnmatchcase(path, group.pattern)), 0.0)
        for path in specs
    }
    if not any(factors.values()):
        raise ConfigError("trainable: every parameter is frozen")
    return factors


def near_patterns(pattern: str, specs: Mapping[str, ParamSpec]) -> list[str]:
    """Patterns like the given one that match parameters, best first: their paths, with * for numbers of layers."""
    known = list(dict.fromkeys(re.sub(r"(?<=/)\d+(?=/)", "*", path) for path in specs))
    last = [path.rpartition("/")[2] for path in known]
    # A name may be all that is meant ("qvk"), or all but its last part may be as it should.
    by_name = [known[last.index(name)] for name in get_close_matches(pattern.strip("*/"), last, SHOWN)]
    return list(dict.fromkeys([*by_name, *get_close_matches(pattern, known, SHOWN, cutoff=0)]))[:SHOWN]


def check_trainable(config: RunConfig) -> None:
    """Checks, before the first of them is trained, that each stage's trainable groups fit the model.

    Raises:
      ConfigError: names the stage, and the pattern that matches no parameter.
    """
    specs = parameter_spec(config.model)
    for stage in config.stages:
        try:
            learning_rate_factors(specs, stage.trainable)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name!r}: {error}") from error
