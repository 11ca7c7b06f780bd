"""One token of lightning attention per request on TPU: the state pool is read and written once, in place."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels.lightning.implementation import Slopes, Token

Ref = Any


def pool_rows(slots: Int[Array, " B"], pool: int) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Returns per request the pool row its grid step holds in VMEM, and 1 where that row is to be advanced.

    A step must hold some row even when its request is ignored. It holds that of its live neighbour: the block then
    stays in VMEM over both steps, so that an ignored request can never write an old state over a new one.
    """
    live = (slots >= 0) & (slots < pool)
    order = jnp.arange(slots.size)
    before = jax.lax.cummax(jnp.where(live, order, -1))
    neighbour = jnp.where(before >= 0, before, jnp.argmax(live))
    return jnp.clip(slots[neighbour], 0, pool - 1).astype(jnp.int32), live.astype(jnp.int32)


def _kernel(scalars: dict[str, Ref], inputs: dict[str, Ref], outputs: dict[str, Ref]) -> None:
    """state = exp(-slope)*state + k v^T;  o = q state, for several heads of one request, in fp32 on the vector unit."""
    group, request = pl.program_id(0), pl.program_id(1)
    heads, width = inputs["q"].shape[2:]

    def advance() -> None:
        q, k, v = (inputs[name][0, 0].astype(jnp.float32) for name in ("q", "k", "v"))
        q_down, k_down = q.T, k.T
        for head in range(heads):
            decay = jnp.exp(jnp.full((1, width), -scalars["slopes"][group * heads + head], jnp.float32))
            state = inputs["state"][0, head] * decay + k_down[:, head : head + 1] * v[head : head + 1]
            outputs["state"][0, head] = state
            o = jnp.sum(q_down[:, head : head + 1] * state, axis=0, keepdims=True)
            outputs["o"][0, 0, pl.ds(head, 1)] = o.astype(outputs["o"].dtype)

    if scalars["rows"] is None:
        advance()
        return
    live = scalars["live"][request] == 1
    pl.when(live)(advance)

    @pl.when(jnp.logical_not(live))
    def ignore() -> None:
        outputs["o"][...] = jnp.zeros_like(outputs["o"])
        arrived = (request == 0) | (scalars["rows"][request] != scalars["rows"][jnp.maximum(request - 1, 0)])

        @pl.when(arrived)
        def preserve() -> None:
            outputs["state"][...] = inputs["state"][...]


def decode_step(
    q: Token,
    k: Token,
    v: Token,
    state: jax.Array,
    slopes: Slopes,
    slots: Int[Array, " B"] | None,
    heads_per_step: int,
    vmem_limit: int,
) -> tuple[Token, jax.Array]:
    """Returns the outputs [B, N, H] and the pool [rows, N, H, H] with the rows named by `slots` advanced.

    Live slots must differ from each other. A slot outside the pool is ignored: its output is 0.
    """
    batch, heads, width = q.shape
    groups = heads // heads_per_step
    rows, live = (None, None) if slots is None else pool_rows(slots, state.shape[0])
    scalars = {"slopes": slopes.astype(jnp.float32), "rows": rows, "live": live}
    inputs = {name: x.reshape(batch, groups, heads_per_step, width) for name, x in (("q", q), ("k", k), ("v", v))}
    token = pl.BlockSpec((1, 1, heads_per_step, width), lambda g, b, _: (b, g, 0, 0))
    tile = pl.BlockSpec(
        (1, heads_per_step, width, width), lambda g, b, s: (b if rows is None else s["rows"][b], g, 0, 0)
    )
    out = pl.pallas_call(
        _kernel,
        out_shape={"o": jax.ShapeDtypeStruct(inputs["q"].shape, q.dtype), "state": state},
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(groups, batch),
            in_specs=[{**dict.fromkeys(inputs, token), "state": tile}],
            out_specs={"o": token, "state": tile},
        ),
        # Operands are numbered leaf by leaf in the order of the dictionaries' keys; the state is the last but one.
        input_output_aliases={len(jax.tree.leaves(scalars)) + 2: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit
        ),
        name="lightning_decode",
    )(scalars, {**inputs, "state": state})
    return out["o"].reshape(q.shape), out["state"]
