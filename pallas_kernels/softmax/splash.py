"""Softmax attention over packed segments on TPU: the splash kernels of jax, told of segments by ids.

Splash knows a causal mask and segment ids, no key ranges. Whether ranges say just that is only known when they are: the
caller asks `packed` on the device and runs another form where they do not.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from pallas_kernels import dispatch
from pallas_kernels.softmax.chunked import Ranges

BLOCKS = (512, 256, 128)
LANES = 128


def supports(q: jax.Array, k: jax.Array, *, lse: bool) -> str | None:
    """Says why a call cannot run on the current device, or None when it can, given that `packed` holds."""
    if dispatch.platform() != "tpu":
        return f"the platform is {dispatch.platform()}, not a TPU"
    if lse:
        return "its log-sum-exp has no gradient"
    if q.shape[1] != k.shape[1]:
        return f"{q.shape[1]} queries are not as many as {k.shape[1]} keys"
    if q.shape[1] % BLOCKS[-1]:
        return f"{q.shape[1]} queries are no multiple of {BLOCKS[-1]}"
    if q.shape[3] % LANES:
        return f"head dim {q.shape[3]} is no multiple of {LANES}"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtype is {q.dtype.name}"
    if jax.typeof(q).manual_axis_type.varying:
        return "it cannot say over which mesh axes its results vary"
    return None


def packed(ranges: Ranges) -> jax.Array:
    """Says whether every query sees its own segment up to itself, or nothing.

    That is so when each seeing query ends at itself, and starts at itself or where a seeing query just before it does.
    """
    position = jnp.arange(ranges.start.shape[1], dtype=jnp.int32)
    some = ranges.start < ranges.end
    before = jnp.pad(jnp.where(some, ranges.start, -1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    fits = (ranges.end == position + 1) & ((ranges.start == position) | (ranges.start == before))
    return jnp.all(fits | ~some)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, ranges: Ranges, scale: float) -> jax.Array:
    """Returns the output [B, T, N, H] for ranges that are `packed`; differentiable in q, k and v."""
    some = ranges.start < ranges.end
    ids = jnp.where(some, ranges.start, -1)
    attend = jax.vmap(_kernel(q.shape[1], q.shape[2]))
    q, k, v = (x.swapaxes(1, 2) for x in ((q * scale).astype(q.dtype), k, v))
    o = attend(q, k, v, splash_attention_kernel.SegmentIds(ids, ids))
    return jnp.where(some[..., None, None], o.swapaxes(1, 2), 0).astype(q.dtype)


def _kernel(length: int, heads: int) -> Any:
    block = next(size for size in BLOCKS if length % size == 0)
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash_attention_kernel.make_splash_mha_single_device(mask, block_sizes=sizes)
