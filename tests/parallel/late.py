"""One of two processes: `python late.py PORT INDEX SECONDS` connects, waits, and sums what the devices hold."""

import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from parallel.connect import connect
from parallel.mesh import make_mesh


def main(port: str, index: int, seconds: float) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, index, cluster_detection_method="deactivate")
    mesh = make_mesh({"data": 2, "fsdp": -1})
    connect(mesh)
    time.sleep(seconds)
    for axes in ("data", "fsdp", ("data", "fsdp")):
        sharding = NamedSharding(mesh, PartitionSpec(axes))
        ones = jax.make_array_from_callback((4,), sharding, lambda index: np.ones(4)[index])
        print(jax.jit(jax.numpy.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
