"""A process that does nothing but save: `python writer_process.py FOLDER` saves steps until it is killed.

Step s of a state of about 50 MB holds arrays that only s decides, so whoever finds a step knows what must be in it.
Like a trainer it resumes from the newest good step; it ends with an error when that step is not what it must be.
"""

import os
import sys

os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=2")

import jax
import numpy as np

from mmx_jax.checkpoint import CheckpointNotFoundError, CheckpointStore

ARRAYS = 8
ROWS, COLUMNS = 1024, 1600  # 6.55 MB of float32 each, 52 MB in all


def content(step: int) -> dict[str, dict[str, np.ndarray]]:
    """The state of a step."""
    base = np.arange(ROWS * COLUMNS, dtype=np.uint32).reshape(ROWS, COLUMNS) * np.uint32(2654435761)
    values = [base ^ np.uint32(step * 1000003 + i) for i in range(ARRAYS)]
    half = ARRAYS // 2
    return {
        "params": {f"scan/{i}/w": value for i, value in enumerate(values[:half])},
        "optimizer": {f"mu/{i}": value for i, value in enumerate(values[half:])},
    }


def same(left: object, right: object) -> bool:
    """Whether two trees are bit-equal."""
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), left, right))


def main(folder: str) -> None:
    mesh = jax.make_mesh((2,), ("fsdp",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    store = CheckpointStore(folder, keep_last=2)
    store.open_for_writing()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), content(0))
    try:
        restored = store.restore(abstract)
    except CheckpointNotFoundError:
        step = 0
    else:
        step = restored.step
        if not same(restored.tree, content(step)) or restored.metadata != {"tokens": step * 4096}:
            sys.exit(f"step {step} was restored, but it is not what was saved")
    while True:
        step += 1
        store.save(step, jax.device_put(content(step), sharding), {"tokens": step * 4096})


if __name__ == "__main__":
    main(sys.argv[1])
