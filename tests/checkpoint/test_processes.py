"""Two real processes write one step together, read it in other splits, and agree on which step is good."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.checkpoint import two_processes

ROOT = Path(__file__).parents[2]


def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, two_processes.__file__, str(process), port, str(tmp_path / "run")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    errors = [error for _, error in outputs]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    assert "another process found damage" in errors[0]
    assert "array 'params/rows', chunk (3, 0)" in errors[1]
    assert all("trying the step before it" in error for error in errors)
