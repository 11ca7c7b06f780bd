"""A training step weighed on paper: memory of a chip by part and seconds, from sizes alone, without compiling.

It follows what the compiled steps of docs/data/ahead_of_time.jsonl need within 20%, and cost by the same roofline
within 5%, but for v6e 20% (docs/scaling.md): good enough to choose which meshes to compile, no substitute for that.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jax.sharding import AbstractMesh, AxisType

from mmx_jax.config import LIGHTNING, RunConfig
from mmx_jax.flops import TRAINING_FACTOR, ForwardFlops, forward_flops
from mmx_jax.model import parameter_spec
from mmx_jax.model.plan import layer_plan
from mmx_jax.model.trainable import learning_rate_factors
from mmx_jax.training.ahead import BACKWARD_KERNEL, FUSED_BACKWARD, Target, mesh_sizes, shard_bytes
from mmx_jax.training.optimizer import make_optimizer
from mmx_jax.training.state import abstract_batch, abstract_state
from parallel.mesh import AXES
from parallel.roofline import KERNEL_EFFICIENCY, MATMUL_EFFICIENCY, MEMORY_EFFICIENCY
from parallel.sharding import ShardingError

BF16, FP32 = 2, 4
EVERYTHING = 2.8
"""What autodiff keeps of a layer over the results of its matrix products: what lies between them too, some in fp32."""
COPIES = {"tpu": 0.5, "gpu": 2.0}
"""Bytes over those of the parameters that they take once more: in bf16, or laid out for the loops over layers."""
TRAFFIC = {"tpu": 3.0, "gpu": 4.2}
"""How often a pass over a layer moves its activations through main memory beside its matrix products."""
KEEPING = 6.0
"""How often what a layer keeps for its backward pass moves: written, stacked over layers, cut out and read."""
WEIGHTS = 6
"""How often a layer's gathered weights move, their gradients included, in each micro-batch."""
GATHERS_EXPOSED = {"tpu": 1.0, "sparse cores": 0.45, "gpu": 0.2}
"""Share of the time of gathers and sums of weights that a step waits."""
SLICES_EXPOSED = 0.5
"""The same of what crosses slices."""
SPARSE_CORES = "xla_tpu_enable_sparse_core_collective_offload_all_gather"


@dataclass(frozen=True)
class Candidate:
    """A configuration with its mesh, rematerialisation and micro-batch, weighed."""

    config: RunConfig
    memory: dict[str, float]
    """Bytes on each chip by part: params, moments, gradients, activations, working."""
    computing: float
    """Seconds of a step without waiting for other chips."""
    exposed: float
    """Seconds of a step in which the chip waits for collectives."""

    @property
    def bytes(self) -> float:
        """Of all parts."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.computing + self.exposed


@dataclass(frozen=True)
class StateBytes:
    """What a mesh makes a chip hold in any case."""

    params: int
    moments: int


def state_bytes(target: Target) -> StateBytes:
    """Parameters and moments of a chip; no devices are needed.

    Raises:
      ShardingError: a dimension of a parameter does not divide by its mesh axes.
    """
    model, stage = target.config.model, target.stage
    specs = parameter_spec(model)
    factors = learning_rate_factors(specs, stage.trainable)
    optimizer = make_optimizer(stage.optimizer, specs, factors)
    state = abstract_state(model, optimizer, factors, _abstract_mesh(target))
    return StateBytes(shard_bytes(state.params), shard_bytes(state.optimizer))


def check_batch(target: Target) -> None:
    """Checks that a micro-batch divides by the mesh.

    Raises:
      ShardingError: it does not; says which sizes.
    """
    stage, mesh = target.stage, target.config.mesh
    abstract_batch(1, stage.batch.micro_batch, stage.sequence_length, _abstract_mesh(target))
    each = stage.batch.micro_batch * stage.sequence_length * mesh.tensor // target.topology.chips
    if target.config.model.num_experts and each % stage.transport.token_groups:
        raise ShardingError(f"the {each} tokens of a chip do not divide by {stage.transport.token_groups} token groups")


def _abstract_mesh(target: Target) -> AbstractMesh:
    sizes = tuple(mesh_sizes(target.config.mesh)[axis] for axis in AXES)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def weigh(target: Target, state: StateBytes) -> Candidate:
    """Memory and time of a step on paper; every mesh axis has its size (no -1)."""
    paper = _Paper(target, state)
    return Candidate(target.config, paper.memory(), paper.computing(), paper.exposed())


@dataclass(frozen=True)
class _Paper:
    """Sizes of a step; letters are those of the README. Of widths a chip has its tensor axis's part."""

    target: Target
    state: StateBytes

    @cached_property
    def options(self) -> dict[str, Any]:
        """The compiler's options."""
        return self.target.config.compiler.options(self.target.topology.chip.platform) or {}

    @cached_property
    def overlap(self) -> str:
        """How collectives run beside other work."""
        platform = self.target.topology.chip.platform
        return "sparse cores" if self.options.get(SPARSE_CORES) == "true" else platform

    @cached_property
    def tokens(self) -> float:
        """Tokens of a micro-batch that the chips of a tensor group work on together."""
        stage, mesh = self.target.stage, self.target.config.mesh
        return stage.batch.micro_batch * stage.sequence_length * mesh.tensor / self.target.topology.chips

    @property
    def rows(self) -> float:
        """Rows that these tokens are of."""
        return self.tokens * self.target.config.mesh.sequence / self.target.stage.sequence_length

    @property
    def micro_batches(self) -> float:
        """Micro-batches of a step."""
        return self.target.sequences / self.target.stage.batch.micro_batch

    @property
    def slots(self) -> float:
        """Rows that experts multiply for a token, with empty ones."""
        model, transport = self.target.config.model, self.target.stage.transport
        if not model.num_experts:
            return 1.0
        factor = transport.block_factor if self.travels else 1.0
        if self.travels and transport.bucket_factor is not None and model.capacity_factor is not None:
            factor = min(factor, transport.bucket_factor)
        return model.experts_per_token * factor

    @property
    def travelling(self) -> float:
        """Rows that travel for a token, with the empty ones of transport blocks."""
        return self.target.config.model.experts_per_token * self.target.stage.transport.block_factor

    @property
    def travels(self) -> bool:
        """Whether rows go to experts on other chips."""
        return self.target.config.mesh.expert > 1

    @property
    def lightning(self) -> int:
        """Lightning layers."""
        return self.target.config.model.layers.count(LIGHTNING)

    @property
    def group_layers(self) -> int:
        """Layers of one group of the outer loop; 0 without an outer loop."""
        sections = [section for section in layer_plan(self.target.config.model) if section.groups > 1]
        return max((sum(run.length for run in section.runs) for section in sections), default=0)

    def mean_over_layers(self, lightning: float | int, softmax: float | int) -> float:
        """Of a figure by kind of layer."""
        layers = self.target.config.model.num_layers
        return (lightning * self.lightning + softmax * (layers - self.lightning)) / layers

    @cached_property
    def attention_width(self) -> float:
        """Values of a token in the results of a layer's projections."""
        model = self.target.config.model
        D, A, keys = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        split = self.mean_over_layers(4 * A, A + 2 * keys) / self.target.config.mesh.tensor
        return split + D  # the last one is a sum over heads, whole on every chip

    @cached_property
    def ffn_width(self) -> float:
        """Values of a token's rows in the FFN: in, gate, up, their product, out."""
        model = self.target.config.model
        return self.slots * (2 * model.hidden_size + 3 * model.ffn_hidden_size) / self.target.config.mesh.tensor

    @cached_property
    def gathered(self) -> tuple[float, float]:
        """bf16 bytes of one layer's dense weights and of its experts' weights as a chip needs them."""
        model, mesh = self.target.config.model, self.target.config.mesh
        D, A, keys = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        dense = self.mean_over_layers(5 * D * A, 2 * D * (A + keys))
        experts = 3 * D * model.ffn_hidden_size * (model.num_experts / mesh.expert if model.num_experts else 1)
        if not model.num_experts:
            dense, experts = dense + experts, 0.0
        return BF16 * dense / mesh.tensor, BF16 * experts / mesh.tensor

    def memory(self) -> dict[str, float]:
        """Bytes by part, at the peak of the backward pass."""
        params, moments = self.state.params, self.state.moments
        summed = 2 if self.micro_batches > 1 else 1  # of all micro-batches, and of one
        return {
            "params": float(params),
            "moments": float(moments),
            "gradients": float(params * summed),
            # Those of one group of layers lie there twice: stacked by themselves, and copied into the stack of groups.
            "activations": (self.target.config.model.num_layers + self.group_layers) * self.kept(),
            "working": params * COPIES[self.target.topology.chip.platform]
            + max(self.layer_working(), self.loss_working()),
        }

    def kept(self) -> float:
        """Bytes of a layer that its backward pass finds."""
        model, mesh, remat = self.target.config.model, self.target.config.mesh, self.target.stage.remat
        D = model.hidden_size / mesh.tensor
        dense = 0.0 if model.num_experts else (2 * model.ffn_hidden_size + model.hidden_size) / mesh.tensor
        dots = D + self.attention_width + dense
        rows = self.slots * (model.hidden_size + 2 * model.ffn_hidden_size)  # in, gate, up
        experts = (rows + model.experts_per_token * model.hidden_size) / mesh.tensor if model.num_experts else 0.0
        width = {
            "layer": D,
            "attention": 2 * D,
            "dots": dots,
            "experts": dots + experts,
            "none": D + EVERYTHING * (self.attention_width + self.ffn_width),
        }[remat]
        weights = self.gathered[1] if remat == "none" else 0.0
        results = 0.0 if remat == "none" else self.mean_over_layers(0, model.num_heads * model.head_dim) / mesh.tensor
        states = 0.0
        if mesh.sequence > 1:
            stripes = self.target.stage.split.stripes(mesh.sequence) / mesh.sequence
            states = self.mean_over_layers(FP32 * model.num_heads * model.head_dim**2 / mesh.tensor, 0.0)
            states *= self.rows * stripes
        return BF16 * (width + results) * self.tokens + weights + states

    def residual(self) -> float:
        """Bytes of some fp32 vectors of the model's width for every token."""
        return 6 * FP32 * self.tokens * self.target.config.model.hidden_size / self.target.config.mesh.tensor

    def layer_working(self) -> float:
        """Bytes that the backward pass of one layer works in: activations with gradients, weights with gradients."""
        model, mesh = self.target.config.model, self.target.config.mesh
        heads = model.num_heads * model.head_dim / mesh.tensor
        lightning, softmax = (2 * BF16 * parts * heads * self.tokens for parts in (9, 5))
        if mesh.sequence > 1:  # keys and values of whole rows, and their fp32 gradients
            keys = self.rows * self.target.stage.sequence_length * 2 * model.num_kv_heads * model.head_dim
            softmax += (BF16 + FP32) * keys / min(mesh.tensor, model.num_kv_heads)
        ffn = 2 * BF16 * self.ffn_width * self.tokens
        return max(lightning, softmax, ffn) + self.residual() + 2 * sum(self.gathered)

    def loss_working(self) -> float:
        """Bytes that the loss works in: head, its gradient before and after it is laid out, a chunk of logits."""
        model, stage, mesh = self.target.config.model, self.target.stage, self.target.config.mesh
        head = 3 * BF16 * model.vocab_size * model.hidden_size / mesh.tensor
        chunk = min(stage.loss_chunk, model.vocab_size) / mesh.tensor
        return head + 2 * FP32 * chunk * self.tokens + self.residual()

    @cached_property
    def flops(self) -> ForwardFlops:
        """Of a token, forward."""
        return forward_flops(self.target.config.model, self.target.stage.sequence_length)

    def again(self) -> tuple[float, float, float]:
        """Shares of projections, FFN and lightning attention that the backward pass computes again."""
        experts = 1.0 if self.target.config.model.num_experts else 0.0
        return {
            "none": (0.0, 0.0, 0.0),
            "dots": (0.0, experts, 1.0),
            "experts": (0.0, 0.0, 1.0),
            "attention": (0.8, 1.0, 1.0),
            "layer": (1.0, 1.0, 1.0),
        }[self.target.stage.remat]

    def computing(self) -> float:
        """Seconds of matrix products and kernels, and of what moves through main memory beside them."""
        chip, flops, model = self.target.topology.chip, self.flops, self.target.config.model
        projections, ffn, kernels = self.again()
        wide = flops.ffn * (self.slots / model.experts_per_token if model.num_experts else 1.0)
        products = (
            (TRAINING_FACTOR + projections) * (flops.lightning_projections + flops.softmax_projections)
            + (TRAINING_FACTOR + ffn) * (wide + flops.router)
            + (TRAINING_FACTOR + 1) * flops.head  # its loss keeps no logits
        )
        lightning = (1 + kernels + 2 * BACKWARD_KERNEL) * flops.lightning_mixing
        backward = FUSED_BACKWARD if chip.platform == "tpu" else 2 * BACKWARD_KERNEL
        softmax = (1 + backward) * flops.softmax_mixing  # its results are kept by every policy
        seconds = (products / MATMUL_EFFICIENCY + (lightning + softmax) / KERNEL_EFFICIENCY) / chip.peak_flops
        return seconds * self.target.tokens / self.target.topology.chips + self.moving()

    def moving(self) -> float:
        """Seconds of what moves through main memory beside matrix products."""
        model, chip = self.target.config.model, self.target.topology.chip
        projections, ffn, _ = self.again()
        passes = TRAFFIC[chip.platform] * BF16
        layer = passes * ((3 + projections) * self.attention_width + (3 + ffn) * self.ffn_width)
        logits = 6 * FP32 * model.vocab_size / self.target.config.mesh.tensor
        tokens = self.tokens * self.micro_batches
        moved = tokens * (model.num_layers * layer + logits)
        moved += KEEPING * self.micro_batches * model.num_layers * self.kept()
        moved += WEIGHTS * self.micro_batches * model.num_layers * sum(self.gathered)
        moved += 5 * self.state.params * self.micro_batches + 7 * self.state.params  # gradients; the update
        return moved / (MEMORY_EFFICIENCY * chip.hbm_bandwidth)

    def links(self, ways: int) -> float:
        """Bytes/s that a chip of a group of so many receives: over the links of the wired axes that it spans."""
        chip, wired = self.target.topology.chip, [n for n in self.target.topology.shape if n > 1]
        if chip.platform == "gpu" or not wired:
            return chip.ici_bandwidth
        reach = spanned = 1
        for count, size in enumerate(sorted(wired, reverse=True), start=1):
            reach, spanned = reach * size, count
            if reach >= ways:
                break
        return chip.ici_bandwidth * spanned / len(wired)

    def exposed(self) -> float:
        """Seconds that a step waits for weights, rows of experts, sums over heads, and other parts of its rows."""
        weights = GATHERS_EXPOSED[self.overlap] * (self.weights() + self.sums())
        travel = self.travel() / self.target.stage.transport.token_groups  # the first and the last: nothing hides them
        layers = self.target.config.model.num_layers * (weights + travel)
        return self.micro_batches * (layers + self.along_rows()) + self.between_slices()

    def weights(self) -> float:
        """Seconds to gather a layer's weights twice and to add up their gradients."""
        mesh, gpu = self.target.config.mesh, self.target.topology.chip.platform == "gpu"
        times = 2 + (1 if gpu else 2)  # gradients: scattered on GPUs, often summed everywhere on TPUs
        groups = (mesh.fsdp * mesh.expert, mesh.fsdp * mesh.sequence)
        return sum(times * size * (ways - 1) / ways / self.links(ways) for size, ways in zip(self.gathered, groups))

    def travel(self) -> float:
        """Seconds of a layer's all-to-alls, there and back."""
        mesh, topology = self.target.config.mesh, self.target.topology
        if not self.travels:
            return 0.0
        journeys = 4 if self.target.stage.remat in ("none", "experts") else 6
        row = BF16 * self.target.config.model.hidden_size / mesh.tensor
        received = journeys * self.travelling * self.tokens * row
        if topology.chip.platform == "gpu":
            return received / topology.chip.ici_bandwidth
        hops = min(mesh.expert, max(topology.shape)) / 4  # on a ring, on average
        return received * hops / self.links(1)

    def sums(self) -> float:
        """Seconds in which a layer's rows are gathered and summed over the tensor axis."""
        ways = self.target.config.mesh.tensor
        row = BF16 * self.target.config.model.hidden_size * self.tokens
        return (6 * self.slots + 10) * row * (ways - 1) / ways / self.links(ways)

    def along_rows(self) -> float:
        """Seconds of a micro-batch along the sequence axis: states, keys and values, gradients of dense weights."""
        model, mesh = self.target.config.model, self.target.config.mesh
        if mesh.sequence == 1:
            return 0.0
        states = 2 * 2 * FP32 * mesh.sequence * model.num_heads * model.head_dim**2 / mesh.tensor
        keys = 16 * self.target.stage.sequence_length * model.num_kv_heads * model.head_dim  # both ways, and gradients
        gradients = 2 * FP32 * self.gathered[0] / BF16 * model.num_layers / (mesh.fsdp * mesh.expert)
        received = self.rows * (self.lightning * states + (model.num_layers - self.lightning) * keys) + gradients
        return received / self.links(mesh.sequence)

    def between_slices(self) -> float:
        """Seconds of a step for other slices: bf16 weights and gradients (fsdp), or fp32 gradients alone (data)."""
        topology, params = self.target.topology, self.state.params
        replicas = self.target.config.mesh.data == topology.slices
        each = 2 * params / topology.slices if replicas else 4 * params * BF16 / FP32
        bandwidth = topology.chip.dcn_bandwidth
        return SLICES_EXPOSED * self.micro_batches * (topology.slices - 1) * each / bandwidth
