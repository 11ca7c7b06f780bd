"""One environment for every test: eight fake CPU devices, no TPU look-ups, a compilation cache.

`MMX_TEST_PLATFORM=cuda pytest ...` runs the same tests on a GPU.
"""

import os
import tempfile
from pathlib import Path

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
