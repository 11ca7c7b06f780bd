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


def _runs(python, code):
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def _works(python):
    return _runs(python, "import torch, transformers")


def oracle_python():
    """Path of the interpreter: the one that MMX_ORACLE_PYTHON names, or a virtual environment made on first use.

    Returns None where there is no Python 3.11 to make one from.
    Raises RuntimeError when the variable names one that lacks PyTorch or transformers.
    """
    if named := os.environ.get(VARIABLE):
        if not _works(named):
            raise RuntimeError(f"{VARIABLE} = {named}: cannot import torch and transformers")
        return named
    python = str(FOLDER / "bin" / "python")
    if Path(python).is_file() and _works(python):
        return python
    base = shutil.which("python3.11")
    # A version manager may leave a command of this name that only says that there is no such version.
    if base is None or not _runs(base, "import sys; assert sys.version_info[:2] == (3, 11)"):
        return None
    subprocess.run([base, "-m", "venv", "--clear", str(FOLDER)], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "-r", str(HERE / "requirements.txt")]
    subprocess.run(install, check=True, timeout=BUILD_SECONDS)
    return python
