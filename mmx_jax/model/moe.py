"""Feed-forward layers: a SwiGLU, or a mixture of SwiGLU experts with top-k routing (model.md 6, recipe §4.7)."""

from collections.abc import Mapping
from dataclasses import asdict
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mmx_jax.config import LOSSLESS, ExpertTransport, ModelConfig
from mmx_jax.model.dot import DotPolicy, Weight
from pallas_kernels.grouped_matmul import grouped_matmul
from parallel.experts import Mixed, expert_capacity, mix_experts
from parallel.rows import Blocks, Queues, combine_slots, fill_blocks, gather_slots, keep_for_backward, queues


class RouterStats(NamedTuple):
    """What one layer reports of its routing, over the real tokens of the micro-batch; all fp32."""

    fraction: Float[Array, " E"]
    """f: routed slots per token and expert; sums to experts_per_token."""
    probability: Float[Array, " E"]
    """m: mean router probability."""
    dropped: Float[Array, ""]
    """Share of routed slots over capacity."""
    lost: Float[Array, ""]
    """Share of routed slots that found no place on the way to their expert; 0 on one device."""


class Routing(NamedTuple):
    """Which experts each token goes to."""

    expert: Int[Array, "... k"]
    """Expert ids; E for padding."""
    weight: Float[Array, "... k"]
    """Positive, summing to 1 over the chosen experts (INV-22)."""
    probs: Float[Array, "... E"]


def route(
    x: Float[Array, "... D"], router: Float[Array, "D E"], experts_per_token: int, real: Bool[Array, "..."]
) -> Routing:
    """Top-k experts of each token: fp32 softmax over all experts, the chosen probabilities renormalised to sum 1."""
    logits = jnp.einsum("...D,DE->...E", x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
    probs = jax.nn.softmax(logits, axis=-1)
    top, expert = jax.lax.top_k(probs, experts_per_token)
    expert = jnp.where(real[..., None], expert, router.shape[1])
    return Routing(expert, top / top.sum(axis=-1, keepdims=True), probs)


class Experts(nnx.Module):
    """A mixture of experts (or a stack of such layers)."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Weight], transport: ExpertTransport = LOSSLESS):
        self.dot = DotPolicy(config.compute_dtype)
        self.num_experts = config.num_experts
        self.experts_per_token = config.experts_per_token
        self.capacity_factor = config.capacity_factor
        self.capacity_scope = config.capacity_scope
        self.transport = transport
        self.router = nnx.Param(params["router"])
        self.gate = nnx.Param(params["gate"])
        self.up = nnx.Param(params["up"])
        self.down = nnx.Param(params["down"])

    def __call__(
        self,
        x: Float[Array, "B T D"],
        real: Bool[Array, "B T"],
        tokens: Int[Array, ""],
        *,
        train: bool,
        order: str = "contiguous",
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Weighted sum of each token's experts, and routing statistics.

        `tokens` is how many are real: padding takes no capacity and gives zeros. With a capacity factor, `train` drops
        the slots over capacity (they contribute nothing; the other expert's weight stays); otherwise every slot is
        computed (INV-23). Capacity goes by the natural order of tokens; `order` is how they lie on the sequence axis
        (parallel/stripes.py).
        """
        routing = route(x, self.router[...], self.experts_per_token, real)
        share = None
        if train and self.capacity_factor is not None:
            share = Fraction(str(self.capacity_factor)) * self.experts_per_token / self.num_experts
        chosen = jax.nn.one_hot(routing.expert, self.num_experts, dtype=jnp.float32).sum(axis=(0, 1, 2))
        probability = jnp.where(real[..., None], routing.probs, 0.0).sum(axis=(0, 1))
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            mixed = self._on_one_device(self.dot.cast(x), routing, share)
        else:
            # Added up before the rows travel: later, these few numbers would wait for the links behind them.
            x, chosen, probability = jax.lax.optimization_barrier((x, chosen, probability))
            mixed = self._on_mesh(self.dot.cast(x), routing, tokens, share, order)
        tokens = jnp.maximum(tokens, 1)
        return mixed.out, RouterStats(chosen / tokens, probability / tokens, mixed.dropped, mixed.lost)

    def _weights(self) -> tuple[Array, Array, Array]:
        return self.dot.weight(self.gate[...]), self.dot.weight(self.up[...]), self.dot.weight(self.down[...])

    def _on_mesh(
        self, x: Float[Array, "B T D"], routing: Routing, real: Int[Array, ""], share: Fraction | None, order: str
    ) -> Mixed:
        """Experts where their weights are, tokens sent to them (parallel/experts.py)."""
        return mix_experts(
            x,
            routing.expert,
            routing.weight,
            self._weights(),
            real,
            share=share,
            scope=self.capacity_scope,
            order=order,
            **asdict(self.transport),
        )

    def _on_one_device(self, x: Float[Array, "B T D"], routing: Routing, share: Fraction | None) -> Mixed:
        B, T, D = x.shape
        k = self.experts_per_token
        expert, weight = routing.expert.reshape(B * T, k), routing.weight.reshape(B * T, k)
        waiting = queues(expert, self.num_experts)
        rows, zero = x.reshape(B * T, D), jnp.zeros(())
        if share is None:
            return Mixed(self._dropless(rows, waiting, expert, weight).reshape(B, T, D), zero, zero)
        mixed, dropped = self._with_capacity(rows, waiting, expert, weight, share)
        return Mixed(mixed.reshape(B, T, D), dropped, zero)

    def _dropless(
        self, x: Float[Array, "M D"], waiting: Queues, expert: Int[Array, "M k"], weight: Float[Array, "M k"]
    ) -> Float[Array, "M D"]:
        """Every routed slot is computed: rows sorted by expert, one grouped matmul per weight."""
        blocks = Blocks(waiting.order, waiting.place.reshape(expert.shape))
        rows = keep_for_backward(gather_slots(x, blocks))
        *inner, down = self._weights()
        gate, up = (keep_for_backward(grouped_matmul(rows, w, waiting.counts)) for w in inner)
        out = grouped_matmul(jax.nn.silu(gate) * up, down, waiting.counts)
        return combine_slots(out, blocks, jnp.where(expert < self.num_experts, weight, 0.0))

    def _with_capacity(
        self, x: Float[Array, "M D"], waiting: Queues, expert: Int[Array, "M k"], weight: Float[Array, "M k"],
        share: Fraction,
    ) -> tuple[Float[Array, "M D"], Float[Array, ""]]:  # fmt: skip
        """Each expert takes its first `capacity` slots in token order; returns the sum and the dropped share."""
        M, E = x.shape[0], self.num_experts
        routed = waiting.counts.sum()
        bucket = min(int(expert_capacity(share, M)), M)
        capacity = expert_capacity(share, routed // self.experts_per_token)
        kept = jnp.minimum(waiting.counts, jnp.minimum(capacity, bucket))
        blocks = fill_blocks(waiting, waiting.starts, kept, expert, bucket)
        rows = keep_for_backward(gather_slots(x, blocks)).reshape(E, bucket, -1)
        inner = (self.dot.einsum("ECD,EDF->ECF", rows, w[...]) for w in (self.gate, self.up))
        gate, up = map(keep_for_backward, inner)
        out = self.dot.einsum("ECF,EFD->ECD", jax.nn.silu(gate) * up, self.down[...])
        mixed = combine_slots(out.reshape(E * bucket, -1), blocks, weight)
        return mixed, 1.0 - kept.sum() / jnp.maximum(routed, 1)


class SwiGLU(nnx.Module):
    """A dense feed-forward layer (or a stack of them)."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Weight], transport: ExpertTransport = LOSSLESS):
        del transport
        self.dot = DotPolicy(config.compute_dtype)
        self.gate = nnx.Param(params["gate"])
        self.up = nnx.Param(params["up"])
        self.down = nnx.Param(params["down"])

    def __call__(
        self,
        x: Float[Array, "B T D"],
        real: Bool[Array, "B T"],
        tokens: Int[Array, ""],
        *,
        train: bool,
        order: str = "contiguous",
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """down(silu(gate x) * (up x)) (INV-24), with empty routing statistics."""
        del real, tokens, train, order
        gate = self.dot.einsum("BTD,DF->BTF", x, self.gate[...])
        up = self.dot.einsum("BTD,DF->BTF", x, self.up[...])
        empty = RouterStats(jnp.zeros((0,)), jnp.zeros((0,)), jnp.zeros(()), jnp.zeros(()))
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
