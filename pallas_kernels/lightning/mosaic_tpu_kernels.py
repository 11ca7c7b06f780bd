"""Bodies of the TPU kernels: one grid step is one chunk of several heads, the state stays in VMEM between chunks.

Heads are read from the natural [B, T, N*H] layout as columns of one block. Every dot takes operands of the input dtype
and accumulates in fp32; the state is fp32 and is rounded only as a dot's operand. Per chunk and head, with rows i and
columns j counted inside the chunk (model.md 4.5 and 4.6):

    weights[i, j] = exp(-slope*(i-j)) for i >= j, else 0        enter[i] = exp(-slope*(i+1))
    keep          = exp(-slope*C)                               leave[j] = exp(-slope*(C-1-j))

depend on the head alone and are built once, at the first chunk; chunks that hold a boundary or padding build their own.
No exponent is ever positive.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.lightning.mosaic_tpu_segments import FRESH, MIXED

NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))
Ref = Any
Tile = Callable[[str], jax.Array]


class Factors(NamedTuple):
    """Decay inside one chunk of one head: `weights` [C, C], `enter` and `leave` [C, H], `keep` [1, H], all fp32."""

    weights: Any  # None where only the state is wanted
    enter: jax.Array
    leave: jax.Array
    keep: jax.Array


def dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """Multiplies two tiles with fp32 accumulation; fp32 operands keep their precision, bf16 ones take one pass."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis).astype(jnp.float32)


def build_tables(slopes: Ref, first_head: jax.Array, tables: dict[str, Ref], reverse: bool) -> None:
    """Fills the decay tables of all heads of the step; `reverse` lays the weights out as [key, query]."""
    heads, chunk, width = tables["enter"].shape
    row = iota((chunk, width), 0)
    for head in range(heads):
        slope = slopes[first_head + head]
        tables["enter"][head] = jnp.exp(-slope * (row + 1))
        tables["leave"][head] = jnp.exp(-slope * (chunk - 1 - row))
        if tables["weights"] is not None:
            age = iota((chunk, chunk), 0) - iota((chunk, chunk), 1)
            age = -age if reverse else age
            tables["weights"][head] = jnp.where(age >= 0, jnp.exp(-slope * jnp.maximum(age, 0.0)), 0.0)


def table_factors(tables: dict[str, Ref], head: int) -> Factors:
    chunk = tables["enter"].shape[1]
    weights = None if tables["weights"] is None else tables["weights"][head]
    return Factors(weights, tables["enter"][head], tables["leave"][head], tables["enter"][head, pl.ds(chunk - 1, 1)])


class Runs(NamedTuple):
    """Segment runs and ages of a chunk's tokens, down the rows [C, C] and along the columns [1, C]."""

    run_row: jax.Array
    age_row: jax.Array
    run: jax.Array
    age: jax.Array

    @classmethod
    def load(cls, ref: Ref) -> "Runs":
        chunk = ref.shape[2]
        run, age = ref[0, pl.ds(0, 1)], ref[0, pl.ds(1, 1)]
        return cls(jnp.broadcast_to(run, (chunk, chunk)).T, jnp.broadcast_to(age, (chunk, chunk)).T, run, age)

    def clean(self, tile: jax.Array) -> jax.Array:
        """Replaces rows that hold padding, or nothing at all, by zeros."""
        return jnp.where(self.run_row[:, : tile.shape[1]] >= 0, tile, jnp.zeros_like(tile))

    def factors(self, slope: jax.Array, width: int, reverse: bool, weighted: bool) -> Factors:
        def decay(visible: jax.Array, age: jax.Array) -> jax.Array:
            return jnp.where(visible, jnp.exp(-slope * jnp.where(visible, age, 0.0)), 0.0)

        run, age = self.run_row[:, :width], self.age_row[:, :width]
        newest, total = jnp.maximum(self.run.max(keepdims=True), 0.0), self.age.max(keepdims=True)
        weights = None
        if weighted:
            shape = self.run_row.shape
            sign = -1.0 if reverse else 1.0
            causal = sign * (iota(shape, 0) - iota(shape, 1)) >= 0
            same = (self.run_row == self.run) & (self.run_row >= 0)
            weights = decay(causal & same, sign * (self.age_row - self.age))
        keep = jnp.broadcast_to(decay(newest == 0, total), (1, width))
        return Factors(weights, decay(run == 0, age), decay(run == newest, total - age), keep)


def for_each_head(
    scalars: dict[str, Ref],
    inputs: dict[str, Ref],
    tables: dict[str, Ref],
    reverse: bool,
    forget: Callable[[], None],
    step: Callable[[Any, Any, Factors, Tile], None],
) -> None:
    """Runs `step(head, columns, factors, tile)` for every head of the block, the fast way where the chunk allows it.

    `columns` is where the head lies in a block, `tile(name)` its [C, H] tile of an input. `forget` zeroes the state
    where a segment begins with the chunk: before the step, or after it when time runs backwards.
    """
    heads, _, width = tables["enter"].shape

    def fast() -> None:
        for head in range(heads):
            columns = pl.ds(head * width, width)
            step(head, columns, table_factors(tables, head), functools.partial(_tile, inputs, columns))

    if inputs["runs"] is None:
        fast()
        return
    row, group, position, count = pl.program_id(0), pl.program_id(1), pl.program_id(2), pl.num_programs(2)
    mode = scalars["modes"][row * count + (count - 1 - position if reverse else position)]

    @pl.when(mode != MIXED)
    def uniform() -> None:
        if not reverse:
            pl.when(mode == FRESH)(forget)
        fast()
        if reverse:
            pl.when(mode == FRESH)(forget)

    @pl.when(mode == MIXED)
    def mixed() -> None:
        runs = Runs.load(inputs["runs"])

        @pl.loop(0, heads)
        def each(head: jax.Array) -> None:
            columns = pl.ds(pl.multiple_of(head * width, width), width)
            slope = scalars["slopes"][group * heads + head]
            factors = runs.factors(slope, width, reverse, tables["weights"] is not None)
            step(head, columns, factors, lambda name: runs.clean(_tile(inputs, columns, name)))


def _tile(inputs: dict[str, Ref], columns: Any, name: str) -> jax.Array:
    return inputs[name][0, :, columns]


def begin(scalars: dict[str, Ref], state_in: Ref | None, scratch: dict[str, Any], reverse: bool) -> None:
    """At the first chunk, builds the decay tables and loads the incoming state, or zeros."""

    @pl.when(pl.program_id(2) == 0)
    def first() -> None:
        state = scratch["state"]
        build_tables(scalars["slopes"], pl.program_id(1) * state.shape[0], scratch["tables"], reverse)
        state[...] = jnp.zeros_like(state) if state_in is None else state_in[0]


def end(state: Ref, state_out: Ref | None) -> None:
    """At the last chunk, hands the state on, where somebody wants it."""
    if state_out is not None:

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def last() -> None:
            state_out[0] = state[...]


def _advance(state: Ref, head: Any, keep: jax.Array, decayed: jax.Array, x: jax.Array, y: jax.Array) -> None:
    """state = keep*state + (decayed * x)^T y."""
    scaled = (x.astype(jnp.float32) * decayed).astype(x.dtype)
    state[head] = state[head] * keep + dot(scaled, y, TN)


def forward_kernel(scalars: dict[str, Ref], inputs: dict[str, Ref], outputs: dict[str, Ref], scratch: dict) -> None:
    """o = (q k^T * weights) v + enter * (q state);  state = keep*state + (leave * k)^T v."""
    state = scratch["state"]
    begin(scalars, inputs["state"], scratch, reverse=False)

    def forget() -> None:
        state[...] = jnp.zeros_like(state)

    def step(head: Any, columns: Any, factors: Factors, tile: Tile) -> None:
        q, k, v = tile("q"), tile("k"), tile("v")
        scores = (dot(q, k, NT) * factors.weights).astype(q.dtype)
        o = dot(q, state[head].astype(q.dtype), NN) * factors.enter + dot(scores, v, NN)
        outputs["o"][0, :, columns] = o.astype(q.dtype)
        _advance(state, head, factors.keep, factors.leave, k, v)

    for_each_head(scalars, inputs, scratch["tables"], False, forget, step)
    end(state, outputs["state"])


def reverse_kernel(scalars: dict[str, Ref], inputs: dict[str, Ref], outputs: dict[str, Ref], scratch: dict) -> None:
    """dk and dv in one walk from the last chunk to the first; `state` is the gradient of the state after the chunk.

    dk = (v do^T * weights^T) q + leave * (v state^T);  dv = (k q^T * weights^T) do + leave * (k state);
    state = keep*state + (enter * q)^T do.
    """
    state = scratch["state"]
    begin(scalars, inputs["state"], scratch, reverse=True)

    def forget() -> None:
        state[...] = jnp.zeros_like(state)

    def step(head: Any, columns: Any, factors: Factors, tile: Tile) -> None:
        q, k, v, do = tile("q"), tile("k"), tile("v"), tile("do")
        rounded = state[head].astype(q.dtype)
        scores = (dot(v, do, NT) * factors.weights).astype(q.dtype)
        dk = dot(v, rounded, NT) * factors.leave + dot(scores, q, NN)
        outputs["dk"][0, :, columns] = dk.astype(q.dtype)
        scores = (dot(k, q, NT) * factors.weights).astype(q.dtype)
        dv = dot(k, rounded, NN) * factors.leave + dot(scores, do, NN)
        outputs["dv"][0, :, columns] = dv.astype(q.dtype)
        _advance(state, head, factors.keep, factors.enter, q, do)

    for_each_head(scalars, inputs, scratch["tables"], True, forget, step)
    end(state, outputs["state"])


def state_kernel(
    scalars: dict[str, Ref], inputs: dict[str, Ref], outputs: dict[str, Ref], scratch: dict, *, reverse: bool
) -> None:
    """The state alone: of (k, v) walking forward, or of (q, do), given under the same names, walking backwards."""
    state = scratch["state"]
    begin(scalars, None, scratch, reverse)

    def forget() -> None:
        state[...] = jnp.zeros_like(state)

    def step(head: Any, columns: Any, factors: Factors, tile: Tile) -> None:
        _advance(state, head, factors.keep, factors.enter if reverse else factors.leave, tile("k"), tile("v"))

    for_each_head(scalars, inputs, scratch["tables"], reverse, forget, step)
    end(state, outputs["state"])
