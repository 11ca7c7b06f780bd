"""Command lines: what they can say, and how they refuse what they cannot."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmx_jax.config import (
    BatchConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    SchedulePhase,
    SourceConfig,
    StageConfig,
    first_difference,
    from_dict,
    hybrid_layers,
    to_dict,
)
from mmx_jax.config.overrides import apply_overrides, load_config, split_overrides

CONFIG = RunConfig(
    name="tiny",
    model=ModelConfig(
        vocab_size=300, hidden_size=16, layers=hybrid_layers(8), num_heads=4, num_kv_heads=2, head_dim=8, rotary_dim=4,
        ffn_hidden_size=32, num_experts=4,
    ),
    stages=(
        StageConfig(
            sequence_length=64,
            data=DataConfig(sources=(SourceConfig(name="a", store="a"), SourceConfig(name="b", store="b"))),
            batch=BatchConfig(micro_batch=8, ramp=((0, 8),)),
            schedule=ScheduleConfig(phases=(SchedulePhase(until_tokens=1000, learning_rate=1e-3),)),
        ),
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("seed", "7", 7),
        ("seed", "1_000", 1000),
        ("stages.0.schedule.phases.0.until_tokens", "1e6", 1_000_000),
        ("stages.0.schedule.phases.0.learning_rate", "3e-4", 3e-4),
        ("stages.0.schedule.phases.0.learning_rate", "1", 1.0),
        ("stages.0.sequence_length", "512", 512),
        ("stages.0.data.sources.1.name", "12", "12"),
        ("model.capacity_factor", "1.25", 1.25),
        ("stages.0.optimizer.clip_norm", "None", None),
        ("report.baselines", "true", True),
        ("report.baselines", "False", False),
        ("workdir", "runs/x=y", "runs/x=y"),
        ("workdir", "none", None),
        ("logging.profile_steps", "(3, 5)", (3, 5)),
        ("logging.profile_steps", "3,5", (3, 5)),
        ("stages.0.batch.ramp", "((0, 8), (64, 16))", ((0, 8), (64, 16))),
        ("stages.0.data.sources.0.weight", "((0, 1), (10, 2.5))", ((0, 1.0), (10, 2.5))),
        ("model.layers", "softmax,lightning", ("softmax", "lightning")),
        ("report.prompts", "('def f(a, b):', 'x')", ("def f(a, b):", "x")),
        ("report.prompts", "'hello, world'", ("hello, world",)),
    ],
)
def test_a_field_takes_a_value_of_its_type(path: str, text: str, value: object) -> None:
    changed = apply_overrides(CONFIG, {path: text})
    found = changed
    for name in path.split("."):
        found = found[int(name)] if name.isdecimal() else getattr(found, name)
    assert found == value
    assert type(found) is type(value)
    key, _, _ = first_difference(to_dict(CONFIG), to_dict(changed)) or (path, 0, 0)
    assert key.startswith(path), "nothing else may change"


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("modle.vocab_size", "1", ["RunConfig has no field 'modle'", "Did you mean 'model'?", "stages"]),
        ("model.num_head", "1", ["ModelConfig", "'num_head'", "Did you mean 'num_heads'?", "ffn_hidden_size"]),
        ("seed", "abc", ["--config.seed = 'abc'", "must be int"]),
        ("seed", "1.5", ["--config.seed = 1.5", "must be int"]),
        ("report.baselines", "1", ["--config.report.baselines = 1", "must be bool"]),
        ("stages.0.sequence_length", "-1", ["--config.stages.0.sequence_length", "must be at least 1"]),
        ("stages.3.name", "x", ["--config.stages.3", "places 0 to 0"]),
        ("stages.name", "x", ["--config.stages.name", "no such place"]),
        ("model", "x", ["--config.model", "set its fields"]),
        ("seed.x", "1", ["config.seed = 0 has no fields"]),
        ("logging.profile_steps", "(1, 2, 3)", ["must have 2 entries"]),
        ("stages.0.optimizer.moment_dtype", "float8", ["must be one of 'float32', 'bfloat16'"]),
        ("stages.0.schedule.phases.0.learning_rate", "1e999", ["learning_rate = inf", "finite"]),
        ("stages.0.schedule.phases.0.learning_rate", "1e39", ["learning_rate = 1e+39", "finite in fp32"]),
        ("stages.0.schedule.phases.0.learning_rate", "-1", ["learning_rate = -1.0", "greater than 0"]),
        ("stages.0.optimizer.eps", "0", ["eps = 0.0", "greater than 0"]),
        ("stages.0.optimizer.eps", "1e-50", ["eps = 1e-50", "in fp32"]),
        ("stages.0.optimizer.clip_norm", "0", ["clip_norm = 0.0", "greater than 0"]),
        ("stages.0.optimizer.weight_decay", "1e999", ["weight_decay = inf", "finite"]),
        ("stages.0.rope_base", "1", ["rope_base = 1.0", "greater than 1"]),
        ("stages.0.data.seed", "4294967296", ["DataConfig.seed", "from 0 to 4294967295"]),
        ("stages.0.data.sources.0.weight", "((0, 1e999),)", ["weight", "finite"]),
        ("seed", "99999999999999999999", ["RunConfig.seed", "from 0 to 4294967295"]),
        ("seed", "-1", ["RunConfig.seed", "from 0 to 4294967295"]),
        ("model.norm_eps", "-1", ["norm_eps = -1.0", "greater than 0"]),
        ("model.lightning_norm_eps", "0", ["lightning_norm_eps = 0.0", "greater than 0"]),
        ("model.init_gain", "-1", ["init_gain = -1.0", "greater than 0"]),
        ("model.lightning_alpha", "0", ["lightning_alpha = 0.0", "greater than 0"]),
        ("model.ffn_beta", "-1", ["ffn_beta = -1.0", "at least 0"]),
        ("model.rope_base", "1e999", ["rope_base = inf", "finite"]),
        ("model.capacity_factor", "1e999", ["capacity_factor = inf", "finite"]),
        ("logging.profile_steps", "(9, 2)", ["profile_steps = (9, 2)", "first <= last"]),
        ("logging.profile_steps", "(0, 2)", ["profile_steps = (0, 2)", "1 <= first"]),
        ("report.max_new_tokens", "0", ["max_new_tokens = 0", "must be at least 1"]),
        ("report.next_commands", "('see {folder}',)", ["next_commands", "only {workdir} may stand in braces"]),
    ],
)
def test_a_wrong_override_names_the_key_and_what_is_right(path: str, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        apply_overrides(CONFIG, {path: text})
    for word in words:
        assert word in str(error.value)


def test_fields_that_depend_on_each_other_change_together() -> None:
    changed = apply_overrides(CONFIG, {"model.num_heads": "9", "model.num_kv_heads": "3"})
    assert (changed.model.num_heads, changed.model.num_kv_heads) == (9, 3)


def test_sources_that_all_weigh_nothing_are_refused() -> None:
    weights = {f"stages.0.data.sources.{number}.weight": "((0, 0), (9, 0))" for number in (0, 1)}
    with pytest.raises(ConfigError, match="every weight is 0"):
        apply_overrides(CONFIG, weights)
    assert apply_overrides(CONFIG, dict([weights.popitem()])).stages[0].data.sources[1].weight == ((0, 0.0), (9, 0.0))


def test_a_stage_from_another_run_takes_its_parameters() -> None:
    """Keeping the counters of a run without its parameters says nothing that could be done."""
    with pytest.raises(ConfigError, match=r"keep = \('step', 'data'\): must hold 'params': init_from = 'runs/a'"):
        replace(CONFIG.stages[0], init_from="runs/a", keep=("step", "data"))


def test_both_spellings_leave_the_other_arguments_alone() -> None:
    argv = ["train.py", "--config", "c.py", "--config.seed", "-3", "--workdir=w", "--config.name=a=b", "--verbosity=1"]
    assert split_overrides(argv) == (
        ["train.py", "--config", "c.py", "--workdir=w", "--verbosity=1"],
        {"seed": "-3", "name": "a=b"},
    )
    with pytest.raises(ConfigError, match="needs a value"):
        split_overrides(["--config.seed", "--workdir=w"])


def test_a_configuration_survives_json() -> None:
    assert from_dict(json.loads(json.dumps(to_dict(CONFIG)))) == CONFIG


@given(st.data())
def test_json_is_strict(data: st.DataObject) -> None:
    """A key that does not exist or a value of another type is refused wherever it stands."""
    plain = json.loads(json.dumps(to_dict(CONFIG)))
    node, where = plain, []
    while isinstance(node, dict):
        where.append(data.draw(st.sampled_from(sorted(node))))
        if not isinstance(node[where[-1]], dict):
            break
        node = node[where[-1]]
    if data.draw(st.booleans()):
        node["no_such_key"] = 1
        with pytest.raises(ConfigError, match="no_such_key"):
            from_dict(plain)
    else:
        node[where[-1]] = {"of": "another type"}
        with pytest.raises(ConfigError, match=where[-1]):
            from_dict(plain)


def test_a_missing_required_key_is_named() -> None:
    plain = to_dict(CONFIG)
    del plain["model"]["vocab_size"]
    with pytest.raises(ConfigError, match=r"model: ModelConfig needs a value for 'vocab_size'"):
        from_dict(plain)


def test_the_first_difference_is_named() -> None:
    other = replace(CONFIG, model=replace(CONFIG.model, layers=hybrid_layers(7)), seed=3)
    assert first_difference(to_dict(CONFIG), to_dict(other))[0] == "model.layers"
    assert first_difference(to_dict(CONFIG), to_dict(CONFIG)) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import nothing_like_this\n", ["bad.py:1", "ModuleNotFoundError", "nothing_like_this"]),
        ("def get_config(:\n", ["bad.py", "SyntaxError"]),
        ("x = 1\n", ["bad.py", "get_config"]),
        ("def get_config():\n    return 1\n", ["bad.py", "must return a RunConfig, got int"]),
        ("def get_config():\n    return 1\n", ["takes no argument"]),
        (None, ["bad.py", "no such file"]),
    ],
)
def test_a_config_file_that_cannot_be_used_is_named(tmp_path: Path, text: str | None, words: list[str]) -> None:
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(f"{path}:argument" if "takes no argument" in words else str(path))
    for word in words:
        assert word in str(error.value)


def test_the_program_ends_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    program = "import sys; from mmx_jax.config.overrides import run_with_config; run_with_config(lambda config: 0)"
    for arguments, message in (
        ([], "--config is missing"),
        (["--config", str(tmp_path / "none.py")], "no such file"),
        (["--config", str(Path(__file__).parents[2] / "configs/research_20m.py"), "--config.sed=1"], "mean 'seed'?"),
        (["--config", str(Path(__file__).parents[2] / "configs/research_20m.py"), "--config.seed"], "needs a value"),
        (["--confgi", "x"], "Unknown command line flag 'confgi'"),
    ):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_every_program_ends_with_code_2_for_a_flag_that_nobody_knows() -> None:
    programs = (["eval.py"], ["-m", "mmx_jax.inference.generate"], ["-m", "mmx_jax.checkpoint"])
    running = [
        subprocess.Popen(
            [sys.executable, *program, "--chekpoint", "x"],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for program in programs
    ]
    for process in running:
        _, said = process.communicate()
        assert process.returncode == 2, said
        assert "error: Unknown command line flag 'chekpoint'" in said
        assert "Traceback" not in said
