"""Trains what a configuration describes, or goes on where it was stopped.

    python train.py --config configs/quickstart.py
    python train.py --config configs/research_60m.py --workdir runs/a --config.stages.0.optimizer.clip_norm=None

    python train.py --config configs/minimax_text_01.py --compile_only --topology v5p:16x16x16

Typed again with the same workdir, it resumes. The third line trains nothing and needs no accelerator: it compiles the
step for one and prints a JSON line (docs/scaling.md). Exit codes:

    0   done
    2   the command line, the configuration or the input cannot work; one line says why, naming the key or the file
    70  loss or gradients were not finite for too many steps in a row
    74  the workdir or a checkpoint could not be written: disk full, read-only folder, dead writer
    75  stopped by SIGTERM or Ctrl-C, after saving what was trained; type the same command to go on
    76  several processes: another one was lost or failed; start all again to go on
"""

import json
import os
import sys
from dataclasses import replace

from absl import flags

from mmx_jax.config import ConfigError, RunConfig
from mmx_jax.config.command_line import EXIT_CONFIG, fail_with
from mmx_jax.config.overrides import run_with_config
from parallel import distributed

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, metrics and plots; default runs/<name>.")
_COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "Compile the step for --topology and print a JSON line.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Slice to compile for, as in v5p:16x16x16 or v6e:16x16*2 (two).")
_SEARCH = flags.DEFINE_bool("search", False, "With --compile_only: try other meshes, remat policies, micro-batches.")
_SEARCH_COMPILES = flags.DEFINE_integer(
    "search_compiles", 3, "With --search: how many that fit are compiled; 0 only ranks on paper.", lower_bound=0
)
EXIT_WRITE = 74
EXIT_INTERRUPTED = 75
WITHOUT_HARDWARE = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
"""Environment with which the TPU compiler loads where there is no TPU."""
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
    except KeyboardInterrupt:  # before the first step, or a second time
        print("Ctrl-C: stopped; the same command goes on from the last checkpoint, or from the start", file=sys.stderr)
        return EXIT_INTERRUPTED
    except TrainingError as error:
        fail_with(error, error.exit_code)
    except CheckpointWriteError as error:
        fail_with(error, EXIT_WRITE)
    except (ConfigError, MeshError, ShardingError, DataError, CheckpointError, ConvertError, LoadError) as error:
        fail_with(error, EXIT_CONFIG)
    return 0


def run(config: RunConfig) -> int:
    """Runs the configuration as one of the processes that were launched, or alone."""
    if _COMPILE_ONLY.value:
        return compile_only(config)
    try:
        for flag in (_SEARCH, _SEARCH_COMPILES, _TOPOLOGY):
            if flag.present:
                raise ConfigError(f"--{flag.name} goes with --compile_only, which trains nothing")
        return distributed.run(lambda: main(config))
    except (ConfigError, distributed.LaunchError) as error:
        return fail_with(error)


def compile_only(config: RunConfig) -> int:
    """Compiles the first stage's step for the topology and prints a JSON line, or one for each step of a search.

    A step that does not fit is reported too, and ends with the exit code of a configuration that cannot work.
    """
    import jax

    os.environ.update(WITHOUT_HARDWARE)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # a program for absent chips cannot be read back
    from mmx_jax.training.ahead import Target, compile_ahead, does_not_fit
    from mmx_jax.training.search import search
    from parallel.mesh import MeshError
    from parallel.sharding import ShardingError
    from parallel.topology import TopologyError, parse_topology

    try:
        if _TOPOLOGY.value is None:
            raise ConfigError("--compile_only needs --topology, as in --topology=v5p:16x16x16")
        target = Target(config, parse_topology(_TOPOLOGY.value))
        if _SEARCH.value:
            search(target, _SEARCH_COMPILES.value)
            return 0
        if _SEARCH_COMPILES.present:
            raise ConfigError("--search_compiles goes with --search")
        report = compile_ahead(target)
    except (ConfigError, MeshError, ShardingError, TopologyError) as error:
        fail_with(error, EXIT_CONFIG)
    except KeyboardInterrupt:
        print("Ctrl-C: stopped; what was compiled until then is ranked above", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(json.dumps(report), flush=True)
    return 0 if report["fits"] else fail_with(does_not_fit(report), EXIT_CONFIG)


if __name__ == "__main__":
    run_with_config(run)
