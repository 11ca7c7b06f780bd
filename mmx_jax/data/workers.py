"""Work on shards in several processes; a process that dies is an error, never a missing shard."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from mmx_jax.data.errors import DataError


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs[Job, Result](
    function: Callable[[Job], Result], jobs: Sequence[Job], processes: int, describe: Callable[[Job], str]
) -> Iterator[tuple[Job, Result]]:
    """Calls `function` on every job and yields (job, result) as they finish, in no order.

    Args:
      function: an importable function, as processes are spawned.
      jobs: what to call it on.
      processes: 1 calls it in this process.
      describe: names a job in errors.

    Raises:
      DataError: a process was killed.
      Exception: whatever `function` raised first; jobs that have not begun are dropped.
    """
    processes = min(processes, len(jobs))
    if processes <= 1:
        for job in jobs:
            yield job, function(job)
        return
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    futures: dict[Any, Job] = {}
    try:
        for job in jobs:
            try:
                futures[pool.submit(function, job)] = job
            except BrokenProcessPool as error:
                raise _died(describe(job)) from error
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool as error:
                raise _died(describe(futures[future])) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _died(job: str) -> DataError:
    return DataError(
        f"a worker process died while working on {job} or a shard beside it (killed, or out of memory); finished "
        "shards are kept: run the same command again, with fewer processes if memory is short"
    )
