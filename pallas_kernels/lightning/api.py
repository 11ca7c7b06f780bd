"""Lightning attention's public functions: they check, normalise, choose an implementation and differentiate it.

Layout [B, T, N, H] throughout. The decay of a head is exp(-slope) for each token; slopes are constants of the
architecture and receive no gradient. Segment id 0 is padding. A real token whose id differs from that of the row's
previous real token starts a segment with an empty state.
"""

import functools
import importlib
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arrays import accumulator, alike, varying_like
from pallas_kernels.lightning import chunked, reference
from pallas_kernels.lightning.implementation import Operation
from pallas_kernels.lightning.segments import canonical_segment_ids

_PORTABLE: dict[str, Any] = {"chunked": chunked, "dense": reference.DENSE, "reference": reference.RECURRENCE}
_ACCELERATED = ("mosaic_gpu", "mosaic_tpu", "triton")
NAMES = (*_ACCELERATED, *_PORTABLE)
"""Every name that `implementation=` accepts."""
_DTYPES = (jnp.bfloat16, jnp.float32, jnp.float64)


def implementations(operation: Operation = "forward") -> tuple[str, ...]:
    """Names the implementations that can run an operation on the present platform, best first."""
    return (*_candidates(operation), *_PORTABLE)


@overload
def lightning_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array,
    *,
    segment_ids: jax.Array | None = ...,
    initial_state: jax.Array | None = ...,
    return_state: Literal[False] = ...,
    implementation: str | None = ...,
) -> jax.Array: ...


@overload
def lightning_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array,
    *,
    segment_ids: jax.Array | None = ...,
    initial_state: jax.Array | None = ...,
    return_state: Literal[True],
    implementation: str | None = ...,
) -> tuple[jax.Array, jax.Array]: ...


def lightning_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    slopes: Float[Array, " N"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B N H H"] | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B N H H"]]:
    """Computes o_t = q_t^T S_t with S_t = exp(-slope) S_{t-1} + k_t v_t^T (model.md 4.4; INV-06, 07, 10, 16, 36).

    Differentiable in q, k, v and the initial state, also through the returned state.

    Args:
        q, k, v: bf16, fp32 or fp64; nothing is scaled or normalised here.
        slopes: fp32, positive.
        segment_ids: integers, 0 is padding: it adds nothing, decays nothing, and its output is 0, as long as what q, k
            and v hold there is finite. None: all one segment.
        initial_state: fp32 (key dim, value dim), enters the row's first segment. None: zeros.
        return_state: also return the fp32 state after each row's last real token, of its last segment alone.
        implementation: a name to force; by default the best one for platform, shape and dtype.

    Raises:
        ValueError: shapes or dtypes disagree, or the forced implementation is unknown or cannot run this call.
    """
    slopes = _checked("lightning_attention", "BTNH", slopes, q=q, k=k, v=v)
    _check_rows("lightning_attention", q, segment_ids, initial_state=initial_state)
    name = _choose("forward", q, packed=segment_ids is not None, forced=implementation)
    o, state = _attention(name, return_state, *alike(q, k, v, slopes, segment_ids, initial_state))
    return (o, state) if return_state else o


def lightning_backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    slopes: Float[Array, " N"],
    do: Float[Array, "B T N H"],
    dstate: Float[Array, "B N H H"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B N H H"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"], Float[Array, "B T N H"], Float[Array, "B N H H"]]:
    """Returns dq, dk, dv (q's dtype) and the fp32 gradient of the initial state (model.md 4.6, INV-16).

    Args:
        q, k, v, slopes, segment_ids, initial_state, implementation: as given to `lightning_attention`.
        do: gradient arriving at its output, in q's dtype.
        dstate: fp32 gradient arriving at its returned state. None: zeros.

    Raises:
        ValueError: as `lightning_attention`.
    """
    slopes = _checked("lightning_backward", "BTNH", slopes, q=q, k=k, v=v, do=do)
    _check_rows("lightning_backward", q, segment_ids, initial_state=initial_state, dstate=dstate)
    chosen = _module(_choose("backward", q, packed=segment_ids is not None, forced=implementation))
    return chosen.backward(q, k, v, slopes, _described(chosen, segment_ids), initial_state, do, dstate)


def chunk_state(
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    slopes: Float[Array, " N"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "B N H H"], Float[Array, "B N"]]:
    """Returns the state that these tokens alone leave behind, and the factor by which an entering state survives them.

    The hooks of LASP+ (model.md 4.9, INV-37, INV-38): a state S entering the tokens leaves as
    `state + transmission * S`, transmission being exp(-slope * real tokens), or 0 where the row holds more than one
    segment. Whether the first segment continues the tokens before it only the caller knows: see `border_ids` and
    `continuations`.

    With `reverse`, on (q, do): the gradient that these tokens' outputs send to the state entering them; a gradient G of
    the leaving state becomes `state + transmission * G`. Not differentiable in the accelerated implementations: the
    caller's backward is `lightning_backward`.

    Args:
        k, v: keys and values; with `reverse` queries and output gradients.
        slopes, segment_ids, implementation: as in `lightning_attention`.
        reverse: see above.

    Raises:
        ValueError: as `lightning_attention`.
    """
    slopes = _checked("chunk_state", "BTNH", slopes, k=k, v=v)
    _check_rows("chunk_state", k, segment_ids)
    chosen = _module(_choose("chunk_state", k, packed=segment_ids is not None, forced=implementation))
    state = chosen.chunk_state(k, v, slopes, _described(chosen, segment_ids), reverse)
    rates = slopes.astype(state.dtype)
    if segment_ids is None:
        return state, jnp.broadcast_to(jnp.exp(-rates * k.shape[1]), state.shape[:2])
    real = segment_ids > 0
    one_id = jnp.max(segment_ids, axis=1, keepdims=True, initial=0)
    one_segment = jnp.all(~real | (segment_ids == one_id), axis=1, keepdims=True)
    return state, jnp.where(one_segment, jnp.exp(-rates * jnp.sum(real, axis=1, keepdims=True)), 0)


def decode_step(
    q: Float[Array, "B N H"],
    k: Float[Array, "B N H"],
    v: Float[Array, "B N H"],
    state: Float[Array, "P N H H"],
    slopes: Float[Array, " N"],
    *,
    slots: Int[Array, " B"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "P N H H"]]:
    """Advances one token per row and returns its output and the new states (model.md 4.4, INV-31, INV-35).

    Donate `state` to the enclosing jit and it is updated in place. Not differentiable.

    Args:
        q, k, v: one token of each row.
        state: fp32, one row for each token, or a pool of P rows when `slots` is given.
        slopes: fp32, positive.
        slots: integers, the pool row of each token, all different; the token of a slot outside the pool (such as -1) is
            ignored, its output is 0.
        implementation: a name to force.

    Raises:
        ValueError: as `lightning_attention`; also without slots when `state` has not one row for each token.
    """
    slopes = _checked("decode_step", "BNH", slopes, q=q, k=k, v=v)
    batch = q.shape[0]
    _check_state("decode_step", "state", state, q, state.shape[0] if slots is not None and state.ndim else batch)
    if slots is not None:
        _check_integers("decode_step", "slots", slots, "[B]", (batch,))
    chosen = _module(_choose("decode_step", q[:, None], packed=slots is not None, forced=implementation))
    return chosen.decode_step(q, k, v, state, slopes, slots)


def _described(chosen: Any, segment_ids: jax.Array | None) -> jax.Array | None:
    """Returns the segment ids in the form that an implementation takes."""
    if segment_ids is None:
        return None
    describe = getattr(chosen, "describe", canonical_segment_ids)
    return describe(segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    name: str,
    return_state: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array,
    ids: jax.Array | None,
    initial_state: jax.Array | None,
) -> tuple[jax.Array, Any]:
    chosen = _module(name)
    o, state = chosen.forward(q, k, v, slopes, _described(chosen, ids), initial_state)
    return o, state if return_state else None


def _attention_forward(name: str, return_state: bool, *arguments: Any) -> tuple[Any, Any]:
    q, k, v, slopes, ids, initial_state = arguments
    chosen = _module(name)
    arguments = (q, k, v, slopes, _described(chosen, ids), initial_state)
    if hasattr(chosen, "forward_saving"):
        o, state, saved = chosen.forward_saving(*arguments)
    else:
        (o, state), saved = chosen.forward(*arguments), None
    return (o, state if return_state else None), (arguments, {} if saved is None else {"saved": saved})


def _attention_backward(name: str, return_state: bool, residuals: Any, gradients: Any) -> Any:
    (q, k, v, slopes, segments, initial_state), saved = residuals
    do, dstate = gradients
    results = _module(name).backward(q, k, v, slopes, segments, initial_state, do, dstate, **saved)
    dq, dk, dv, dinitial = (varying_like(x, q) for x in results)
    return dq, dk, dv, None, None, None if initial_state is None else dinitial.astype(initial_state.dtype)


_attention.defvjp(_attention_forward, _attention_backward)


def _candidates(operation: Operation) -> tuple[str, ...]:
    platform, capability = dispatch.platform(), dispatch.compute_capability()
    if platform == "tpu":
        return ("mosaic_tpu",)
    if platform == "gpu" and capability is not None and capability >= 8:
        scans = operation != "decode_step" and int(capability) == 9
        return ("mosaic_gpu", "triton") if scans else ("triton",)
    return ()


@functools.cache
def _module(name: str) -> Any:
    return _PORTABLE.get(name) or importlib.import_module(f"pallas_kernels.lightning.{name}")


def _choose(operation: Operation, q: jax.Array, *, packed: bool, forced: str | None) -> str:
    """Returns the name of the `Implementation` that runs this call."""

    def obstacle(name: str) -> str | None:
        try:
            module = _module(name)
        except ImportError as error:
            return f"it cannot be imported: {error}"
        return module.supports(operation, q.shape, q.dtype, packed=packed)

    title = f"lightning {operation} of {q.dtype.name}{list(q.shape)}{' packed' if packed else ''}"
    candidates = _candidates(operation) if q.size else ()  # a kernel cannot be launched for nothing
    return dispatch.choose(title, candidates, obstacle, fallback="chunked", forced=forced, known=NAMES)


def _checked(function: str, axes: str, slopes: jax.Array, **tokens: jax.Array) -> jax.Array:
    """Returns the slopes in fp32 (fp64 for fp64 tokens): kernels multiply them by ages, and round nothing in between.

    Raises unless the tokens share one shape with these axes and one dtype and there is one slope for each head.
    """
    (name, first), *others = tokens.items()
    if first.ndim != len(axes):
        raise ValueError(f"{function}: {name} must be [{', '.join(axes)}], got {list(first.shape)}")
    if first.dtype not in _DTYPES:
        raise ValueError(f"{function}: {name} must be bfloat16, float32 or float64, got {first.dtype}")
    for other, x in others:
        if x.shape != first.shape or x.dtype != first.dtype:
            raise ValueError(
                f"{function}: {other} must be like {name}, {first.dtype.name}{list(first.shape)}, "
                f"got {x.dtype.name}{list(x.shape)}"
            )
    if slopes.shape != first.shape[-2:-1]:
        raise ValueError(f"{function}: slopes must be [N] = [{first.shape[-2]}], got {list(slopes.shape)}")
    return slopes.astype(accumulator(first))


def _check_rows(function: str, q: jax.Array, segment_ids: jax.Array | None, **states: jax.Array | None) -> None:
    if segment_ids is not None:
        _check_integers(function, "segment_ids", segment_ids, "[B, T]", q.shape[:2])
    for name, state in states.items():
        if state is not None:
            _check_state(function, name, state, q, q.shape[0])


def _check_state(function: str, name: str, state: jax.Array, q: jax.Array, rows: int) -> None:
    shape = (rows, q.shape[-2], q.shape[-1], q.shape[-1])
    if state.shape != shape or state.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"{function}: {name} must be [B, N, H, H] = float32{list(shape)} for q {list(q.shape)}, "
            f"got {state.dtype.name}{list(state.shape)}"
        )


def _check_integers(function: str, name: str, x: jax.Array, axes: str, shape: tuple[int, ...]) -> None:
    if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"{function}: {name} must be integers {axes} = {list(shape)}, got {x.dtype.name}{list(x.shape)}"
        )
