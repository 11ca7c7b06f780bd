"""Scaling measured: the same rows and losses on one device and on several, and what the comparison says of them."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx_jax.config import (
    BatchConfig,
    CompilerConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    SchedulePhase,
    SourceConfig,
    StageConfig,
)
from mmx_jax.config.overrides import load_config
from mmx_jax.training import scaling
from mmx_jax.training.random_rows import random_row
from mmx_jax.training.scaling import Figures, Measurement, Plan, compare, line, text, widened

pytestmark = pytest.mark.xdist_group("parallel")

TINY = RunConfig(
    name="tiny",
    model=ModelConfig(
        vocab_size=64, hidden_size=16, layers=("lightning",), num_heads=2, num_kv_heads=1, head_dim=8, rotary_dim=4,
        ffn_hidden_size=16, compute_dtype="float32",
    ),
    stages=(
        StageConfig(
            sequence_length=32,
            data=DataConfig(sources=(SourceConfig(name="random", store="none"),)),
            batch=BatchConfig(micro_batch=2, ramp=((0, 2),)),
            schedule=ScheduleConfig(phases=(SchedulePhase(until_tokens=1000, learning_rate=1e-2),)),
            loss_chunk=64,
        ),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def measurements() -> dict[str, dict]:
    """One device, and twice the rows on two."""
    found = compare(TINY, ["fsdp"], jax.devices()[:2], Plan(steps=2, documents=3, profile=None))
    return {values["axis"]: values for values in found}


def test_rows_and_losses_are_those_of_one_device(measurements: dict[str, dict]) -> None:
    one, fsdp = measurements["none"], measurements["fsdp"]
    assert [values["tokens_per_step"] for values in (one, fsdp)] == [64, 128]
    assert [values["tokens_per_device"] for values in (one, fsdp)] == [64, 64]
    assert fsdp["loss"] == pytest.approx(fsdp["loss_of_one_device"], rel=1e-5)
    assert fsdp["problems"] == []
    # One device read the same rows in two parts, which differ.
    first, second = one["start"]
    assert first["loss"] != pytest.approx(second["loss"], rel=1e-4)
    assert first["tokens"] + second["tokens"] == fsdp["start"][0]["tokens"] == 4 * (32 - 3)


def test_speed_is_compared_with_one_device(measurements: dict[str, dict]) -> None:
    one, fsdp = measurements["none"], measurements["fsdp"]
    assert one["efficiency"] == 1
    assert len(fsdp["step_seconds"]) == 2
    assert fsdp["efficiency"] == pytest.approx(one["seconds"] / fsdp["seconds"])  # twice the rows on twice the devices
    assert fsdp["losses"][1] != fsdp["losses"][0]
    assert fsdp["program_bytes"] > 0
    assert "fsdp" in text(fsdp)


def _made(**changes: object) -> Measurement:
    made = Measurement(axis="fsdp", devices=2, sequences=4, sequence_length=32, compile_seconds=1.0, program_bytes=1)
    return replace(made, step_seconds=(3.0, 1.5, 0.0), **changes)


def test_other_losses_and_lost_rows_are_problems() -> None:
    one = _made(devices=1, sequences=2, start=(Figures(2.0, 10.0, 1.0, 0.0), Figures(4.0, 30.0, 1.0, 0.0)))
    right = line(TINY, one, _made(start=(Figures(3.5, 40.0, 1.0, 0.0),)))
    assert (right["loss_of_one_device"], right["problems"]) == (3.5, [])
    assert (right["seconds"], right["tokens_per_second"], right["efficiency"]) == (1.5, 4 * 32 / 1.5, 1)
    wrong = line(TINY, one, _made(start=(Figures(3.51, 40.0, 1.0, 0.25),)))
    assert line(TINY, one, _made(start=(Figures(float("nan"), 40.0, 1.0, 0.0),)))["problems"]
    assert wrong["problems"] == ["loss 3.510000, on one device 3.500000", "25.00% of routed rows lost"]
    assert text(wrong).count("WRONG") == 2
    assert "FAILED: out of memory" in text({"axis": "expert", "error": "out of memory\nat 0x0"})


@settings(max_examples=30)
@given(st.integers(2, 60), st.data())
def test_random_rows_are_packed_documents(length: int, data: st.DataObject) -> None:
    """INV-36's input: ids count from 1, positions from 0, a target is the next token of its document."""
    documents = data.draw(st.integers(1, min(length, 6)))
    row = random_row((0, data.draw(st.integers(0, 99))), length, 50, documents)
    assert row["segment_ids"].max() == documents
    for t in range(length):
        first = t == 0 or row["segment_ids"][t] != row["segment_ids"][t - 1]
        assert row["segment_ids"][t] == (1 if t == 0 else row["segment_ids"][t - 1] + first)
        assert row["positions"][t] == (0 if first else row["positions"][t - 1] + 1)
        inside = t + 1 < length and row["segment_ids"][t + 1] == row["segment_ids"][t]
        assert row["loss_mask"][t] == inside
        assert row["targets"][t] == (row["tokens"][t + 1] if inside else 0)


def test_fresh_rows_differ() -> None:
    first, second = (random_row((0, row), 100, 1000, 1)["tokens"] for row in (0, 1))
    assert (first == second).mean() < 0.1
    assert np.array_equal(first, random_row((0, 0), 100, 1000, 1)["tokens"])


def test_the_batch_grows_with_the_axes_that_split_it() -> None:
    config = load_config("configs/two_gpus.py")
    for axis, tokens in (("fsdp", 2), ("expert", 2), ("sequence", 1), ("tensor", 1)):
        wide = widened(config, axis, 2)
        assert wide.stages[0].batch.micro_batch * wide.stages[0].sequence_length == tokens * 131_072
        assert getattr(wide.mesh, axis) == 2
    with pytest.raises(ConfigError, match="no mesh axis 'pipeline'"):
        widened(config, "pipeline", 2)


def test_flags_are_checked_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No axis to measure, and a report that could not be written after minutes of measuring."""
    given = {"_AXES": ["fsdp"], "_DEVICES": 2, "_STEPS": 1, "_DOCUMENTS": 1, "_PROFILE": None, "_JSON": None}
    for flag, value, message in (
        ("_AXES", [], "--axes: names at least one of data, fsdp"),
        ("_JSON", "no/such/folder/rows.json", "--json no/such/folder/rows.json: its folder does not exist"),
    ):
        for name, usual in given.items():
            monkeypatch.setattr(scaling, name, SimpleNamespace(value=value if name == flag else usual))
        with pytest.raises(SystemExit, match="2"):
            scaling.main(TINY)
        assert message in capsys.readouterr().err


def test_options_of_the_compiler_belong_to_a_platform() -> None:
    compiler = CompilerConfig(gpu=(("xla_gpu_enable_latency_hiding_scheduler", "true"),))
    assert compiler.options("gpu") == {"xla_gpu_enable_latency_hiding_scheduler": True}
    assert compiler.options("cpu") is None
    with pytest.raises(ConfigError, match="gpu"):
        CompilerConfig(gpu=(("enable_latency_hiding_scheduler", "true"),))
    with pytest.raises(ConfigError, match="twice"):
        CompilerConfig(gpu=(("xla_gpu_enable_latency_hiding_scheduler", "true"),) * 2)
