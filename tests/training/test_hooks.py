"""Hooks alone, with a session that has only what they look at; and how the program ends when nothing was trained."""

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import mmx_jax.training.session as session_module
from mmx_jax.checkpoint import CheckpointStore
from mmx_jax.checkpoint.store import steps_on_disk
from mmx_jax.training.checkpoints import Checkpoints, StopSignal
from mmx_jax.training.errors import NonFiniteError
from mmx_jax.training.hooks import NonFinite, Profile, read_lines
from mmx_jax.training.progress import Progress
from mmx_jax.training.session import Session
from mmx_jax.training.state import TrainState

ROOT = Path(__file__).parents[2]


def _session(step: int = 0, skipped_in_a_row: int = 0) -> Session:
    session = object.__new__(Session)
    session.progress = Progress(stage="a", step=step, update=step, skipped_in_a_row=skipped_in_a_row)
    session.stage, session.state = SimpleNamespace(name="a"), TrainState({}, {})
    return session


@pytest.mark.parametrize(
    ("steps", "resumed_at", "traced"), [((1, 3), 0, [1, 2, 3]), ((2, 2), 0, [2]), ((1, 4), 2, [3, 4]), ((1, 2), 2, [])]
)
def test_a_profile_holds_the_steps_that_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: tuple[int, int], resumed_at: int, traced: list[int]
) -> None:
    """From the first step of a run on; a run that resumes among them takes what is left."""
    tracing, found = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", tracing.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", tracing.clear)
    profile = Profile(tmp_path, steps)
    profile.start(_session(resumed_at))
    for step in range(resumed_at + 1, 6):
        found += [step] if tracing else []
        profile.update(_session(step))
    profile.close()
    assert found == traced
    assert not tracing


def test_damaged_lines_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is no record costs that line, not the run; only the end that a kill cut off goes without saying."""
    good = [b'{"update": 1}', b'{"update": 2, "source": "\xe2\x80\xa8"}', b'{"update": 9}']
    bad = [b"\xff\xfe", b"7", b"[]", b"{}", b'{"update": "1"}', b""]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([good[0], *bad, *good[1:], b'{"upda']))
    with caplog.at_level(logging.WARNING):
        assert [record["update"] for record in read_lines(path, 5)] == [1, 2]
    assert [record.args[1] for record in caplog.records] == [2, 3, 4, 5, 6, 7]


def test_a_stage_that_mostly_skipped_does_not_end_well(caplog: pytest.LogCaptureFixture) -> None:
    hook = NonFinite()
    hook.finish(_session(step=8, skipped_in_a_row=0))
    assert not caplog.records
    hook.finish(_session(step=8, skipped_in_a_row=2))
    assert "last 2 updates were not finite" in caplog.text
    with pytest.raises(NonFiniteError, match="not finite in its last 5 of 8 updates"):
        hook.finish(_session(step=8, skipped_in_a_row=5))


def test_held_out_text_must_have_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that makes NaN of held-out text ends its run, before any figure is written."""
    scored = SimpleNamespace(groups={"all": {"loss": float("nan")}})
    task = SimpleNamespace(from_config=lambda config, stage: SimpleNamespace(run=lambda model: scored))
    monkeypatch.setattr(session_module, "HeldOut", task)
    monkeypatch.setattr(session_module, "EvalModel", lambda model, params: None)
    session = _session(step=8)
    session.config = session.model = None
    session.hooks = [object()]  # (would be told)
    with pytest.raises(NonFiniteError, match="after step 8: the loss of the held-out text is nan"):
        session.evaluate()


@pytest.mark.parametrize("where", ["params", "optimizer"])
def test_a_state_that_is_not_finite_is_never_saved(where: str, tmp_path: Path) -> None:
    """One infinite moment or parameter is enough."""
    session = _session(step=4)
    leaves = {"params": jnp.ones(3), "optimizer": jnp.ones(3)} | {where: jnp.array([1.0, jnp.inf, 1.0])}
    session.state = TrainState({"head": leaves["params"]}, {"count": jnp.int32(4), "mu": leaves["optimizer"]})
    hook = Checkpoints(CheckpointStore(tmp_path), every=1, stop=StopSignal())
    with pytest.raises(NonFiniteError, match="step 4: parameters or moments are not finite; nothing was saved"):
        hook.finish(session)
    assert not steps_on_disk(tmp_path)


def test_ctrl_c_before_training_ends_with_code_75(tmp_path: Path) -> None:
    """No traceback: the documented code, and what the same command will do."""
    program = (
        "import sys, train\n"
        "import mmx_jax.training.run as module\n"
        "def interrupted(config):\n"
        "    raise KeyboardInterrupt\n"
        "module.run = interrupted\n"
        "train.run_with_config(train.run)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--config", "configs/research_20m.py", "--workdir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert "the same command goes on" in done.stderr
    assert "Traceback" not in done.stderr
