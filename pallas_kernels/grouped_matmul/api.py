"""The experts' matmul: rows sorted by expert, each multiplied with the weights of its own expert.

`jax.lax.ragged_dot` is never used on a GPU, where XLA runs it densely.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arrays import accumulator, alike
from pallas_kernels.grouped_matmul import blocked, mosaic_gpu_cta, mosaic_gpu_rows, mosaic_gpu_weights, triton

NAMES = ("blocked", "dense", "mosaic_gpu", "ragged_dot", "triton")
"""Every name that `implementation=` accepts."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute grouped products.

    matmul(x [M, D], w [E, D, F], group_sizes, transposed): [M, F], or with `transposed` [M, D] from x [M, F].
    weight_gradient(x [M, D], dy [M, F], group_sizes): [E, D, F].
    obstacle(x, w): why a call cannot run, or None.

    Rows beyond the groups are 0 in the result of `matmul`, and what they hold reaches nothing.
    """

    matmul: Callable[[jax.Array, jax.Array, jax.Array, bool], jax.Array]
    weight_gradient: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    obstacle: Callable[[jax.Array, jax.Array], str | None] = lambda x, w: None


def implementations() -> tuple[str, ...]:
    """Names the implementations that can run on the present platform, best first."""
    return (*_candidates(), "blocked", "dense")


def grouped_matmul(
    x: Float[Array, "M D"],
    w: Float[Array, "E D F"],
    group_sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M F"]:
    """Multiplies each row with the weights of its expert; differentiable in x and w (INV-23, INV-24).

    Args:
        x: rows sorted by expert, bf16 or fp32.
        w: one matrix for each expert, in x's dtype.
        group_sizes: int32, the number of rows of each expert, in order; their sum is at most M. Rows beyond the sum
            belong to no expert: they give 0, whatever they hold, and their gradient is 0.
        implementation: a name to force; by default the best one for platform, shape and dtype.

    Raises:
        ValueError: shapes or dtypes disagree, or the forced implementation is unknown or cannot run this call.
    """
    if x.shape[1:] != w.shape[1:2] or group_sizes.shape != w.shape[:1] or x.dtype != w.dtype:
        raise ValueError(
            "grouped_matmul: x [M, D], w [E, D, F] of one dtype and group_sizes [E] must fit, got "
            f"{x.dtype.name}{list(x.shape)}, {w.dtype.name}{list(w.shape)} and {list(group_sizes.shape)}"
        )

    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"grouped_matmul: group_sizes must be integers, got {group_sizes.dtype}")

    def obstacle(name: str) -> str | None:
        return _implementation(name).obstacle(x, w)

    title = f"grouped_matmul of {x.dtype.name}{list(x.shape)} by {list(w.shape)}"
    name = dispatch.choose(title, _candidates(), obstacle, fallback="blocked", forced=implementation, known=NAMES)
    if not x.size or not w.size:  # a kernel cannot be launched for nothing
        return jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
    return _product(name, *alike(x, w, group_sizes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(name: str, x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return _implementation(name).matmul(x, w, group_sizes, False).astype(x.dtype)


def _product_forward(name: str, *arguments: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _product(name, *arguments), arguments


def _product_backward(name: str, arguments: tuple[jax.Array, ...], dy: jax.Array) -> tuple[Any, ...]:
    x, w, group_sizes = arguments
    chosen = _implementation(name)
    dx = chosen.matmul(dy.astype(x.dtype), w, group_sizes, True).astype(x.dtype)
    return dx, chosen.weight_gradient(x, dy, group_sizes).astype(w.dtype), None


_product.defvjp(_product_forward, _product_backward)


def _candidates() -> tuple[str, ...]:
    if dispatch.platform() == "tpu":
        return ("ragged_dot",)
    capability = dispatch.compute_capability() if dispatch.platform() == "gpu" else None
    if capability is None or capability < 8:
        return ()
    return ("mosaic_gpu", "triton") if int(capability) == 9 else ("triton",)


@functools.cache
def _implementation(name: str) -> Implementation:
    if name == "blocked":
        return Implementation(blocked.matmul, blocked.weight_gradient)
    if name == "dense":
        return Implementation(_dense_matmul, _dense_weight_gradient)
    if name == "triton":
        return Implementation(triton.matmul, triton.weight_gradient, triton.obstacle)
    if name == "mosaic_gpu":
        return Implementation(mosaic_gpu_rows.matmul, mosaic_gpu_weights.weight_gradient, _mosaic_gpu_obstacle)
    return Implementation(_ragged_matmul, _ragged_weight_gradient, _ragged_dot_obstacle)


def _mosaic_gpu_obstacle(x: jax.Array, w: jax.Array) -> str | None:
    capability = dispatch.compute_capability()
    if capability is None or int(capability) != 9:
        return "it needs a Hopper GPU (sm_90)"
    return mosaic_gpu_cta.obstacle(x, w)


def _ragged_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, transposed: bool) -> jax.Array:
    y = _ragged_dot(x, w, group_sizes, 1, 2 if transposed else 1, (0,))
    belongs = jnp.arange(y.shape[0]) < jnp.sum(group_sizes)
    return jnp.where(belongs[:, None], y, 0)


def _ragged_weight_gradient(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return _ragged_dot(x, dy, group_sizes, 0, 0, ())


def _ragged_dot(
    a: jax.Array, b: jax.Array, group_sizes: jax.Array, left: int, right: int, group: tuple[int, ...]
) -> jax.Array:
    """XLA's own, summing over a's axis `left` and b's axis `right`; a's rows are grouped, and of b the axes `group`."""
    numbers = lax.RaggedDotDimensionNumbers((((left,), (right,)), ((), ())), (0,), group)
    return lax.ragged_dot_general(
        a, b, group_sizes, numbers, precision=_precision(a), preferred_element_type=accumulator(a)
    )


def _precision(x: jax.Array) -> lax.Precision | None:
    return None if x.dtype.itemsize < 4 else lax.Precision.HIGHEST


def _ragged_dot_obstacle(x: jax.Array, w: jax.Array) -> str | None:
    return "XLA runs it densely on a GPU" if dispatch.platform() == "gpu" else None


def _owners(rows: int, group_sizes: jax.Array) -> jax.Array:
    """Says which expert owns which row [M, E]."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(rows)[:, None]
    return (row >= ends - group_sizes) & (row < ends)


def _dense_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, transposed: bool) -> jax.Array:
    spec = "mef,edf->md" if transposed else "med,edf->mf"
    each = jnp.where(_owners(x.shape[0], group_sizes)[..., None], x[:, None], 0)
    return jnp.einsum(spec, each, w, precision="highest", preferred_element_type=accumulator(x))


def _dense_weight_gradient(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
    each = jnp.where(_owners(x.shape[0], group_sizes)[..., None], x[:, None], 0)
    return jnp.einsum("med,mf->edf", each, dy, precision="highest", preferred_element_type=accumulator(x))
