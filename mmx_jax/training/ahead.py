"""The real training step, compiled for accelerators that are not there: memory, collectives, an estimate of its speed.

python train.py --config configs/minimax_text_01.py:v5p_4096 --compile_only --topology v5p:16x16x16
"""

import math
import re
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmx_jax.config import LIGHTNING, MESH_AXES, MeshConfig, RunConfig, StageConfig
from mmx_jax.flops import forward_flops, training_flops_per_token
from mmx_jax.training.stages import StageSetup
from mmx_jax.training.state import abstract_batch
from mmx_jax.training.step import make_train_step, stage_model
from pallas_kernels import dispatch
from parallel import hlo
from parallel.mesh import make_mesh
from parallel.roofline import KERNEL_EFFICIENCY, MATMUL_EFFICIENCY, MEMORY_EFFICIENCY, Cost, Roofline
from parallel.topology import Topology

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
BACKWARD_KERNEL = 1.75
"""Arithmetic of each of the two kernels of an attention's backward over that of its forward."""


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
    micro_batches = target.sequences // target.stage.batch.micro_batch
    roofline = Roofline(target.topology.chip, list(mesh.devices.flat), _kernel_flops(target, mesh), micro_batches)
    return report | estimate(target, roofline.cost(hlo.parse(compiled.as_text())))


def _lower(target: Target, mesh: Mesh) -> Any:
    config, stage = target.config, target.stage
    setup = StageSetup(config, stage, mesh)
    most = max(sequences for _, sequences in stage.batch.ramp) // stage.batch.micro_batch
    batch = abstract_batch(most, stage.batch.micro_batch, stage.sequence_length, mesh)
    step = make_train_step(config.model, stage, setup.optimizer, setup.factors, setup.abstract, config.compiler)
    scalars = (jax.ShapeDtypeStruct((), dtype, sharding=NamedSharding(mesh, PartitionSpec()))
               for dtype in (jnp.int32, jnp.float32))  # fmt: skip
    with jax.set_mesh(mesh), dispatch.target(target.topology.chip.platform):
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
    """Parts of a chip's memory; gradients are in the temporaries, the updated state lies where the old one lay."""
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    total += stats.output_size_in_bytes - stats.alias_size_in_bytes
    gradients = min(known["gradients"], stats.temp_size_in_bytes)
    return {
        "arguments": stats.argument_size_in_bytes,
        "gradients": gradients,
        "other_temporaries": stats.temp_size_in_bytes - gradients,
        "program": stats.generated_code_size_in_bytes,
        "total": total,
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


def _kernel_flops(target: Target, mesh: Mesh) -> Any:
    """Arithmetic of one call of an attention kernel on one chip, by the kernel's name."""
    model = stage_model(target.config.model, target.stage)
    flops = forward_flops(model, target.stage.sequence_length)
    lightning = model.layers.count(LIGHTNING)
    tokens = target.stage.batch.micro_batch * target.stage.sequence_length / mesh.size
    each = {
        "lightning": flops.lightning_mixing * tokens / max(lightning, 1),
        "splash": flops.softmax_mixing * tokens / max(model.num_layers - lightning, 1),
    }

    def of(name: str) -> float:
        backward = any(part in name for part in ("dq", "dk", "dv"))
        return next((cost for kind, cost in each.items() if kind in name), 0.0) * (BACKWARD_KERNEL if backward else 1)

    return of


def estimate(target: Target, cost: Cost) -> dict[str, Any]:
    """Speed of a step by the roofline, and its collectives by kind."""
    peak = target.topology.chip.peak_flops * target.topology.chips
    collectives: dict[str, Any] = {}
    for (kind, how, what), value in cost.collectives.items():
        entry = collectives.setdefault(kind, {"synchronous": 0, "asynchronous": 0, "bytes": 0})
        if what == "count":
            entry[how] += round(value)
        else:
            entry[what] = entry.get(what, 0) + (round(value) if what == "bytes" else value)
    for entry in collectives.values():
        entry |= {key: round(entry.get(key, 0.0), 4) for key in ("seconds", "exposed_seconds")}
    return {
        "program_flops_per_chip": cost.flops,
        "memory_bytes_per_chip": cost.memory_bytes,
        "collectives": collectives,
        "estimate": {
            "step_seconds": round(cost.seconds, 3),
            "computing_seconds": round(cost.seconds - cost.exposed, 3),
            "exposed_collective_seconds": round(cost.exposed, 3),
            "tokens_per_second": round(target.tokens / cost.seconds),
            "mfu": round(target.model_flops / (peak * cost.seconds), 4),
            "efficiency": {"matmul": MATMUL_EFFICIENCY, "kernels": KERNEL_EFFICIENCY, "memory": MEMORY_EFFICIENCY},
        },
    }


def with_mesh(config: RunConfig, sizes: dict[str, int], remat: str, stage_index: int = 0) -> RunConfig:
    """The run on another mesh, its stage with another rematerialisation."""
    stages = list(config.stages)
    stages[stage_index] = replace(stages[stage_index], remat=remat)
    return replace(config, mesh=MeshConfig(**sizes), stages=tuple(stages))
