"""Slices that exist, and the step compiled for one that is not there."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
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
from mmx_jax.training import ahead, ahead_plot
from mmx_jax.training.ahead import Target, compile_ahead, does_not_fit
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
        ("v5p:2x2x1*999999999", ["at most 64"]),
        ("h100:8*2", ["one host"]),
        ("h100:3", ["2, 4, 8"]),
    ],
)
def test_other_slices_are_refused(text: str, named: list[str]) -> None:
    """The message names what is near."""
    with pytest.raises(TopologyError) as refusal:
        parse_topology(text)
    for part in named:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--compile_only", "--topology=v5p:3x3x3"], "2x4x4"),
        (["--compile_only", "--topology="], "kind:shape"),
        (["--compile_only", "--search"], "--topology"),
        (["--search"], "--search goes with --compile_only"),
        (["--search_compiles=2"], "--search_compiles goes with --compile_only"),
        (["--compile_only", "--topology=h100:4", "--search_compiles=2"], "--search_compiles goes with --search"),
        (["--topology=v5p:2x2x1"], "--topology goes with --compile_only"),
        (["--compile_only", "--topology=h100:4", "--config.mesh.expert=3"], "4 devices are no multiple of 3"),
        (["--compile_only", "--topology=h100:8", "--config.stages.0.batch.micro_batch=4"], "does not divide by the 8"),
    ],
)
def test_the_command_line_refuses(given: list[str], named: str) -> None:
    """One line and exit code 2: a slice that does not exist or none, flags that would do nothing, sizes."""
    command = [sys.executable, "train.py", "--config", "configs/research_20m.py", *given]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2, ended.stderr
    assert named in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_the_picture_of_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drawn and tabled from the lines; a line that is none is refused by its number."""
    memory = {"params": 1, "moments": 2, "arguments": 4, "gradients": 1, "other_temporaries": 5, "program": 1}
    report = {
        "config": "tiny", "topology": "v5p:2x2x1", "chips": 4, "mesh": {"fsdp": 4}, "remat": "layer",
        "sequences_per_step": 8, "sequence_length": 512, "memory_per_chip": memory | {"hbm": 16, "total": 11},
        "lower_seconds": 1.0, "compile_seconds": 2.0, "host_peak_bytes": 10**9,
        "estimate": {"mfu": 0.5, "step_seconds": 2.0, "exposed_collective_seconds": 1.0, "slower_matmul": {"mfu": 0.4}},
    }  # fmt: skip
    lines, picture = tmp_path / "reports.jsonl", tmp_path / "memory.png"
    passed_over = [{"fits": False, "refused": "ShardingError: no"}, {"ranking": []}]  # a search prints such lines too
    lines.write_text("".join(json.dumps(line) + "\n" for line in (report, *passed_over)))
    ahead_plot.main(["plot", str(lines), str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (
        "| fsdp 4 | layer | 8 x 512 | 0.0 of 0 | 0.500, 0.400 | 2.00, 1.00 | 3 s | 1.0 GB |" in capsys.readouterr().out
    )
    del memory["params"]
    with lines.open("a") as file:
        file.write(json.dumps(report | {"memory_per_chip": memory}) + "\n")
    with pytest.raises(SystemExit) as end:
        ahead_plot.main(["plot", str(lines), str(picture)])
    assert end.value.code == 2
    assert "line 4" in capsys.readouterr().err


SLICES = """
HloModule two_slices

ENTRY %main (rows: bf16[8,64]) -> bf16[2,8,64] {
  %rows = bf16[8,64]{1,0} parameter(0)
  %token = token[] after-all()
  %send = (bf16[8,64]{1,0}, u32[], token[]) send(%rows, %token), channel_id=1, is_host_transfer=true
  %recv = (bf16[2,8,64]{2,1,0}, u32[], token[]) recv(%token), channel_id=2, KIND
  %double = bf16[8,64]{1,0} add(%rows, %rows)
  %sent = token[] send-done(%send), channel_id=1
  %arrived = (bf16[2,8,64]{2,1,0}, token[]) recv-done(%recv), channel_id=2
  ROOT %out = bf16[2,8,64]{2,1,0} get-tuple-element(%arrived), index=0
}
"""


FUSED = """
HloModule slices_of_a_long_array

%inner (long: f32[4096,128], at: s32[]) -> f32[8,128] {
  %long = f32[4096,128]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %cut = f32[8,128]{1,0} dynamic-slice(%long, %at, %zero), dynamic_slice_sizes={8,128}
}

%outer (keys: f32[4096,128], place: s32[]) -> f32[8,128] {
  %keys = f32[4096,128]{1,0} parameter(0)
  %place = s32[] parameter(1)
  %part = f32[8,128]{1,0} fusion(%keys, %place), kind=kLoop, calls=%inner
  ROOT %twice = f32[8,128]{1,0} add(%part, %part)
}

ENTRY %main (a: f32[4096,128], i: s32[]) -> f32[8,128] {
  %a = f32[4096,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %out = f32[8,128]{1,0} fusion(%a, %i), kind=kOutput, calls=%outer
}
"""


def test_a_slice_cut_inside_a_fusion_is_read_as_a_slice() -> None:
    """8 of 4,096 rows are read and 8 are written, however deep the fusion that cuts them."""
    cost = Roofline(CHIPS["v5p"], [], lambda item, shapes: 0.0).cost(hlo.parse(FUSED))
    assert cost.memory_bytes == pytest.approx(2 * 8 * 128 * 4, abs=8)


RAGGED = """
ENTRY %main (rows: bf16[64,256], weights: bf16[4,256,128], g: s32[4]) -> f32[64,128] {
  %rows = bf16[64,256]{1,0} parameter(0)
  %weights = bf16[4,256,128]{2,1,0} parameter(1)
  %g = s32[4]{0} parameter(2)
  %ragged-dot-metadata = s32[17]{0} custom-call(%g), metadata={op_name="ragged-dot-metadata"}
  ROOT %ragged-dot-none.1 = f32[64,128]{1,0} custom-call(%ragged-dot-metadata, /*index=1*/%rows, %weights), metadata={op_name="ragged-dot-none"}
}
"""  # noqa: E501


def test_grouped_products_without_their_scope_are_counted() -> None:
    """libtpu makes kernels of XLA's grouped products, some of which bear no name of ours: 64 rows by [256, 128]."""
    main = hlo.parse(RAGGED).computations["main"]
    mesh = make_mesh({"fsdp": 4}, jax.devices()[:4])
    flops = ahead._kernel_flops(Target(RUN, parse_topology("v5p:2x2x1")), mesh)
    assert flops(main.by_name["ragged-dot-none.1"], main.operand_shapes(main.by_name["ragged-dot-none.1"])) == (
        2 * 64 * 256 * 128
    )
    assert flops(main.by_name["ragged-dot-metadata"], main.operand_shapes(main.by_name["ragged-dot-metadata"])) == 0


SCOPE = 'metadata={op_name="jit(step)/expert_matmul/kernel"}'
MOSAIC = f"""
ENTRY %main (dy: bf16[64,128], weights: bf16[1024,128], x: bf16[64,256], n: s32[1]) -> bf16[1024,128] {{
  %dy = bf16[64,128]{{1,0}} parameter(0)
  %weights = bf16[1024,128]{{1,0}} parameter(1)
  %x = bf16[64,256]{{1,0}} parameter(2)
  %n = s32[1]{{0}} parameter(3)
  %dx = (bf16[64,256]{{1,0}}, bf16[80,256]{{1,0}}) custom-call(%dy, %weights, %n), {SCOPE}
  ROOT %dw = bf16[1024,128]{{1,0}} custom-call(%x, %dy, %n), {SCOPE}
}}
"""


@pytest.mark.parametrize("name", ["dx", "dw"])
def test_grouped_gradients_are_counted_with_their_own_widths(name: str) -> None:
    """64 rows by four matrices [256, 128] whichever way: the rows' gradient is wider than what it is made of."""
    main = hlo.parse(MOSAIC).computations["main"]
    mesh = make_mesh({"fsdp": 4}, jax.devices()[:4])
    flops = ahead._kernel_flops(Target(RUN, parse_topology("h100:4")), mesh)
    assert flops(main.by_name[name], main.operand_shapes(main.by_name[name])) == 2 * 64 * 256 * 128


SCATTER = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %b = f32[] parameter(1)
}
%fused (y: f32[4096,128], rows: s32[8,1], x: f32[8,128]) -> f32[4096,128] {
  %y = f32[4096,128]{1,0} parameter(0)
  %rows = s32[8,1]{1,0} parameter(1)
  %x = f32[8,128]{1,0} parameter(2)
  ROOT %s = f32[4096,128]{1,0} scatter(%y, %rows, %x), to_apply=%add
}
ENTRY %main (y: f32[4096,128], rows: s32[8,1], x: f32[8,128]) -> f32[4096,128] {
  %y = f32[4096,128]{1,0} parameter(0)
  %rows = s32[8,1]{1,0} parameter(1)
  %x = f32[8,128]{1,0} parameter(2)
  ROOT %f = f32[4096,128]{1,0} BODY
}
"""


@pytest.mark.parametrize(
    "body", ["fusion(%y, %rows, %x), kind=kInput, calls=%fused", "scatter(%y, %rows, %x), to_apply=%add"]
)
def test_rows_written_in_place_count_as_rows(body: str) -> None:
    """8 of 4,096 rows are read and 8 are written."""
    cost = Roofline(CHIPS["h100"], [], lambda item, shapes: 0.0).cost(hlo.parse(SCATTER.replace("BODY", body)))
    assert cost.memory_bytes == pytest.approx(2 * 8 * 128 * 4, abs=8 * 4)


@pytest.mark.xdist_group("libtpu")
@pytest.mark.usefixtures("compiler")
class TestGpus:
    """With the GPU compiler, without a GPU."""

    def test_devices(self) -> None:
        """As many as the name says, of the kind meant."""
        devices = parse_topology("h100:8").devices()
        assert [device.device_kind for device in devices] == ["NVIDIA H100 80GB HBM3"] * 8

    def test_a_gather_is_counted(self) -> None:
        """Four devices behind one switch: three quarters of an array arrive, over all links of a device."""
        mesh = make_mesh({"fsdp": 4}, parse_topology("h100:4").devices())
        w = jax.ShapeDtypeStruct((4096, 1024), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
        whole = NamedSharding(mesh, PartitionSpec())
        text = jax.jit(lambda w: w, out_shardings=whole).lower(w).compile().as_text()
        cost = Roofline(CHIPS["h100"], list(mesh.devices.flat), lambda item, shapes: 0.0).cost(hlo.parse(text))
        sums = {what: value for (kind, _, what), value in cost.collectives.items() if kind == "all-gather"}
        assert (sums["count"], sums["bytes"]) == (1, 3 * 1024 * 1024 * 4)
        assert sums["seconds"] == pytest.approx(3 * 1024 * 1024 * 4 / 450e9)

    def test_the_step(self) -> None:
        """The step of a small model, our kernels included where they support it."""
        report = compile_ahead(Target(RUN, parse_topology("h100:4")))
        memory = report["memory_per_chip"]
        assert report["fits"] is True
        assert memory["total"] >= memory["arguments"] + memory["gradients"] + memory["other_temporaries"]
        assert memory["hbm"] == 80 * 10**9
        assert report["program_flops_per_chip"] > report["flops_per_step"] / 4
        assert "all-to-all" in report["collectives"]
        speed = report["estimate"]
        assert 0 < speed["slower_matmul"]["mfu"] <= speed["mfu"] < 1
        assert speed["dearest_branches"]["mfu"] < speed["mfu"], "further rounds may run"


def test_compiler_options_are_checked() -> None:
    """An option that cannot be XLA's, and one given twice."""
    with pytest.raises(ConfigError, match="xla_"):
        CompilerConfig(tpu=(("fast", "true"),))
    with pytest.raises(ConfigError, match="twice"):
        CompilerConfig(tpu=(("xla_a", "1"), ("xla_a", "2")))


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

    def test_what_crosses_slices_is_counted(self) -> None:
        """The compiler makes a `recv` of it, beside a collective in each slice; half of what it brings is one's own."""
        text = SLICES.replace("KIND", 'frontend_attributes={_xla_megascale_transfer_type="ALL_GATHER"}')
        devices = parse_topology("v6e:4x4*2").devices()
        cost = Roofline(CHIPS["v6e"], devices, lambda item, shapes: 0.0).cost(hlo.parse(text))
        found = {what: value for (kind, _, what), value in cost.collectives.items() if kind.endswith("between slices")}
        assert found["count"] == 1
        assert found["bytes"] == pytest.approx(8 * 64 * 2, abs=4)
        assert found["seconds"] == pytest.approx(found["bytes"] / 12.5e9)
        assert 0 < found["exposed_seconds"] < found["seconds"], "the sum of rows runs meanwhile"

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
        cost = Roofline(CHIPS["v5p"], list(mesh.devices.flat), lambda item, shapes: 0.0).cost(hlo.parse(text))
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
        assert "tiny does not fit on v5e:1x1" in str(does_not_fit(report))
