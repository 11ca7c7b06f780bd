"""One of two processes of a run: `python two_processes.py PROCESS PORT FOLDER`, two CPU devices each.

Both save a state spread over all four devices and restore it in another split. Then process 1 alone finds a wrong bit
(in a chunk that only it reads), and both must go back to the same older step.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=2")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmx_jax.checkpoint import CheckpointStore

SHAPE = (8, 12)


def content(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(SHAPE).astype(np.float32)


def spread(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda part: value[part])


def check(tree: dict, step: int) -> None:
    for array in tree["params"].values():
        for shard in array.addressable_shards:
            assert np.array_equal(np.asarray(shard.data), content(step)[shard.index])
    assert int(tree["count"]) == step


def main(process: int, port: str, folder: Path) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    mesh = jax.make_mesh((2, 2), ("host", "chip"))
    rows = NamedSharding(mesh, P(("host", "chip")))
    replicated = NamedSharding(mesh, P())
    with CheckpointStore(folder) as store:
        for step in (1, 2, 3):
            params = {"rows": spread(content(step), rows), "copies": spread(content(step), replicated)}
            store.save(step, {"params": params, "count": jnp.int32(step)}, {"tokens": step})
        store.wait()
        assert store.steps() == [1, 2, 3]
        arrays = folder / "00000003/arrays"
        assert len(list((arrays / "params.rows").glob("c.*"))) == 4
        assert len(list((arrays / "params.copies").glob("c.*"))) == 1
        assert not list(folder.glob("*/checksums.part-*"))

        def abstract(spec: P) -> dict:
            leaf = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=NamedSharding(mesh, spec))
            return {"params": {"rows": leaf, "copies": leaf}, "count": jax.ShapeDtypeStruct((), jnp.int32)}

        for spec in (P("chip", "host"), P(None, "chip"), P(("chip", "host"))):
            restored = store.restore(abstract(spec))
            assert restored.step == 3
            check(restored.tree, 3)

        last = arrays / "params.rows/c.3.0"  # the last rows: process 1's under a split by host
        if process == 0:
            data = last.read_bytes()
            last.write_bytes(data[:-1] + bytes([data[-1] ^ 128]))
        multihost_utils.sync_global_devices("damaged")
        restored = store.restore(abstract(P(("host", "chip"))))
        assert restored.step == 2
        check(restored.tree, 2)
    print(f"process {process} done")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
