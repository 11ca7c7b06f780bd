"""Kernels on a mesh: each device runs them on its own rows and heads.

The compiler cannot split a kernel; without `jax.shard_map` it would gather the arguments of all devices on each.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import lightning, softmax
from pallas_kernels import norm_gate as gated_norm
from parallel.key_heads import own_key_head
from parallel.sharding import DEFAULT_RULES, ShardingError

_ROWS = ("batch", None)
_HEADS = ("batch", None, "heads", None)
_KEYS = ("batch", None, "kv_heads", None)
_TOKENS = ("batch", "sequence", None, None)
_STATES = ("batch", "heads", None, None)


def lightning_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    slopes: Float[Array, " N"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """`pallas_kernels.lightning.lightning_attention` of whole packed rows, on the mesh in use or on one device."""

    def local(q: Array, k: Array, v: Array, slopes: Array, ids: Array) -> Array:
        return lightning.lightning_attention(q, k, v, slopes, segment_ids=ids)

    spec = DEFAULT_RULES.spec
    heads, specs = spec(_HEADS), (spec(("heads",)), spec(_ROWS))
    return _mapped(local, (heads, heads, heads, *specs), heads)(q, k, v, slopes, segment_ids)


def continued_lightning_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    slopes: Float[Array, " N"],
    segment_ids: Int[Array, "B T"],
    state: Float[Array, "B N H H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N H H"]]:
    """The same of rows that go on from a state, and the state after each row's last real token (fp32)."""

    def local(q: Array, k: Array, v: Array, slopes: Array, ids: Array, state: Array) -> tuple[Array, Array]:
        return lightning.lightning_attention(q, k, v, slopes, segment_ids=ids, initial_state=state, return_state=True)

    spec = DEFAULT_RULES.spec
    heads, states = spec(_HEADS), spec(_STATES)
    specs = (heads, heads, heads, spec(("heads",)), spec(_ROWS), states)
    return _mapped(local, specs, (heads, states))(q, k, v, slopes, segment_ids, state)


def decode_step(
    q: Float[Array, "B N H"],
    k: Float[Array, "B N H"],
    v: Float[Array, "B N H"],
    state: Float[Array, "B N H H"],
    slopes: Float[Array, " N"],
) -> tuple[Float[Array, "B N H"], Float[Array, "B N H H"]]:
    """`pallas_kernels.lightning.decode_step` of one token a row, on the mesh in use or on one device."""
    spec = DEFAULT_RULES.spec
    token, states = spec(("batch", "heads", None)), spec(_STATES)
    specs = (token, token, token, states, spec(("heads",)))
    return _mapped(lightning.decode_step, specs, (token, states))(q, k, v, state, slopes)


def softmax_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    k_start: Int[Array, "B T"],
    k_end: Int[Array, "B T"],
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """`pallas_kernels.softmax.softmax_attention` of whole rows, on the mesh in use or on one device.

    Where the mesh splits query heads more ways than there are key/value heads, all devices hold all of these, and each
    reads the one of its query heads (INV-21).

    Raises:
      ShardingError: neither the number of key/value heads nor that of their shards divides the other.
    """
    ways = _ways(DEFAULT_RULES.kv_heads)
    shared = k.shape[2] < ways
    if (ways % k.shape[2]) if shared else (k.shape[2] % ways):
        raise ShardingError(
            f"softmax attention: {k.shape[2]} key/value heads and the {ways} shards of mesh axes "
            f"{DEFAULT_RULES.kv_heads}: neither divides the other"
        )

    def local(q: Array, k: Array, v: Array, start: Array, end: Array) -> Array:
        if shared:
            k, v = (own_key_head(x) for x in (k, v))
        return softmax.softmax_attention(q, k, v, k_start=start, k_end=end, scale=scale)

    spec = DEFAULT_RULES.spec
    keys = spec(("batch", None, None, None) if shared else _KEYS)
    return _mapped(local, (spec(_HEADS), keys, keys, spec(_ROWS), spec(_ROWS)), spec(_HEADS))(q, k, v, k_start, k_end)


def norm_gate(
    x: Float[Array, "B T N H"], gate_logits: Float[Array, "B T N H"], weight: Float[Array, "N H"], eps: float
) -> Float[Array, "B T N H"]:
    """`pallas_kernels.norm_gate.norm_gate` of each device's own tokens, on the mesh in use or on one device.

    A token's statistic is over all heads: where the mesh splits these, or rows do not divide, the compiler splits the
    portable form instead.
    """
    batch, length, heads = map(_ways, (DEFAULT_RULES.batch, DEFAULT_RULES.sequence, DEFAULT_RULES.heads))
    if heads > 1 or x.shape[0] % batch or x.shape[1] % length:
        return gated_norm.norm_gate(x, gate_logits, weight, eps)

    def local(x: Array, gate_logits: Array, weight: Array) -> Array:
        return gated_norm.norm_gate(x, gate_logits, weight, eps)

    tokens = DEFAULT_RULES.spec(_TOKENS)
    return _mapped(local, (tokens, tokens, PartitionSpec()), tokens)(x, gate_logits, weight)


def _ways(axes: tuple[str, ...]) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def _mapped(
    function: Callable[..., Any],
    in_specs: tuple[PartitionSpec, ...],
    out_specs: PartitionSpec | tuple[PartitionSpec, ...],
) -> Callable[..., Any]:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    return partial(jax.shard_map, in_specs=in_specs, out_specs=out_specs, check_vma=False)(function)
