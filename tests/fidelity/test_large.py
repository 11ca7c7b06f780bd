"""A checkpoint with the full key set and true names of MiniMax-Text-01 at reduced width, both ways (issue 5, 3)."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mmx_jax.convert import compare_weights, parse_config
from mmx_jax.convert.names import tensor_map
from tests.fidelity.common import hub_config

# 3.5G parameters, 7 GB in bf16: 80 layers of 32 experts with D = 768, F = 576.
SIZES = {"hidden_size": 768, "intermediate_size": 576, "num_attention_heads": 8, "num_key_value_heads": 1,
         "head_dim": 128, "rotary_dim": 64, "vocab_size": 25_008, "num_local_experts": 32, "num_hidden_layers": 80,
         "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10}  # fmt: skip
LIMIT_BYTES = 3 * 10**9

WORK = """
import resource, sys, time
from mmx_jax.convert import {function}
start = time.monotonic()
{function}({arguments}, progress=False)
print("seconds", time.monotonic() - start)
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def make_source(folder):
    """Finite random bf16 values, different in every tensor; twenty files of four layers."""
    config = hub_config(**SIZES)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    pool = (rng.integers(0x3A00, 0x3D00, 2**22, dtype=np.uint16)) | (rng.integers(0, 2, 2**22, dtype=np.uint16) << 15)
    tensors = tensor_map(parse_config(config))
    files: dict[int, list[str]] = {}
    for name in tensors:
        layer = re.search(r"layers\.(\d+)\.", name)
        files.setdefault(int(layer[1]) // 4 if layer else 0, []).append(name)
    weight_map = {}
    for i, names in files.items():
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        part = {}
        for number, name in enumerate(names):
            start = (len(weight_map) + number) * 9973 % 2**20
            size = int(np.prod(tensors[name].shape))
            values = np.take(pool, np.arange(start, start + size), mode="wrap")
            part[name] = values.reshape(tensors[name].shape).view(ml_dtypes.bfloat16)
        safetensors.numpy.save_file(part, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def forget(folder):
    """Everything written reaches the disk, and the folder's files leave the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def copy(source, target):
    """Seconds of a plain copy that ends on the disk."""
    forget(source)
    start = time.monotonic()
    shutil.copytree(source, target)
    for file in target.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    return seconds


def convert(function, source, *arguments):
    """(seconds, peak bytes) of a conversion in a process of its own, its source not in the page cache."""
    forget(source)
    code = WORK.format(function=function, arguments=", ".join(map(repr, map(str, arguments))))
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    words = dict(line.split() for line in done.stdout.splitlines())
    return float(words["seconds"]), float(words["peak"])


@pytest.mark.full
def test_full_key_set_both_ways(tmp_path):
    source, work, out = tmp_path / "source", tmp_path / "work", tmp_path / "out"
    try:
        nbytes = make_source(source)
        assert 6e9 < nbytes < 10e9
        copies = [copy(source, tmp_path / "copy")]
        seconds_in, peak_in = convert("import_weights", source, source, work)
        copies.append(copy(source, tmp_path / "copy"))
        seconds_out, peak_out = convert("export_weights", work, work, out, "hub")
        copies.append(copy(source, tmp_path / "copy"))
        rate = {"copy": nbytes / np.mean(copies), "import": nbytes / seconds_in, "export": nbytes / seconds_out}
        print({name: f"{value / 1e9:.3f} GB/s" for name, value in rate.items()})
        print(f"{nbytes / 1e9:.2f} GB, peak {peak_in / 1e9:.2f} GB in, {peak_out / 1e9:.2f} GB out, copies {copies} s")
        problems = [difference.problem for difference in compare_weights(source, out)]
        assert problems == ["equal"] * 8243
        assert max(peak_in, peak_out) < LIMIT_BYTES
    finally:
        for folder in (source, work, out):
            shutil.rmtree(folder, ignore_errors=True)
