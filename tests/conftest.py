"""One environment for every test: eight fake CPU devices, no TPU look-ups, a compilation cache.

`MMX_TEST_PLATFORM=cuda pytest ...` runs the same tests on a GPU.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PLATFORM = os.environ.get("MMX_TEST_PLATFORM", "cpu")
ENVIRONMENT = {
    "JAX_PLATFORMS": PLATFORM if PLATFORM == "cpu" else f"{PLATFORM},cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    # The second flag as in parallel.distributed.make_cpu_devices_exact.
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_cpu_experimental_ynn_fusion_type=",
    "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "mmx-jax-test-compile-cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
}
os.environ.update(ENVIRONMENT)


@pytest.fixture(scope="module")
def compiler() -> Iterator[None]:
    """The TPU compiler: one process at a time uses it, without the cache.

    What is compiled for absent chips cannot be read back. libtpu keeps its own lock on the chips until the process
    ends, unless told that others may load it; compiling needs no chip.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    folder = jax.config.jax_compilation_cache_dir
    with (Path(tempfile.gettempdir()) / "mmx-jax-libtpu.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
        yield
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()
