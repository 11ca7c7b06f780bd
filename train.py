"""Trains what a configuration describes, or goes on where it was stopped.

    python train.py --config configs/quickstart.py
    python train.py --config configs/research_60m.py --workdir runs/a --config.stages.0.optimizer.clip_norm=None

Typed again with the same workdir, it resumes. Exit codes:

    0   done
    2   the command line, the configuration or the input cannot work; one line says why, naming the key or the file
    70  loss or gradients were not finite for too many steps in a row
    74  the workdir or a checkpoint could not be written: disk full, read-only folder, dead writer
    75  stopped by SIGTERM or Ctrl-C after saving; type the same command to go on
    76  several processes: another one was lost or failed; start all again to go on
"""

import sys
from dataclasses import replace

from absl import flags

from mmx_jax.config import ConfigError, RunConfig
from mmx_jax.config.overrides import EXIT_CONFIG, fail_with, run_with_config
from parallel import distributed

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, metrics and plots; default runs/<name>.")
EXIT_WRITE = 74
distributed.define_flags()


def main(config: RunConfig) -> int:
    """Runs the configuration; errors that a user can mend end with their exit code and one message."""
    from mmx_jax.checkpoint import CheckpointError, CheckpointWriteError
    from mmx_jax.convert import ConvertError
    from mmx_jax.data import DataError
    from mmx_jax.inference.load import LoadError
    from mmx_jax.training.errors import Interrupted, TrainingError
    from mmx_jax.training.run import run as train
    from parallel.mesh import MeshError
    from parallel.sharding import ShardingError

    if _WORKDIR.value is not None:
        config = replace(config, workdir=_WORKDIR.value)
    try:
        train(config)
    except Interrupted as end:
        print(end, file=sys.stderr)
        return end.exit_code
    except TrainingError as error:
        fail_with(error, error.exit_code)
    except CheckpointWriteError as error:
        fail_with(error, EXIT_WRITE)
    except (ConfigError, MeshError, ShardingError, DataError, CheckpointError, ConvertError, LoadError) as error:
        fail_with(error, EXIT_CONFIG)
    return 0


def run(config: RunConfig) -> int:
    """Runs the configuration as one of the processes that were launched, or alone."""
    try:
        return distributed.run(lambda: main(config))
    except distributed.LaunchError as error:
        return fail_with(error)


if __name__ == "__main__":
    run_with_config(run)
