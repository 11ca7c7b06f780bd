"""Several real processes: they train, are killed and go on bit for bit; when one is lost, all end and say which.

Everything goes through `train.py`, as on a cluster; the processes find each other on this host's loopback.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from mmx_jax.checkpoint import CheckpointStore
from mmx_jax.config import BatchConfig, MeshConfig, RunConfig, ScheduleConfig, SchedulePhase
from parallel.distributed import EXIT_LOST
from tests.parallel import late
from tests.training import process
from tests.training.conftest import LENGTH, stores, tiny  # noqa: F401  (fixtures)

# Many devices and processes on few cores: one after another, on one worker.
pytestmark = pytest.mark.xdist_group("parallel")

TIMEOUT = 600
"""Seconds for one start of all processes on a busy host."""
LOST_SECONDS = 60
STEPS = 12


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Run:
    """The processes of one start of `train.py`, each with its own log beside the workdir."""

    def __init__(self, config: Path, workdir: Path, count: int):
        address = f"localhost:{_free_port()}"
        self.workdir = workdir
        self.logs = [Path(f"{workdir}.{index}.log") for index in range(count)]
        environment = os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(process.ROOT),
        }
        self.processes = []
        for index, log in enumerate(self.logs):
            command = [
                sys.executable, str(process.ROOT / "train.py"), f"--config={config}", f"--workdir={workdir}",
                f"--coordinator_address={address}", f"--num_processes={count}", f"--process_id={index}",
            ]  # fmt: skip
            with open(log, "w") as output:
                self.processes.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))

    def said(self, index: int) -> str:
        return self.logs[index].read_text()

    def wait(self, seconds: float = TIMEOUT) -> list[int]:
        """Exit codes of all."""
        end = time.monotonic() + seconds
        try:
            return [running.wait(max(0.1, end - time.monotonic())) for running in self.processes]
        finally:
            self.kill()

    def finish(self) -> None:
        codes = self.wait()
        assert set(codes) == {0}, (codes, [self.said(index)[-3000:] for index in range(len(codes))])
        later = self.said(0).partition("devices: ")[2]
        assert not re.findall(r"is connected to [1-9].*", later), (
            "processes meet for the first time before they compile"
        )

    def wait_for_update(self, update: int) -> None:
        end = time.monotonic() + TIMEOUT
        while not any(line["update"] >= update for line in process.metrics(self.workdir)):
            alive = [running.poll() is None for running in self.processes]
            assert all(alive), [self.said(index)[-3000:] for index in range(len(alive))]
            assert time.monotonic() < end, f"update {update} did not come"
            time.sleep(0.01)

    def trainer(self, index: int) -> psutil.Process:
        """The training process behind its guard."""
        (child,) = psutil.Process(self.processes[index].pid).children()
        return child

    def kill(self) -> None:
        """SIGKILL to all at once."""
        for running in self.processes:
            running.kill()
        for running in self.processes:
            running.wait()


@pytest.fixture(scope="module")
def short(tiny: RunConfig) -> RunConfig:  # noqa: F811
    """Twelve steps of four rows, a checkpoint every fourth, the batch split over all devices; dense, to trace fast."""
    tokens = STEPS * 4 * LENGTH
    stage = replace(
        tiny.stages[0],
        batch=BatchConfig(micro_batch=4, ramp=((0, 4),)),
        schedule=ScheduleConfig(phases=(SchedulePhase(until_tokens=tokens, learning_rate=1e-2),), warmup_steps=2),
    )
    return replace(tiny, model=replace(tiny.model, num_experts=0), stages=(stage,), mesh=MeshConfig(fsdp=-1))


def _assert_lost(run: Run, victim: int, code: int, words: str) -> None:
    """The victim ends with `code`, all others within a minute with theirs and one line that names the victim."""
    start = time.monotonic()
    codes = run.wait(LOST_SECONDS)
    assert time.monotonic() - start < LOST_SECONDS
    expected = [EXIT_LOST] * len(codes)
    expected[victim] = code
    assert codes == expected, [run.said(index)[-3000:] for index in range(len(codes))]
    saved = CheckpointStore(run.workdir / "checkpoints").steps()
    for index in range(len(codes)):
        if index == victim:
            continue
        (line,) = re.findall(r"^error: .*this run stops.*$", run.said(index), re.MULTILINE)
        pattern = rf"process {victim} \(host {re.escape(socket.gethostname())}, pid \d+\) is lost: {words}"
        assert re.search(pattern, line), line
        # Of a save that was under way when the line was written, either is true.
        step = re.search(r"start all processes again(?: to resume from step (\d+)|; no checkpoint is saved yet)$", line)
        assert step, line
        assert step[1] is None or int(step[1]) in saved


def _assert_equal(one: Path, other: Path) -> None:
    assert process.metrics(one) == process.metrics(other)
    expected, found = process.arrays(one), process.arrays(other)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_two_processes_end_bit_equal_whatever_kills_them(short: RunConfig, tmp_path: Path) -> None:
    """The second one killed alone, then both at once: the run goes on each time and changes nothing."""
    config = process.write_config(short, tmp_path / "short.py")
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    Run(config, calm, 2).finish()
    assert len(process.metrics(calm)) == STEPS

    run = Run(config, killed, 2)
    run.wait_for_update(5)
    run.trainer(1).kill()
    _assert_lost(run, 1, 128 + signal.SIGKILL, "ended by SIGKILL")
    run = Run(config, killed, 2)
    run.wait_for_update(9)
    run.kill()
    run = Run(config, killed, 2)
    run.finish()
    assert "resuming from checkpoint" in run.said(0)
    assert "[Gloo]" in run.said(1).splitlines()[0], "what the transport says is all that the second process shows"
    assert not [line for line in run.said(1).splitlines() if not line.startswith("[Gloo]")]
    _assert_equal(calm, killed)


@pytest.mark.full
def test_four_processes_end_bit_equal_whatever_kills_them(short: RunConfig, tmp_path: Path) -> None:
    """The coordinator's trainer alone is killed, then SIGTERM to one saves and ends all (code 75), then all are killed.

    Tensor parts are split too, so that two processes hold the same rows, each its part of the state.
    """
    short = replace(short, mesh=MeshConfig(fsdp=2, tensor=2))
    config = process.write_config(short, tmp_path / "short.py")
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    Run(config, calm, 4).finish()

    run = Run(config, killed, 4)
    run.wait_for_update(5)
    run.trainer(0).kill()
    _assert_lost(run, 0, 128 + signal.SIGKILL, "ended by SIGKILL")
    run = Run(config, killed, 4)
    run.wait_for_update(6)
    run.processes[3].terminate()
    assert run.wait() == [75] * 4, run.said(0)[-3000:]
    run = Run(config, killed, 4)
    run.wait_for_update(9)
    run.kill()
    Run(config, killed, 4).finish()
    _assert_equal(calm, killed)


@pytest.mark.full
def test_a_process_may_come_late_once_all_are_connected() -> None:
    """Later by more than the 30 s that Gloo waits for a first meeting; two devices a process, every group of them."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(process.ROOT)
    }  # fmt: skip
    port = str(_free_port())
    running = [
        subprocess.Popen([sys.executable, late.__file__, port, str(index), seconds], env=environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for index, seconds in enumerate(("0", "35"))
    ]  # fmt: skip
    for one in running:
        said, _ = one.communicate(timeout=TIMEOUT)
        assert one.returncode == 0, said[-3000:]
        assert said.splitlines().count("4.0") == 3, said[-3000:]


@pytest.mark.full
def test_the_first_process_lost_with_its_guard(short: RunConfig, tmp_path: Path) -> None:
    """Nobody is left to ask: the others see the connection close, and JAX's own abort does not hide the reason."""
    run = Run(process.write_config(short, tmp_path / "short.py"), tmp_path / "work", 2)
    run.wait_for_update(5)
    run.processes[0].kill()
    _assert_lost(run, 0, -signal.SIGKILL, "its connection closed")
