"""Flags of every program that reads a checkpoint."""

import sys

from absl import flags


def define_checkpoint_flags(values: flags.FlagValues) -> None:
    """Adds --checkpoint and --step, and shows them in the --help of the program."""
    flags.DEFINE_string(
        "checkpoint", None, "Workdir of a run, its folder of checkpoints, or a single step.", flag_values=values,
        module_name=sys.argv[0],
    )  # fmt: skip
    flags.DEFINE_integer(
        "step", None, "Checkpoint to take; by default the newest good one.", flag_values=values, module_name=sys.argv[0]
    )
