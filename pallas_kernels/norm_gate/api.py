"""The joint RMSNorm over all heads times the sigmoid of a gate."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.arrays import alike, varying_like

NAMES = ("triton", "xla")
"""Every name that `implementation=` accepts."""


def implementations() -> tuple[str, ...]:
    """Names the implementations that can run on the present platform, best first."""
    return (*_candidates(), "xla")


def norm_gate(
    x: Float[Array, "B T N H"],
    gate_logits: Float[Array, "B T N H"],
    weight: Float[Array, "N H"],
    eps: float,
    *,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Computes cast(x / rms(x)) * weight * sigmoid(gate_logits), rms over all N * H channels of a token.

    The statistic is fp32 and the normalised value is cast to x's dtype before it meets the weight (model.md 4.7,
    INV-13). Differentiable in x, gate_logits and weight; the backward keeps the arguments and one number a token.

    Args:
        x: the mixed heads, bf16 or fp32.
        gate_logits: the gate before its sigmoid, in x's dtype.
        weight: the norm's weight for each channel.
        eps: added to the mean square; MiniMax-01 uses 1e-6.
        implementation: a name to force; by default the best one for platform, shape and dtype.

    Raises:
        ValueError: shapes disagree, a dtype is not floating, or the forced implementation is unknown or cannot run this
            call.
    """
    if x.ndim != 4:
        raise ValueError(f"norm_gate: x must be [B, T, N, H], got {list(x.shape)}")
    if gate_logits.shape != x.shape or weight.shape != x.shape[2:]:
        raise ValueError(
            f"norm_gate: gate_logits must be {list(x.shape)} and weight {list(x.shape[2:])} for x {list(x.shape)}, "
            f"got {list(gate_logits.shape)} and {list(weight.shape)}"
        )
    for name, array in (("x", x), ("gate_logits", gate_logits), ("weight", weight)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"norm_gate: {name} must be floating point, got {array.dtype}")
    return _norm_gate(eps, _choose(x, gate_logits, weight, implementation), *alike(x, gate_logits, weight))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm_gate(eps: float, name: str, x: jax.Array, gate_logits: jax.Array, weight: jax.Array) -> jax.Array:
    return _forward(eps, name, x, gate_logits, weight)[0]


def _forward(eps: float, name: str, x: jax.Array, gate_logits: jax.Array, weight: jax.Array) -> tuple[jax.Array, Any]:
    y, inverse = (varying_like(result, x) for result in _module(name).forward(x, gate_logits, weight, eps))
    return y, (x, gate_logits, weight, inverse)


def _backward(eps: float, name: str, residuals: Any, dy: jax.Array) -> tuple[jax.Array, ...]:
    x, gate_logits, weight, inverse = residuals
    gradients = _module(name).backward(x, gate_logits, weight, inverse, dy)
    return tuple(varying_like(gradient, x) for gradient in gradients)


_norm_gate.defvjp(_forward, _backward)


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(f"pallas_kernels.norm_gate.{name}")


def _candidates() -> tuple[str, ...]:
    capability = dispatch.compute_capability()
    return ("triton",) if dispatch.platform() == "gpu" and capability is not None and capability >= 8 else ()


def _choose(x: jax.Array, gate_logits: jax.Array, weight: jax.Array, forced: str | None) -> str:
    """Returns the name of the implementation that runs this call."""

    def obstacle(name: str) -> str | None:
        if name == "xla":
            return None
        if gate_logits.dtype != x.dtype:
            return f"gate_logits must have x's dtype {x.dtype.name}, not {gate_logits.dtype.name}"
        if forced is None and _partitioned():
            return "the compiler may split arrays over devices here, and would gather them for a kernel of one device"
        return _module(name).supports(weight.size, x.dtype, weight.dtype)

    title = f"norm_gate of {x.dtype.name}{list(x.shape)}"
    candidates = _candidates() if x.size else ()  # a kernel cannot be launched for nothing
    return dispatch.choose(title, candidates, obstacle, fallback="xla", forced=forced, known=NAMES)


def _partitioned() -> bool:
    """Says whether the compiler, not `jax.shard_map`, decides which device holds what of an array traced now."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return dispatch.platform() == jax.default_backend() and jax.device_count() > 1
    return any(mesh.shape[axis] > 1 for axis in (*mesh.auto_axes, *mesh.explicit_axes))
