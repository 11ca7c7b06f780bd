"""Softmax attention's public function: one range of visible keys for each query says every mask the model needs.

Causal, packed, offset (chunked prefill) and context-parallel masks are all ranges; no [T, S] mask exists anywhere.
"""

import functools
from types import ModuleType
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arrays import accumulator, alike
from pallas_kernels.softmax import chunked, mosaic_tpu, triton
from pallas_kernels.softmax.chunked import Ranges

NAMES = ("chunked", "cudnn", "dense", "mosaic_tpu", "triton")
"""Every name that `implementation=` accepts."""
DTYPES = ("bfloat16", "float16", "float32", "float64")
RESULTS = "softmax_results"
"""Checkpoint name of the output and its log-sum-exp: who keeps both spares the backward the forward's kernel."""
LEAST_QUERIES = 16
"""For fewer, as in decoding, a kernel that shares the work out by queries would leave most of the GPU idle."""


def implementations() -> tuple[str, ...]:
    """Names the implementations that can run on the present platform, best first."""
    return (*_candidates(LEAST_QUERIES, plain=True), "chunked", "dense")


@overload
def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    k_start: jax.Array | None = ...,
    k_end: jax.Array | None = ...,
    return_lse: Literal[False] = ...,
    implementation: str | None = ...,
) -> jax.Array: ...


@overload
def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    k_start: jax.Array | None = ...,
    k_end: jax.Array | None = ...,
    return_lse: Literal[True],
    implementation: str | None = ...,
) -> tuple[jax.Array, jax.Array]: ...


def softmax_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    scale: float,
    k_start: Int[Array, "B T"] | None = None,
    k_end: Int[Array, "B T"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Computes softmax(scale * q k^T) v over each query's range of keys, query head n reading key head n // (N / K).

    The softmax is fp32. Differentiable in q, k and v, also through the returned log-sum-exp, so that partial results
    over pieces of the keys may be merged (model.md section 5; INV-17, INV-21, INV-36, INV-39). Under `jax.vmap`
    a GPU computes one element after another; B is the dimension for batches.

    Args:
        q, k, v: bf16, fp16, fp32 or fp64, of one dtype; K divides N. They must be finite, keys that no query sees too.
        scale: the factor of the scores, for MiniMax-01 H**-0.5.
        k_start, k_end: int32; query t sees the keys k_start <= j < k_end. A query that sees none gives 0, its
            log-sum-exp is -inf, and its gradients are 0. Both None: plain causal, T == S.
        return_lse: also return the fp32 log-sum-exp of each query's scores.
        implementation: a name to force; by default the best one for platform, shape and dtype.

    Raises:
        ValueError: shapes or dtypes disagree, an axis is empty, one range end is missing, or the forced implementation
            cannot run this call.
    """
    _check(q, k, v, k_start, k_end)

    plain = k_start is None

    def obstacle(name: str) -> str | None:
        if name == "cudnn":
            return _cudnn_obstacle(q, k, plain=plain, lse=return_lse)
        return _kernel_obstacle(name, q, k, scale)

    title = f"softmax_attention of {q.dtype.name}{list(q.shape)} over {k.shape[1]} keys"
    candidates = _candidates(q.shape[1], plain=plain and not return_lse)
    name = dispatch.choose(title, candidates, obstacle, fallback="chunked", forced=implementation, known=NAMES)
    if name == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
    q, k, v, *ends = alike(q, k, v, *_ranges(q, k, k_start, k_end))
    ranges = Ranges(*ends)
    if name == "dense":
        o, lse = _dense(scale, q, k, v, ranges)
    else:
        o, lse = _attention(name, return_lse, scale, q, k, v, ranges)
    return (o, lse) if return_lse else o


def softmax_backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    k_start: Int[Array, "B T"],
    k_end: Int[Array, "B T"],
    o: Float[Array, "B T N H"],
    lse: Float[Array, "B T N"],
    do: Float[Array, "B T N H"],
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Returns the parts of dq, dk and dv (in their arrays' dtypes) that come from the keys given.

    These may be a piece of all keys: where output and log-sum-exp are those over all, the parts of all pieces add up to
    the gradients (INV-39).

    Args:
        q, k, v, k_start, k_end, scale: as given to `softmax_attention`; ranges count from the first key given.
        o, lse: the output and its log-sum-exp over all keys.
        do: gradient arriving at the output.
        implementation: "chunked", "mosaic_tpu" or "triton" to force; by default the best for platform, shape and dtype.

    Raises:
        ValueError: shapes disagree, or the forced implementation cannot run this call.
    """
    _check(q, k, v, k_start, k_end)

    def obstacle(name: str) -> str | None:
        return _kernel_obstacle(name, q, k, scale)

    title = f"softmax_backward of {q.dtype.name}{list(q.shape)} over {k.shape[1]} keys"
    candidates = _candidates(q.shape[1], plain=False)
    known = ("chunked", "mosaic_tpu", "triton")
    name = dispatch.choose(title, candidates, obstacle, fallback="chunked", forced=implementation, known=known)
    q, k, v, start, end, o, lse, do = alike(q, k, v, *_ranges(q, k, k_start, k_end), o, lse, do)
    return _module(name).backward(q, k, v, Ranges(start, end), scale, o, lse, do, None)


def named(o: Float[Array, "B T N H"], lse: Float[Array, "B T N"]) -> tuple[jax.Array, jax.Array]:
    """Gives the results that a backward starts from their checkpoint name, `RESULTS`, in the rule of a `custom_vjp`."""
    return checkpoint_name(o, RESULTS), checkpoint_name(lse, RESULTS)


def _candidates(queries: int, *, plain: bool) -> tuple[str, ...]:
    if dispatch.platform() == "tpu":
        return ("mosaic_tpu",) if queries >= LEAST_QUERIES else ()
    capability = dispatch.compute_capability() if dispatch.platform() == "gpu" else None
    if capability is None or capability < 8 or queries < LEAST_QUERIES:
        return ()
    return ("cudnn", "triton") if plain else ("triton",)


def _kernel_obstacle(name: str, q: jax.Array, k: jax.Array, scale: float) -> str | None:
    """Says why one of our own implementations cannot run a call, None when it can."""
    if name == "mosaic_tpu":
        return mosaic_tpu.supports(q, k)
    return triton.supports(q, k, scale) if name == "triton" else None


def _cudnn_obstacle(q: jax.Array, k: jax.Array, *, plain: bool, lse: bool) -> str | None:
    if dispatch.platform() != "gpu":
        return f"the platform is {dispatch.platform()}, not a GPU"
    if not plain:
        return "key ranges are given"
    if lse:
        return "its log-sum-exp has no gradient"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype is {q.dtype.name}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"head dim {q.shape[-1]} is not a multiple of 8 up to 128"
    return None


def _ranges(q: jax.Array, k: jax.Array, k_start: jax.Array | None, k_end: jax.Array | None) -> Ranges:
    """Returns ranges within the keys; causal ones where none are given."""
    batch, length = q.shape[:2]
    if k_start is None or k_end is None:
        end = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=jnp.int32), (batch, length))
        return Ranges(jnp.zeros_like(end), end)
    return Ranges(jnp.maximum(k_start, 0), jnp.minimum(k_end, k.shape[1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(
    name: str, return_lse: bool, scale: float, q: jax.Array, k: jax.Array, v: jax.Array, ranges: Ranges
) -> tuple[jax.Array, Any]:
    """Runs one of the modules that compute their own gradients, also through the log-sum-exp."""
    o, lse = _module(name).forward(q, k, v, ranges, scale)
    return o, lse if return_lse else None


def _attention_forward(name: str, return_lse: bool, scale: float, *arguments: Any) -> tuple[Any, Any]:
    q, k, v, ranges = arguments
    o, lse = named(*_module(name).forward(q, k, v, ranges, scale))
    return (o, lse if return_lse else None), (q, k, v, ranges, o, lse)


def _attention_backward(name: str, return_lse: bool, scale: float, residuals: Any, gradients: Any) -> Any:
    q, k, v, ranges, o, lse = residuals
    return (*_module(name).backward(q, k, v, ranges, scale, o, lse, *gradients), None)


_attention.defvjp(_attention_forward, _attention_backward)


def _module(name: str) -> ModuleType:
    return {"chunked": chunked, "mosaic_tpu": mosaic_tpu, "triton": triton}[name]


def _dense(scale: float, q: jax.Array, k: jax.Array, v: jax.Array, ranges: Ranges) -> tuple[jax.Array, jax.Array]:
    """The oracle: all scores at once, gradients by autodiff."""
    dtype = accumulator(q)
    keys, values = (jnp.repeat(x.astype(dtype), q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    position = jnp.arange(k.shape[1])
    visible = (position >= ranges.start[..., None]) & (position < ranges.end[..., None])
    some = jnp.any(visible, axis=-1)[..., None]
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("btnh,bsnh->btns", q.astype(dtype), keys) * scale
        # A query without keys softens over all of them and is then erased, so that no gradient is NaN.
        scores = jnp.where(visible[:, :, None] | ~some[..., None], scores, -jnp.inf)
        o = jnp.einsum("btns,bsnh->btnh", jax.nn.softmax(scores, axis=-1), values)
    lse = jnp.where(some, jax.nn.logsumexp(scores, axis=-1), -jnp.inf)
    return jnp.where(some[..., None], o, 0).astype(q.dtype), lse


def _check(q: jax.Array, k: jax.Array, v: jax.Array, k_start: jax.Array | None, k_end: jax.Array | None) -> None:
    arrays = {"q": q, "k": k, "v": v}
    for name, x in arrays.items():
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"softmax_attention: {name} must have four axes, none of them empty, got {list(x.shape)}")
    if q.dtype.name not in DTYPES or not q.dtype == k.dtype == v.dtype:
        given = ", ".join(f"{name} {x.dtype.name}" for name, x in arrays.items())
        raise ValueError(f"softmax_attention: q, k and v must share one of {', '.join(DTYPES)}, got {given}")
    batch, length, heads, dim = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(
            f"softmax_attention: k and v must both be [{batch}, S, K, {dim}] for q {list(q.shape)}, "
            f"got {list(k.shape)} and {list(v.shape)}"
        )
    if heads % k.shape[2]:
        raise ValueError(f"softmax_attention: {heads} query heads are no multiple of {k.shape[2]} key heads")
    if (k_start is None) != (k_end is None):
        raise ValueError("softmax_attention: k_start and k_end come together or not at all")
    if k_start is None and length != k.shape[1]:
        raise ValueError(
            f"softmax_attention: without k_start and k_end T and S must agree, got {length} and {k.shape[1]}"
        )
    for name, ends in (("k_start", k_start), ("k_end", k_end)):
        if ends is not None and (ends.shape != (batch, length) or not jnp.issubdtype(ends.dtype, jnp.integer)):
            given = f"{ends.dtype.name}{list(ends.shape)}"
            raise ValueError(f"softmax_attention: {name} must be integers [B, T] = {[batch, length]}, got {given}")
