"""What this card reaches on the two simplest jobs: moving bytes and multiplying matrices."""

import jax
import jax.numpy as jnp

from pallas_kernels.bench.timing import milliseconds


def copy_gbps(megabytes: int = 512) -> float:
    """Measures an elementwise pass over a large array, in GB/s of bytes read plus bytes written."""
    size = megabytes * 2**20 // 2
    arrays = [(jax.random.normal(jax.random.key(i), (size,), jnp.bfloat16),) for i in range(2)]
    passed = jax.jit(lambda x: -x)
    return 2 * 2 * size / milliseconds(passed, arrays) / 1e6


def matmul_tflops(size: int = 8192) -> float:
    """Measures a square bf16 matrix product, in TFLOP/s."""
    pairs = [
        tuple(jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(i)))
        for i in range(2)
    ]
    return 2 * size**3 / milliseconds(jax.jit(jnp.matmul), pairs) / 1e9
