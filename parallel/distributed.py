"""Runs of several processes: start, barriers, agreement, and an end for all when one is lost.

`run` finds out what this process is (`parallel.launch`), meets the others, and does the work in a child process that a
guard watches (`parallel.guard`). A run of one process just does the work.

Everything that touches JAX's coordination client, which has no public name, is in `_client`.
"""

import contextlib
import itertools
import json
import os
import re
import socket
import sys
import traceback
from collections.abc import Callable, MutableMapping
from typing import Any

from absl import flags, logging

from parallel.guard import EXIT_LOST, Child, Guard
from parallel.launch import Launch, LaunchError, find_launch, metadata_attribute, on_tpu_vm
from parallel.links import Member, meet

__all__ = ["EXIT_LOST", "LaunchError", "agree", "barrier", "define_flags", "make_cpu_devices_exact", "run", "saved"]

HEARTBEAT_TIMEOUT = 30
"""Seconds after which JAX gives a silent process up; the guards are faster and say which one it was."""
CONNECT_SECONDS = 300
"""From the start of the work to JAX's cluster: processes that share a busy host import at different speeds."""
PATIENCE_SECONDS = 24 * 3600
"""Processes wait so long for one that prepares data or writes the report: guards notice when it dies."""
LAST_WORDS_SECONDS = 10.0
"""A failed process waits so long for the others to fail too, before it explains itself: when the failure is the echo of
a lost process, its guard ends it before."""
_YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type="
_meetings = itertools.count()
_listeners: list[Callable[[int], None]] = []


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Adds the flags that override what is found out about the processes of the run."""
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0, where its launcher does not say it; the "
                        "next port is used too.", flag_values=values)  # fmt: skip
    flags.DEFINE_integer("num_processes", None, "Processes of the run.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0, flag_values=values)


def run(work: Callable[[], int], values: flags.FlagValues = flags.FLAGS) -> int:
    """Does this process's part of a run and returns its exit code; must come before JAX is used.

    Args:
      work: the training; its exit code. In a run of several processes JAX knows all their devices when it begins.
      values: flags of `define_flags`.

    Returns:
      The code of `work`, or `EXIT_LOST` (76) when another process was lost or failed.

    Raises:
      LaunchError: the launcher does not say what is needed, or the processes do not find each other.
    """
    make_cpu_devices_exact(os.environ)
    launch = find_launch(
        os.environ, values.coordinator_address, values.num_processes, values.process_id,
        metadata_attribute if on_tpu_vm(os.environ) else None,
    )  # fmt: skip
    if launch is None:
        return work()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    child = Child()
    if child.inside:
        return _train(launch, child, work)
    try:
        links, members = meet(launch, Member(launch.index, socket.gethostname(), child.pid))
        return Guard(launch.index, child, links, members).run()
    finally:
        child.end(0)


def make_cpu_devices_exact(environment: MutableMapping[str, str]) -> None:
    """Has XLA compute matrix products without its library YNN where a process has several CPU devices.

    With it, the first execution of a program on several CPU devices of one process gives wrong results now and then
    (jaxlib 0.11.2: every first step of a small mixture of experts on eight devices and two busy cores; without it
    none). Later executions, and those on one device, are right. Must come before JAX is used.

    Args:
      environment: environment variables; XLA_FLAGS is changed, unless it says something about YNN already.
    """
    xla_flags = environment.get("XLA_FLAGS", "")
    forced = re.findall(r"--xla_force_host_platform_device_count=(\d+)", xla_flags)
    count = int(forced[-1]) if forced else int(environment.get("JAX_NUM_CPU_DEVICES") or 1)
    if count > 1 and _YNN_FLAG not in xla_flags:
        environment["XLA_FLAGS"] = f"{xla_flags} {_YNN_FLAG}".strip()


def _train(launch: Launch, child: Child, work: Callable[[], int]) -> int:
    """The training process: joins JAX's cluster, works, and leaves it together with the others."""
    import jax

    _listeners.append(child.saved)
    code, failure = 1, ""
    try:
        _initialize(launch)
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        failure = traceback.format_exc()
    if code == 0:
        jax.distributed.shutdown()
        return 0
    # JAX would wait at exit for processes that will not come.
    if client := _client():
        with contextlib.suppress(Exception):
            client.wait_at_barrier("mmx_jax/failed", int(LAST_WORDS_SECONDS * 1000))
    sys.stdout.flush()
    print(failure, end="", file=sys.stderr, flush=True)
    os._exit(code)


def _initialize(launch: Launch) -> None:
    """Makes this process one of JAX's; only the first one logs, the others speak of errors alone."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if launch.index != 0:
        logging.set_verbosity(logging.ERROR)
    jax.distributed.initialize(
        launch.address,
        launch.count,
        launch.index,
        local_device_ids=launch.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=CONNECT_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        shutdown_timeout_seconds=PATIENCE_SECONDS,
    )


def saved(step: int) -> None:
    """Says that the run would now resume from `step`: what is told when a process is lost."""
    for listener in _listeners:
        listener(step)


def _client() -> Any:
    """JAX's client of the coordination service, or None in a run of one process."""
    from jax._src import distributed

    return distributed.global_state.client


def barrier(name: str) -> None:
    """Waits until all processes are here; no devices take part, so that none times out over a long wait."""
    if client := _client():
        client.wait_at_barrier(f"mmx_jax/{name}/{next(_meetings)}", PATIENCE_SECONDS * 1000)


def agree(value: Callable[[], Any]) -> Any:
    """What the first process finds, on all processes: only it looks, so that no file system can disagree with itself.

    Args:
      value: called on process 0; returns JSON values. What it raises ends process 0, and with it the run.
    """
    import jax

    client = _client()
    if client is None:
        return value()
    key = f"mmx_jax/agreed/{next(_meetings)}"
    if jax.process_index() == 0:
        client.key_value_set(key, json.dumps(value()))
    return json.loads(client.blocking_key_value_get(key, PATIENCE_SECONDS * 1000))
