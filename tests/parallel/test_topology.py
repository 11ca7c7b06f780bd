"""Slices that exist, and the step compiled for one that is not there."""

import fcntl
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from mmx_jax.config import (
    BatchConfig,
    CompilerConfig,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    SchedulePhase,
    SourceConfig,
    StageConfig,
)
from mmx_jax.flops import training_flops_per_token
from mmx_jax.model import parameter_spec
from mmx_jax.training.ahead import Target, compile_ahead
from mmx_jax.training.search import candidates
from parallel import hlo
from parallel.mesh import make_mesh
from parallel.roofline import Roofline
from parallel.topology import CHIPS, TopologyError, parse_topology

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(
    vocab_size=512, hidden_size=256, layers=("lightning", "softmax"), num_heads=2, num_kv_heads=1, head_dim=128,
    rotary_dim=64, ffn_hidden_size=256, num_experts=4, capacity_factor=1.25,
)  # fmt: skip
STAGE = StageConfig(
    sequence_length=512,
    data=DataConfig(sources=(SourceConfig(name="none", store="none"),)),
    batch=BatchConfig(micro_batch=4, ramp=((0, 8),)),
    schedule=ScheduleConfig(phases=(SchedulePhase(until_tokens=10**6, learning_rate=1e-3),)),
    remat="layer",
)
RUN = RunConfig(name="tiny", model=MODEL, stages=(STAGE,), mesh=MeshConfig(fsdp=2, expert=2))


def test_real_slices_are_read() -> None:
    """Kind, shape and count of slices."""
    one, two = parse_topology("v5p:16x16x16"), parse_topology("v6e:16x16*2")
    assert (one.kind, one.shape, one.slices, one.chips) == ("v5p", (16, 16, 16), 1, 4096)
    assert (two.kind, two.shape, two.slices, two.chips) == ("v6e", (16, 16), 2, 512)
    assert str(two) == "v6e:16x16*2"
    assert parse_topology("h100:8").chips == 8


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("v5p:16x16x15", ["16x16x15", "8x16x16", "16x16x16", "16x16x24"]),
        ("v5p:16x16", ["16x16", "4x8x8"]),
        ("v6e:32x32", ["near are", "16x16"]),
        ("v5q:2x2x1", ["'v5q'", "v5p"]),
        ("v5p", ["kind:shape", "v5p:4x4x4"]),
        ("v5p:2x2x1*0", ["at least one slice"]),
        ("h100:8*2", ["one host"]),
    ],
)
def test_other_slices_are_refused(text: str, named: list[str]) -> None:
    """The message names what is near."""
    with pytest.raises(TopologyError) as refusal:
        parse_topology(text)
    for part in named:
        assert part in str(refusal.value)


def test_the_command_line_refuses() -> None:
    """One line and exit code 2, for a slice that does not exist and for none."""
    for flag, named in (("--topology=v5p:3x3x3", "2x4x4"), ("--search", "--topology")):
        command = [sys.executable, "train.py", "--config", "configs/research_20m.py", "--compile_only", flag]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == 2, ended.stderr
        assert named in ended.stderr.splitlines()[-1]
        assert "Traceback" not in ended.stderr


def test_compiler_options_are_checked() -> None:
    """An option that cannot be XLA's, and one given twice."""
    with pytest.raises(ConfigError, match="xla_"):
        CompilerConfig(tpu=(("fast", "true"),))
    with pytest.raises(ConfigError, match="twice"):
        CompilerConfig(tpu=(("xla_a", "1"), ("xla_a", "2")))


@pytest.fixture(scope="module")
def compiler() -> Iterator[None]:
    """One process at a time compiles, without the cache: what is compiled for absent chips cannot be read back."""
    folder = jax.config.jax_compilation_cache_dir
    with (Path(tempfile.gettempdir()) / "mmx-jax-libtpu.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
        yield
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


@pytest.mark.xdist_group("libtpu")
@pytest.mark.tpu_compiler
@pytest.mark.usefixtures("compiler")
class TestCompiler:
    """With the TPU compiler, without a TPU."""

    @pytest.mark.parametrize("text", ["v5e:1x1", "v5e:2x4", "v6e:4x4*2", "v5p:2x2x1", "v5p:4x4x4"])
    def test_devices(self, text: str) -> None:
        """As many as the name says, in as many slices."""
        topology = parse_topology(text)
        devices = topology.devices()
        assert len(devices) == topology.chips
        assert len({getattr(device, "slice_index", 0) for device in devices}) == topology.slices

    def test_every_candidate_uses_all_chips(self) -> None:
        """Meshes on paper: sizes divide, their product is the number of chips, rematerialisation saves memory."""
        found = list(candidates(Target(RUN, parse_topology("v5p:2x2x1"))))
        assert len(found) > 8
        by_mesh: dict[MeshConfig, dict[str, float]] = {}
        for candidate in found:
            assert math.prod(vars(candidate.config.mesh).values()) == 4
            assert candidate.config.mesh.expert in (1, 2, 4)
            by_mesh.setdefault(candidate.config.mesh, {})[candidate.config.stages[0].remat] = candidate.memory
        assert all(memory["layer"] < memory["dots"] < memory["none"] for memory in by_mesh.values())

    def test_a_known_program_is_counted(self) -> None:
        """Five gathers of 128 KiB and five products of [256, 1024] and [1024, 128], in a loop."""
        mesh = make_mesh({"fsdp": 4}, parse_topology("v5p:2x2x1").devices())

        def local(x: jax.Array, w: jax.Array) -> jax.Array:
            def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
                whole = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
                return jnp.tanh(x @ whole), None

            return jax.lax.scan(layer, x, w)[0]

        place = partial(NamedSharding, mesh)
        x = jax.ShapeDtypeStruct((1024, 256), jnp.bfloat16, sharding=place(PartitionSpec("fsdp")))
        w = jax.ShapeDtypeStruct((5, 256, 256), jnp.bfloat16, sharding=place(PartitionSpec(None, "fsdp")))
        specs = (PartitionSpec("fsdp"), PartitionSpec(None, "fsdp"))
        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0])
        text = jax.jit(mapped).lower(x, w).compile().as_text()
        cost = Roofline(CHIPS["v5p"], list(mesh.devices.flat), lambda name: 0.0).cost(hlo.parse(text))
        counts = {kind: value for (kind, _, what), value in cost.collectives.items() if what == "count"}
        received = sum(value for (_, _, what), value in cost.collectives.items() if what == "bytes")
        assert counts == {"all-gather": 5}
        assert received == 5 * 3 * 64 * 256 * 2
        assert cost.flops == 5 * 2 * 256 * 256 * 256
        assert 0 < cost.exposed < cost.seconds

    def test_the_step(self) -> None:
        """Memory by part against a count of the parameters, and the rest of the report against its own rules."""
        report = compile_ahead(Target(RUN, parse_topology("v5p:2x2x1")))
        assert json.loads(json.dumps(report)) == report
        assert report["fits"] is True
        assert (report["chips"], report["mesh"]) == (4, {"fsdp": 2, "expert": 2})
        assert report["tokens_per_chip"] == 8 * 512 // 4
        assert report["flops_per_step"] == training_flops_per_token(MODEL, 512) * 8 * 512
        memory = report["memory_per_chip"]
        whole = sum(spec.size for spec in parameter_spec(MODEL).values()) * 4
        assert whole / 4 <= memory["params"] < whole / 3, "all but norms and routers is split over four chips"
        assert 0 <= memory["moments"] - 2 * memory["params"] < 1024
        assert memory["arguments"] >= memory["params"] + memory["moments"]
        assert memory["total"] <= memory["hbm"] == 95 * 2**30
        assert report["program_flops_per_chip"] > report["flops_per_step"] / 4
        exchanged = report["collectives"]["all-to-all"]
        # Two micro-batches of two layers, each there and back, forward, again, and backward.
        assert exchanged["synchronous"] + exchanged["asynchronous"] >= 2 * 2 * 6
        speed = report["estimate"]
        assert 0 < speed["mfu"] < 1
        assert speed["step_seconds"] >= speed["exposed_collective_seconds"]

    def test_too_large_is_an_answer(self) -> None:
        """More memory than there is: `fits` is false, with the bytes."""
        model = replace(MODEL, layers=("lightning",), num_experts=0)
        stage = replace(STAGE, batch=BatchConfig(micro_batch=1 << 16, ramp=((0, 1 << 16),)), sequence_length=4096)
        run = replace(RUN, model=model, stages=(stage,), mesh=MeshConfig(fsdp=1))
        report = compile_ahead(Target(run, parse_topology("v5e:1x1")))
        assert report["fits"] is False
        assert report["memory_per_chip"]["total"] > report["memory_per_chip"]["hbm"] > 15 * 2**30
