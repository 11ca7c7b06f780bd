"""The real training step, compiled for accelerators that are not there: memory, collectives, an estimate of its speed.

python train.py --config configs/minimax_text_01.py:v5p_4096 --compile_only --topology v5p:16x16x16
"""

import math
import re
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmx_jax.config import LIGHTNING, MESH_AXES, ConfigError, MeshConfig, RunConfig, StageConfig
from mmx_jax.flops import forward_flops, training_flops_per_token
from mmx_jax.training.stages import StageSetup
from mmx_jax.training.state import abstract_batch
from mmx_jax.training.step import make_train_step, stage_model
from pallas_kernels import dispatch
from pallas_kernels.softmax.chunked import block_lengths
from pallas_kernels.softmax.mosaic_tpu import tiles as softmax_tiles
from parallel import hlo
from parallel.mesh import make_mesh
from parallel.roofline import KERNEL_EFFICIENCY, MATMUL_EFFICIENCY, MEMORY_EFFICIENCY, Cost, Roofline
from parallel.sharding import DEFAULT_RULES
from parallel.topology import Topology

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
BACKWARD_KERNEL = 1.75
"""Arithmetic of each of the two kernels of an attention's backward over that of its forward."""
FUSED_BACKWARD = 2.5
"""The same of the one kernel of softmax attention's backward on TPUs: five matrix products over two."""
SLOWER_MATMUL = 0.75
"""A second, more cautious share of the peak for matrix products, at which the estimate is made again."""


@dataclass(frozen=True)
class Target:
    """One stage of a run on a topology."""

    config: RunConfig
    topology: Topology
    stage_index: int = 0

    @property
    def stage(self) -> StageConfig:
        """The stage whose step is compiled."""
        return self.config.stages[self.stage_index]

    @property
    def sequences(self) -> int:
        """Sequences a step, at the stage's first point of the ramp."""
        return self.stage.batch.ramp[0][1]

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.sequences * self.stage.sequence_length

    @property
    def model_flops(self) -> float:
        """FLOPs of a step without recomputation: the numerator of an MFU."""
        return training_flops_per_token(self.config.model, self.stage.sequence_length) * self.tokens

    def mesh(self) -> Mesh:
        """The mesh over the topology's devices."""
        return make_mesh(mesh_sizes(self.config.mesh), self.topology.devices())


def mesh_sizes(mesh: MeshConfig) -> dict[str, int]:
    """Size by mesh axis."""
    return {axis: getattr(mesh, axis) for axis in MESH_AXES}


def compile_ahead(target: Target) -> dict[str, Any]:
    """Lowers and compiles the step; returns what it needs and what it would reach, as JSON values (bytes, seconds).

    A step that needs more memory than a chip has is an answer ("fits" false, with the bytes), not an error.

    Raises:
      TopologyError, MeshError, ShardingError: no such devices, or the configuration does not fit the mesh.
    """
    mesh = target.mesh()
    report = _facts(target, mesh)
    start = time.monotonic()
    lowered = _lower(target, mesh)
    report["lower_seconds"] = round(time.monotonic() - start, 1)
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compiled = None
        known = report["memory_per_chip"]
        report["memory_per_chip"] = known | _exhausted(str(error), known["params"] + known["moments"])
    report["compile_seconds"] = round(time.monotonic() - start, 1)
    if compiled is None:
        return report | {"fits": False}
    report["memory_per_chip"] |= _memory(report["memory_per_chip"], compiled.memory_analysis())
    report["fits"] = report["memory_per_chip"]["total"] <= report["memory_per_chip"]["hbm"]
    devices = list(mesh.devices.flat)
    roofline = Roofline(target.topology.chip, devices, _kernel_flops(target, mesh), _unknown_loops(target, mesh))
    module = hlo.parse(compiled.as_text())
    slower = replace(roofline, matmul_efficiency=SLOWER_MATMUL).cost(module)
    dearest = replace(roofline, dearest=True).cost(module)
    return report | estimate(target, roofline.cost(module), slower, dearest)


def does_not_fit(report: dict[str, Any]) -> ConfigError:
    """What to tell who asked for a step that needs more memory than a chip has."""
    memory = report["memory_per_chip"]
    needed = f"{memory['total'] / 2**30:.1f}" if "total" in memory else "more"
    return ConfigError(
        f"{report['config']} does not fit on {report['topology']}: the step needs {needed} GiB a chip, "
        f"{memory['hbm'] / 2**30:.1f} are there; a larger slice, --config.stages.0.remat=layer, a smaller micro_batch "
        "or another mesh (--search) would need less"
    )


def _lower(target: Target, mesh: Mesh) -> Any:
    config, stage = target.config, target.stage
    setup = StageSetup(config, stage, mesh)
    most = max(sequences for _, sequences in stage.batch.ramp) // stage.batch.micro_batch
    batch = abstract_batch(most, stage.batch.micro_batch, stage.sequence_length, mesh)
    step = make_train_step(config.model, stage, setup.optimizer, setup.factors, setup.abstract, config.compiler)
    scalars = (jax.ShapeDtypeStruct((), dtype, sharding=NamedSharding(mesh, PartitionSpec()))
               for dtype in (jnp.int32, jnp.float32))  # fmt: skip
    chip = target.topology.chip
    with jax.set_mesh(mesh), dispatch.target(chip.platform, chip.compute_capability):
        return step.lower(setup.abstract, batch, *scalars)


def _facts(target: Target, mesh: Mesh) -> dict[str, Any]:
    """What is known before compiling."""
    stage, chip = target.stage, target.topology.chip
    state = StageSetup(target.config, stage, mesh).abstract
    return {
        "config": target.config.name,
        "topology": str(target.topology),
        "chips": target.topology.chips,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "remat": stage.remat,
        "micro_batch": stage.batch.micro_batch,
        "sequences_per_step": target.sequences,
        "sequence_length": stage.sequence_length,
        "tokens_per_chip": target.tokens // target.topology.chips,
        "flops_per_step": target.model_flops,
        "memory_per_chip": {
            "params": shard_bytes(state.params),
            "moments": shard_bytes(state.optimizer),
            "gradients": shard_bytes(state.params),
            "hbm": chip.hbm_bytes,
        },
    }


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays that are split."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


def _memory(known: dict[str, int], stats: Any) -> dict[str, int]:
    """Parts of a chip's memory at the step's peak; gradients are temporaries, the new state lies where the old one lay.

    The peak is what the chip must have: the compiler's sum of temporaries also counts those that share a place.
    """
    peak = stats.peak_memory_in_bytes
    gradients = min(known["gradients"], peak - stats.argument_size_in_bytes)
    return {
        "arguments": stats.argument_size_in_bytes,
        "gradients": gradients,
        "other_temporaries": peak - stats.argument_size_in_bytes - gradients,
        "program": stats.generated_code_size_in_bytes,
        "total": peak + stats.generated_code_size_in_bytes,
    }


def _exhausted(message: str, state: int) -> dict[str, int]:
    """Bytes in the compiler's refusal: needed (by the program, or by its temporaries beside the state), and there."""
    number = r"([\d.]+)([KMGT])"
    whole = re.search(rf"[Uu]sed {number} of {number}", message)
    found = whole or re.search(rf"\({number}\) exceeds available HBM \({number}\)", message)
    if found is None:
        return {}
    needed, there = (int(float(found[i]) * UNITS[found[i + 1]]) for i in (1, 3))
    return {"total": needed + (0 if whole else state), "hbm": there}


def _kernel_flops(target: Target, mesh: Mesh) -> Callable[[hlo.Instruction, Sequence[str]], float]:
    """Arithmetic of one call of a kernel on one chip, by its instruction and the shapes of its operands."""
    model = stage_model(target.config.model, target.stage)
    flops = forward_flops(model, target.stage.sequence_length)
    lightning = model.layers.count(LIGHTNING)
    softmax = model.num_layers - lightning
    tokens = target.stage.batch.micro_batch * target.stage.sequence_length / mesh.size
    each = {
        "lightning": flops.lightning_mixing * tokens / max(lightning, 1),
        "softmax_attention": flops.softmax_mixing * tokens / max(softmax, 1),
    }
    _, key_tile = softmax_tiles(target.stage.sequence_length // mesh.shape["sequence"], target.stage.sequence_length)
    beyond = 1 + key_tile / target.stage.sequence_length  # of the tiles on the diagonal half is computed in vain

    def of(item: hlo.Instruction, shapes: Sequence[str]) -> float:
        if "expert_matmul" in item.op_name or item.name.startswith("ragged-dot"):  # (some lose their scope)
            return _grouped_matmul_flops(item.shape, shapes)
        # Pallas kernels on TPUs are called by name; those on GPUs are known by the scope that they stand in.
        name = item.name if target.topology.chip.platform == "tpu" else item.op_name
        if name.startswith("softmax_"):
            whole = each["softmax_attention"] * beyond * _share_of_queries(item, shapes)
            return whole * (FUSED_BACKWARD if "backward" in name else 1)
        backward = any(part in item.name for part in ("dq", "dk", "dv")) or (
            "transpose(" in name and "rematted_computation" not in name
        )
        return next((cost for kind, cost in each.items() if kind in name), 0.0) * (BACKWARD_KERNEL if backward else 1)

    return of


def _unknown_loops(target: Target, mesh: Mesh) -> Callable[[hlo.Instruction], float]:
    """How often loops run that end by a value: those over micro-batches, and over the blocks of keys that are seen.

    Under a causal mask a block of queries sees half of the keys on average.
    """
    stage, model = target.stage, target.config.model
    rows = stage.batch.micro_batch // math.prod(mesh.shape[axis] for axis in DEFAULT_RULES.batch)
    queries, heads = stage.sequence_length // mesh.shape["sequence"], model.num_heads // mesh.shape["tensor"]
    with dispatch.target(target.topology.chip.platform):
        _, block = block_lengths(rows, queries, stage.sequence_length, heads)
    seen = (math.ceil(stage.sequence_length / block) + 1) / 2
    micro_batches = target.sequences // stage.batch.micro_batch
    return lambda loop: seen if "softmax_attention" in loop.op_name else micro_batches


def _share_of_queries(item: hlo.Instruction, shapes: Sequence[str]) -> float:
    """Of all queries, the first matrix read, those whose output or gradient, the first result, a kernel makes."""
    queries = next(sizes for shape in shapes if len(sizes := hlo.dimensions(shape)) > 1)
    return math.prod(hlo.dimensions(item.shape)) / math.prod(queries)


def _grouped_matmul_flops(result: str, shapes: Sequence[str]) -> float:
    """Of rows [M, K] by their experts' weights to [M, N], or by rows [M, N] to the weights' gradient [.., K, N]."""
    rows = next((sizes for shape in shapes if len(sizes := hlo.dimensions(shape)) > 1), None)
    return 2.0 * math.prod(rows) * hlo.dimensions(result)[-1] if rows else 0.0


def estimate(target: Target, cost: Cost, slower: Cost, dearest: Cost) -> dict[str, Any]:
    """Speed of a step by the roofline, and its collectives by kind.

    Beside it the speed with slower matrix products, and with the dearest branch of every conditional.
    """
    peak = target.topology.chip.peak_flops * target.topology.chips

    def speed(seconds: float) -> dict[str, float]:
        return {"step_seconds": round(seconds, 3), "mfu": round(target.model_flops / (peak * seconds), 4)}

    collectives: dict[str, Any] = {}
    for (kind, how, what), value in cost.collectives.items():
        entry = collectives.setdefault(kind, {"synchronous": 0, "asynchronous": 0, "bytes": 0})
        if what == "count":
            entry[how] += round(value)
        else:
            entry[what] = entry.get(what, 0) + (round(value) if what == "bytes" else value)
    for entry in collectives.values():
        entry |= {key: round(entry.get(key, 0.0), 4) for key in ("seconds", "exposed_seconds")}
        entry |= {key: round(entry.get(key, 0)) for key in ("hidden_bytes", "with_matmul")}
        entry["hidden_share"] = round(entry["hidden_bytes"] / entry["bytes"], 4) if entry["bytes"] else 1.0
    return {
        "program_flops_per_chip": cost.flops,
        "memory_bytes_per_chip": cost.memory_bytes,
        "collectives": collectives,
        "estimate": {
            **speed(cost.seconds),
            "computing_seconds": round(cost.seconds - cost.exposed, 3),
            "exposed_collective_seconds": round(cost.exposed, 3),
            "tokens_per_second": round(target.tokens / cost.seconds),
            "efficiency": {"matmul": MATMUL_EFFICIENCY, "kernels": KERNEL_EFFICIENCY, "memory": MEMORY_EFFICIENCY},
            "slower_matmul": {"matmul": SLOWER_MATMUL} | speed(slower.seconds),
            "dearest_branches": speed(dearest.seconds),
        },
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10,
    }


def with_mesh(
    config: RunConfig, sizes: dict[str, int], remat: str, stage_index: int = 0, micro_batch: int | None = None
) -> RunConfig:
    """The run on another mesh, its stage with another rematerialisation and, if one is given, another micro-batch."""
    stages = list(config.stages)
    stage = stages[stage_index]
    batch = stage.batch if micro_batch is None else replace(stage.batch, micro_batch=micro_batch)
    stages[stage_index] = replace(stage, remat=remat, batch=batch)
    return replace(config, mesh=MeshConfig(**sizes), stages=tuple(stages))
