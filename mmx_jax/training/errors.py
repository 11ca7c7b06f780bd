"""How training ends when it does not end well; each error knows the exit code of the program."""


class TrainingError(Exception):
    """Training cannot go on."""

    exit_code = 1


class CheckpointRefusedError(TrainingError):
    """The workdir holds a checkpoint that this configuration must not continue."""

    exit_code = 2


class WorkdirError(TrainingError):
    """The workdir cannot be written: read-only, full, no folder."""

    exit_code = 74


class NonFiniteError(TrainingError):
    """Loss or gradients were not finite for too many steps in a row, or what came out is not."""

    exit_code = 70


class Interrupted(TrainingError):
    """Stopped by SIGTERM or Ctrl-C after saving; the same command goes on."""

    exit_code = 75
