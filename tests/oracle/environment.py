"""Finds, or builds, the Python in which the oracle runs: 3.11 with PyTorch for the CPU and transformers."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
VARIABLE = "MMX_ORACLE_PYTHON"
FOLDER = Path(tempfile.gettempdir()) / "mmx-jax-oracle"
BUILD_SECONDS = 1200


def _works(python):
    check = subprocess.run([python, "-c", "import torch, transformers"], capture_output=True, check=False)
    return check.returncode == 0


def oracle_python():
    """Path of the interpreter: the one that MMX_ORACLE_PYTHON names, or a virtual environment made on first use.

    Returns None where there is no Python 3.11 to make one from.
    """
    if named := os.environ.get(VARIABLE):
        if not _works(named):
            raise RuntimeError(f"{VARIABLE} = {named}: cannot import torch and transformers")
        return named
    python = str(FOLDER / "bin" / "python")
    if Path(python).is_file() and _works(python):
        return python
    base = shutil.which("python3.11")
    if base is None:
        return None
    subprocess.run([base, "-m", "venv", "--clear", str(FOLDER)], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "-r", str(HERE / "requirements.txt")]
    subprocess.run(install, check=True, timeout=BUILD_SECONDS)
    return python
