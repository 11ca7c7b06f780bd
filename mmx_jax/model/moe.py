"""Feed-forward layers: a SwiGLU, or a mixture of SwiGLU experts with top-k routing (model.md 6, recipe §4.7)."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mmx_jax.config import ModelConfig
from mmx_jax.model.dot import DotPolicy, Weight
from pallas_kernels.grouped_matmul import grouped_matmul


class RouterStats(NamedTuple):
    """What one layer reports of its routing, over the real tokens of the micro-batch; all fp32."""

    fraction: Float[Array, " E"]
    """f: routed slots per token and expert; sums to experts_per_token."""
    probability: Float[Array, " E"]
    """m: mean router probability."""
    dropped: Float[Array, ""]
    """Share of routed slots over capacity."""


class Routing(NamedTuple):
    """Which experts each token goes to."""

    expert: Int[Array, "M k"]
    """Expert ids; E for padding."""
    weight: Float[Array, "M k"]
    """Positive, summing to 1 over the chosen experts (INV-22)."""
    probs: Float[Array, "M E"]


@jax.custom_vjp
def gather_rows(x: Float[Array, "P D"], index: Int[Array, " Q"], inverse: Int[Array, "P J"]) -> Float[Array, "Q D"]:
    """Rows `x[index]`, zero where the index is -1.

    `inverse[p]` lists the places of the result that row p went to (-1 for none), so that the backward pass gathers
    as well: scatter-adds are slow and their order is not fixed.
    """
    del inverse
    return jnp.where(index[:, None] >= 0, x[jnp.maximum(index, 0)], 0)


def _gather_rows_fwd(x: Array, index: Array, inverse: Array) -> tuple[Array, Array]:
    return gather_rows(x, index, inverse), inverse


def _gather_rows_bwd(inverse: Array, g: Array) -> tuple[Array, None, None]:
    picked = jnp.where(inverse[..., None] >= 0, g[jnp.maximum(inverse, 0)], 0)
    return picked.astype(jnp.float32).sum(axis=1).astype(g.dtype), None, None


gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)


def route(
    x: Float[Array, "M D"], router: Float[Array, "D E"], experts_per_token: int, real: Bool[Array, " M"]
) -> Routing:
    """Top-k experts of each token: fp32 softmax over all experts, the chosen probabilities renormalised to sum 1."""
    logits = jnp.einsum("MD,DE->ME", x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
    probs = jax.nn.softmax(logits, axis=-1)
    top, expert = jax.lax.top_k(probs, experts_per_token)
    expert = jnp.where(real[:, None], expert, router.shape[1])
    return Routing(expert, top / top.sum(axis=-1, keepdims=True), probs)


def _ranks(
    expert: Int[Array, "M k"], num_experts: int
) -> tuple[Int[Array, " Mk"], Int[Array, " E"], Int[Array, " Mk"]]:
    """Stable order of the routed slots by expert, slots per expert, and each slot's place in that order."""
    flat = expert.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    counts = jnp.bincount(flat, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    return order, counts, place


class Experts(nnx.Module):
    """A mixture of experts (or a stack of such layers)."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Weight]):
        self.dot = DotPolicy(config.compute_dtype)
        self.num_experts = config.num_experts
        self.experts_per_token = config.experts_per_token
        self.capacity_factor = config.capacity_factor
        self.router = nnx.Param(params["router"])
        self.gate = nnx.Param(params["gate"])
        self.up = nnx.Param(params["up"])
        self.down = nnx.Param(params["down"])

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"], *, train: bool
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Weighted sum of each token's experts, and routing statistics.

        Padding takes no capacity and gives zeros. With a capacity factor, `train` drops the slots over capacity
        (they contribute nothing; the other expert's weight stays); otherwise every slot is computed (INV-23).
        """
        B, T, D = x.shape
        rows, mask = x.reshape(B * T, D), real.reshape(B * T)
        routing = route(rows, self.router[...], self.experts_per_token, mask)
        tokens = jnp.maximum(mask.sum(), 1)
        if train and self.capacity_factor is not None:
            mixed, dropped = self._with_capacity(rows, routing, tokens)
        else:
            mixed, dropped = self._dropless(rows, routing), jnp.zeros(())
        chosen = jax.nn.one_hot(routing.expert, self.num_experts, dtype=jnp.float32).sum(axis=(0, 1))
        probability = jnp.where(mask[:, None], routing.probs, 0.0).sum(axis=0)
        stats = RouterStats(chosen / tokens, probability / tokens, dropped)
        return mixed.reshape(B, T, D), stats

    def _dropless(self, x: Float[Array, "M D"], routing: Routing) -> Float[Array, "M D"]:
        """Every routed slot is computed: rows sorted by expert, one grouped matmul per weight."""
        k = self.experts_per_token
        order, counts, place = _ranks(routing.expert, self.num_experts)
        place = place.reshape(-1, k)
        rows = gather_rows(self.dot.cast(x), order // k, place)
        gate = grouped_matmul(rows, self.dot.weight(self.gate[...]), counts)
        up = grouped_matmul(rows, self.dot.weight(self.up[...]), counts)
        out = grouped_matmul(jax.nn.silu(gate) * up, self.dot.weight(self.down[...]), counts)
        return self._combine(out, routing, place, order)

    def _with_capacity(
        self, x: Float[Array, "M D"], routing: Routing, tokens: Int[Array, ""]
    ) -> tuple[Float[Array, "M D"], Float[Array, ""]]:
        """Each expert takes its first `capacity` slots in token order; returns the sum and the dropped share."""
        assert self.capacity_factor is not None
        M, k, E = x.shape[0], self.experts_per_token, self.num_experts
        share = Fraction(str(self.capacity_factor)) * k / E
        bucket = min(math.ceil(share * M), M)
        capacity = -(-share.numerator * tokens // share.denominator)
        order, counts, place = _ranks(routing.expert, E)
        starts = jnp.cumsum(counts) - counts
        flat = routing.expert.reshape(-1)
        rank = place - starts[jnp.minimum(flat, E - 1)]
        kept = (flat < E) & (rank < jnp.minimum(capacity, bucket))
        slot = jnp.where(kept, flat * bucket + rank, -1).reshape(M, k)
        source = starts[:, None] + jnp.arange(bucket, dtype=jnp.int32)
        filled = jnp.arange(bucket, dtype=jnp.int32) < jnp.minimum(jnp.minimum(counts, capacity), bucket)[:, None]
        flat_of_slot = jnp.where(filled, order[jnp.minimum(source, order.size - 1)], -1).reshape(-1)
        token_of_slot = jnp.where(flat_of_slot >= 0, flat_of_slot // k, -1)
        rows = gather_rows(self.dot.cast(x), token_of_slot, slot).reshape(E, bucket, -1)
        gate = self.dot.einsum("ECD,EDF->ECF", rows, self.gate[...])
        up = self.dot.einsum("ECD,EDF->ECF", rows, self.up[...])
        out = self.dot.einsum("ECF,EFD->ECD", jax.nn.silu(gate) * up, self.down[...])
        mixed = self._combine(out.reshape(E * bucket, -1), routing, slot, flat_of_slot)
        routed = jnp.maximum(tokens * k, 1)
        return mixed, 1.0 - kept.sum() / routed

    def _combine(
        self, out: Float[Array, "P D"], routing: Routing, slot: Int[Array, "M k"], flat_of_slot: Int[Array, " P"]
    ) -> Float[Array, "M D"]:
        """Sums the expert outputs of each token with its router weights."""
        picked = gather_rows(out, slot.reshape(-1), flat_of_slot[:, None]).reshape(*slot.shape, -1)
        weight = jnp.where(routing.expert < self.num_experts, routing.weight, 0.0)
        return jnp.einsum("MkD,Mk->MD", picked, weight.astype(picked.dtype))


class SwiGLU(nnx.Module):
    """A dense feed-forward layer (or a stack of them)."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Weight]):
        self.dot = DotPolicy(config.compute_dtype)
        self.gate = nnx.Param(params["gate"])
        self.up = nnx.Param(params["up"])
        self.down = nnx.Param(params["down"])

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"], *, train: bool
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """down(silu(gate x) * (up x)) (INV-24), with empty routing statistics."""
        del real, train
        gate = self.dot.einsum("BTD,DF->BTF", x, self.gate[...])
        up = self.dot.einsum("BTD,DF->BTF", x, self.up[...])
        empty = RouterStats(jnp.zeros((0,)), jnp.zeros((0,)), jnp.zeros(()))
        return self.dot.einsum("BTF,FD->BTD", jax.nn.silu(gate) * up, self.down[...]), empty


def balance_loss(fraction: Float[Array, "L E"], probability: Float[Array, "L E"], form: str) -> Float[Array, ""]:
    """Load-balancing loss without its coefficient, in one of the two published forms (model.md 6, INV-25).

    "report": (1/E) sum_i f_i m_i in each layer, summed over layers; k / E^2 a layer at balance.
    "hub": E sum_i f_i P_i with f and P averaged over the tokens of all layers; k at balance.
    """
    num_experts = fraction.shape[-1]
    if num_experts == 0:
        return jnp.zeros(())
    if form == "report":
        return jnp.sum(fraction * probability) / num_experts
    return num_experts * jnp.sum(fraction.mean(axis=0) * probability.mean(axis=0))
