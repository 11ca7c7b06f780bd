"""Which mesh and which rematerialisation: all that are possible are weighed on paper, the best few are compiled."""

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from mmx_jax.config import LIGHTNING, ConfigError, RunConfig
from mmx_jax.flops import TRAINING_FACTOR, forward_flops
from mmx_jax.training.ahead import BACKWARD_KERNEL, Target, compile_ahead, mesh_sizes, shard_bytes, with_mesh
from mmx_jax.training.stages import StageSetup
from mmx_jax.training.state import abstract_batch
from parallel.mesh import AXES
from parallel.roofline import KERNEL_EFFICIENCY, MATMUL_EFFICIENCY
from parallel.sharding import ShardingError

COMPILED = 3
"""Candidates that are compiled."""
FILLED = 0.9
"""Share of a chip's memory that a candidate may need on paper."""
WORK = {"none": 1.0, "dots": 1.2, "attention": 1.3, "layer": 4 / 3}
"""Matrix products of a step over those without recomputation."""
MIXING = {"none": 1 + 2 * BACKWARD_KERNEL, "attention": 1 + 2 * BACKWARD_KERNEL}
"""Attention kernels of a step over those of a forward pass; policies that are not here run the forward twice."""
EXPOSED_TRAVEL = 0.65, 0.25
"""Share of the all-to-alls' time that a step waits, with one token group and with several: as in compiled steps."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A mesh and a policy, weighed on paper."""

    config: RunConfig
    memory: float
    """Bytes on each chip."""
    seconds: float
    """Of a step."""


def search(target: Target, compiled: int = COMPILED) -> list[dict[str, Any]]:
    """Reports (`compile_ahead`) of the best candidates: those that fit first, the fastest of them first.

    Raises:
      ConfigError: nothing fits even on paper.
    """
    found = sorted(candidates(target), key=lambda candidate: candidate.seconds)
    fitting = [candidate for candidate in found if candidate.memory <= FILLED * target.topology.chip.hbm_bytes]
    if not fitting:
        least = min((candidate.memory for candidate in found), default=math.inf)
        raise ConfigError(
            f"{target.config.name} does not fit on {target.topology}: of {len(found)} meshes the smallest needs about "
            f"{least / 2**30:.0f} GiB a chip, {target.topology.chip.hbm_bytes / 2**30:.0f} GiB are there"
        )
    log.warning("%d of %d candidates fit on paper; compiling %d", len(fitting), len(found), min(compiled, len(fitting)))
    reports = []
    for candidate in fitting[:compiled]:
        report = compile_ahead(Target(candidate.config, target.topology, target.stage_index))
        reports.append(report | {"on_paper": {"memory": candidate.memory, "seconds": candidate.seconds}})
    return sorted(reports, key=lambda report: (not report["fits"], _seconds(report)))


def _seconds(report: dict[str, Any]) -> float:
    return report["estimate"]["step_seconds"] if report["fits"] else math.inf


def candidates(target: Target) -> Iterator[Candidate]:
    """All meshes whose sizes divide what they split, with each policy."""
    model, chips = target.config.model, target.topology.chips
    devices = target.topology.devices()
    experts = [n for n in _divisors(chips) if model.num_experts % n == 0] if model.num_experts else [1]
    tensors = [n for n in _divisors(chips) if n <= 8 and model.num_heads % n == 0]
    sequences = [n for n in _divisors(chips) if n <= 64]
    slices = target.topology.slices
    for data, expert, tensor, sequence in itertools.product({1, slices}, experts, tensors, sequences):
        fsdp, rest = divmod(chips, data * expert * tensor * sequence)
        if rest or data * fsdp % slices:
            continue
        sizes = {"data": data, "fsdp": fsdp, "expert": expert, "sequence": sequence, "tensor": tensor}
        for remat in WORK:
            try:
                config = with_mesh(target.config, sizes, remat, target.stage_index)
                yield weigh(Target(config, target.topology, target.stage_index), devices)
            except (ShardingError, ConfigError):
                break


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def weigh(target: Target, devices: Sequence[jax.Device]) -> Candidate:
    """Memory and time of a step on paper; which device stands where does not matter.

    Raises:
      ShardingError: a size does not divide.
    """
    stage = target.stage
    sizes = tuple(mesh_sizes(target.config.mesh)[axis] for axis in AXES)
    mesh = Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    abstract_batch(1, stage.batch.micro_batch, stage.sequence_length, mesh)
    state = StageSetup(target.config, stage, mesh).abstract
    summed = 2 if target.sequences > stage.batch.micro_batch else 1  # gradients: of all micro-batches, and of one
    kept = shard_bytes(state.params) * (1 + summed) + shard_bytes(state.optimizer)
    between = _slices_seconds(target, shard_bytes(state.params))
    return Candidate(target.config, kept + _activations(target), _step_seconds(target) + between)


def _rows(target: Target) -> float:
    """Tokens of a micro-batch that a group of `tensor` chips works on."""
    stage, mesh = target.stage, target.config.mesh
    return stage.batch.micro_batch * stage.sequence_length * mesh.tensor / target.topology.chips


def _activations(target: Target) -> float:
    """bf16 activations that are kept, the working set of one layer, and one chunk of logits."""
    model, stage, mesh = target.config.model, target.stage, target.config.mesh
    heads = model.num_heads * model.head_dim / mesh.tensor
    dots = 2 * (4 * heads + 2 * model.hidden_size)
    slots = (model.experts_per_token if model.num_experts else 1) * stage.transport.block_factor
    expert = 2 * slots * (2 * model.hidden_size + 3 * model.ffn_hidden_size / mesh.tensor)
    layer = 2 * model.hidden_size
    kept = {"layer": layer, "attention": 2 * layer, "dots": layer + dots, "none": layer + 2 * (dots + expert)}
    working = 3 * (dots + expert) + 8 * stage.loss_chunk / mesh.tensor
    vocabulary = 8 * model.vocab_size * model.hidden_size / mesh.tensor  # bf16 embedding and head, one fp32 gradient
    return _rows(target) * (model.num_layers * kept[stage.remat] + working) + 2 * _gathered(target) + vocabulary


def _gathered(target: Target) -> float:
    """bf16 bytes of one layer's weights as a chip needs them."""
    model, mesh = target.config.model, target.config.mesh
    own = max(model.num_experts, 1) / mesh.expert
    experts = 3 * model.hidden_size * model.ffn_hidden_size * own
    return 2 * (experts + 5 * model.hidden_size * model.num_heads * model.head_dim) / mesh.tensor


def _step_seconds(target: Target) -> float:
    model, stage, mesh, chip = target.config.model, target.stage, target.config.mesh, target.topology.chip
    micro_batches = target.sequences / stage.batch.micro_batch
    passes = 2 if stage.remat == "none" else 3
    links = chip.ici_bandwidth
    torus = chip.platform == "tpu"  # there a collective along one axis has but that axis's links
    weights = (passes + 1) * _gathered(target) / links if target.topology.chips > mesh.tensor else 0.0
    row = 2 * model.hidden_size * _rows(target) / mesh.tensor
    travel = 0.0
    if mesh.expert > 1:
        slots = model.experts_per_token * stage.transport.block_factor
        hops = min(mesh.expert, max(target.topology.shape)) / 8 * 6 if torus else 1.0
        travel = 2 * passes * slots * row * hops / links
        travel *= EXPOSED_TRAVEL[stage.transport.token_groups > 1]
    sums = 4 * passes * row * (mesh.tensor - 1) * (3 if torus else 1) / links
    row_seconds = _sequence_bytes(target) * (3 if torus else 1) / links
    return _computing_seconds(target) + micro_batches * (model.num_layers * (weights + travel + sums) + row_seconds)


def _sequence_bytes(target: Target) -> float:
    """What a chip receives along the sequence axis in a micro-batch: states, keys and values, fp32 gradients."""
    model, stage, mesh = target.config.model, target.stage, target.config.mesh
    if mesh.sequence == 1:
        return 0.0
    rows = _rows(target) * mesh.sequence / stage.sequence_length
    lightning = model.layers.count(LIGHTNING)
    states = 2 * 2 * mesh.sequence * 4 * model.num_heads * model.head_dim**2 / mesh.tensor
    keys = 16 * stage.sequence_length * model.num_kv_heads * model.head_dim  # bf16 both ways, and fp32 gradients
    dense = 5 * model.num_layers * model.hidden_size * model.num_heads * model.head_dim
    gradients = 8 * dense / (mesh.fsdp * mesh.expert * mesh.tensor)
    return rows * (lightning * states + (model.num_layers - lightning) * keys) + gradients


def _slices_seconds(target: Target, params: int) -> float:
    """What a step waits for other slices: for bf16 weights and gradients (fsdp), or for fp32 gradients alone (data)."""
    slices, stage = target.topology.slices, target.stage
    passes = 2 if stage.remat == "none" else 3
    each = 2 * params / slices if target.config.mesh.data == slices else (passes + 2) * params / 2
    micro_batches = target.sequences / stage.batch.micro_batch
    return EXPOSED_TRAVEL[1] * micro_batches * (slices - 1) * each / target.topology.chip.dcn_bandwidth


def _computing_seconds(target: Target) -> float:
    """Matrix products, with the empty rows of transport blocks, and attention kernels."""
    model, stage, chip = target.config.model, target.stage, target.topology.chip
    flops = forward_flops(model, stage.sequence_length)
    mixing = flops.lightning_mixing + flops.softmax_mixing
    travels = target.config.mesh.expert > 1 and model.capacity_factor is not None
    empty = flops.ffn * (stage.transport.block_factor - 1) if travels else 0.0
    products = TRAINING_FACTOR * WORK[stage.remat] * (flops.total - mixing + empty)
    kernels = MIXING.get(stage.remat, 2 + 2 * BACKWARD_KERNEL) * mixing
    seconds = (products / MATMUL_EFFICIENCY + kernels / KERNEL_EFFICIENCY) / chip.peak_flops
    return seconds * target.tokens / target.topology.chips
