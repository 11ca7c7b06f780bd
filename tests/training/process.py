"""A real `train.py` process on a given configuration, and what it leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mmx_jax.config import RunConfig, to_dict

ROOT = Path(__file__).parents[2]
CLOCK_FIELDS = ("tokens_per_second", "mfu", "memory_gib")
"""What two equal runs may differ in."""

CONFIG_FILE = """
import json
from pathlib import Path
from mmx_jax.config import from_dict

def get_config():
    return from_dict(json.loads(Path(__file__).with_suffix(".json").read_text()))
"""


def write_config(config: RunConfig, path: Path) -> Path:
    """Writes a configuration file that returns `config`."""
    path.with_suffix(".json").write_text(json.dumps(to_dict(config)))
    path.write_text(CONFIG_FILE)
    return path


def start(config_file: Path, workdir: Path, *flags: str, devices: int = 1) -> subprocess.Popen:
    """Starts training; its output goes to workdir.log."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config_file), "--workdir", str(workdir), *flags]
    with open(f"{workdir}.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl that are whole, without what the clock decides."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK_FIELDS} for line in lines]


def arrays(workdir: Path) -> dict[str, bytes]:
    """Every file of the arrays of the newest checkpoint, byte for byte."""
    newest = max(path for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    folder = newest / "arrays"
    return {
        f"{newest.name}/{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
