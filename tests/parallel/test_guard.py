"""Guards end all processes of a run when one is lost, and say which; the work of these processes is to sleep."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from parallel.guard import EXIT_LOST
from tests.parallel import guarded
from tests.training.process import ROOT

LONG = (60.0, 0)
AGAIN = "; this run stops; start all processes again to resume from step 7\n"


def _run(
    *work: tuple[float, int], act: Callable[[list[subprocess.Popen]], None] | None = None
) -> tuple[list[int], list[str], float]:
    """Runs a process for each (seconds, exit code) of work; returns exit codes, what they said, and the seconds."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    running = []
    for index, (seconds, code) in enumerate(work):
        command = [sys.executable, guarded.__file__, port, str(len(work)), str(index), str(seconds), str(code)]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                                        env=os.environ | {"PYTHONPATH": str(ROOT)}))  # fmt: skip
    try:
        if act is not None:
            time.sleep(2)
            act(running)
        start = time.monotonic()
        said = [process.communicate(timeout=40)[1] for process in running]
        return [process.returncode for process in running], said, time.monotonic() - start
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.mark.parametrize("code", [0, 75])
def test_processes_that_end_alike_say_nothing(code: int) -> None:
    codes, said, _ = _run((0.2, code), (0.4, code), (0.1, code))
    assert codes == [code] * 3
    assert said == [""] * 3


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_process_ends_all(victim: int) -> None:
    work = [LONG, LONG, LONG]
    work[victim] = (0.5, -signal.SIGKILL)
    codes, said, seconds = _run(*work)
    assert codes == [128 + signal.SIGKILL if index == victim else EXIT_LOST for index in range(3)]
    assert seconds < 15
    for line in said:
        assert line.startswith(f"error: process {victim} (host here, pid ")
        assert line.endswith(f") is lost: ended by SIGKILL (out of memory?){AGAIN}")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_guard_ends_all_and_its_own_process(victim: int) -> None:
    workers: list[psutil.Process] = []

    def kill(running: list[subprocess.Popen]) -> None:
        workers.extend(psutil.Process(process.pid).children()[0] for process in running)
        running[victim].kill()

    codes, said, seconds = _run(LONG, LONG, LONG, act=kill)
    assert codes == [-signal.SIGKILL if index == victim else EXIT_LOST for index in range(3)]
    assert seconds < 15
    assert all(
        f"process {victim} (host here, pid {workers[victim].pid}) is lost" in said[k] for k in {0, 1, 2} - {victim}
    )
    assert psutil.wait_procs(workers, timeout=5)[1] == []


def test_a_failed_process_ends_the_others_after_a_while() -> None:
    """Its own output explains the failure, so its guard says nothing."""
    codes, said, seconds = _run(LONG, (0.5, 3), LONG)
    assert codes == [EXIT_LOST, 3, EXIT_LOST]
    assert seconds < 15
    assert said[1] == ""
    assert "process 1 (host here, pid " in said[0]
    assert said[0].endswith(f") ended with exit code 3, as its own output explains{AGAIN}")


def test_sigterm_reaches_the_training_process() -> None:
    """Work that does not listen to it dies of it; Ctrl-C asks the same."""
    codes, said, _ = _run(LONG, LONG, act=lambda running: running[1].send_signal(signal.SIGINT))
    assert codes == [EXIT_LOST, 128 + signal.SIGTERM]
    assert "is lost: ended by SIGTERM" in said[0]


@pytest.mark.full
def test_a_guard_that_falls_silent_is_lost() -> None:
    codes, said, _ = _run(LONG, LONG, act=lambda running: _stop_for(running[1], 30))
    assert codes[0] == EXIT_LOST
    assert "process 1 (host here, pid" in said[0]
    assert "is lost: not heard of for 20 s" in said[0]


def _stop_for(process: subprocess.Popen, seconds: float) -> None:
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)
