"""The search for a mesh: on paper against compiled steps, what is compiled in which order, and what is printed when."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.context import SpawnProcess
from typing import Any

import psutil
import pytest
from jax.sharding import Mesh

from mmx_jax.config import BatchConfig, ConfigError, MeshConfig, RunConfig
from mmx_jax.config.overrides import apply_overrides, load_config, split_overrides
from mmx_jax.model import parameter_spec
from mmx_jax.training import search as searching
from mmx_jax.training.ahead import Target, mesh_sizes, with_mesh
from mmx_jax.training.paper import Candidate, state_bytes, weigh
from mmx_jax.training.search import candidates, compile_apart, search
from parallel.mesh import MeshError
from parallel.topology import parse_topology
from tests.parallel.test_topology import MODEL, ROOT, RUN, STAGE

COMPILED = [json.loads(line) for line in (ROOT / "docs/data/ahead_of_time.jsonl").read_text().splitlines()]
KINDS = {
    "v5p:16x16x16": ":v5p_4096", "v5p:8x16x16": ":v5p_2048", "v5p:4x4x8": ":v5p_128", "v5p:8x8x16": ":context_1m",
    "v6e:16x16*2": ":v6e_512",
}  # fmt: skip
BATCH = BatchConfig(micro_batch=4, ramp=((0, 8), (10_000, 16)))
TARGET = Target(replace(RUN, stages=(replace(STAGE, batch=BATCH),)), parse_topology("v5p:2x2x1"))


@pytest.mark.parametrize("line", COMPILED, ids=lambda line: line["topology"])
def test_paper_agrees_with_what_was_compiled(line: dict[str, Any]) -> None:
    """Memory and time of every configuration in docs/scaling.md, by the target's own compiler: within 20% and 25%."""
    file = ROOT / "configs" / f"{line['config']}.py"
    config = load_config(f"{file}{KINDS.get(line['topology'], '')}")
    sizes = dict.fromkeys(("data", "fsdp", "expert", "sequence", "tensor"), 1) | line["mesh"]
    target = Target(with_mesh(config, sizes, line["remat"]), parse_topology(line["topology"]))
    found = weigh(target, state_bytes(target))
    assert found.memory["params"] == line["memory_per_chip"]["params"]
    assert found.memory["moments"] == line["memory_per_chip"]["moments"]
    assert found.bytes == pytest.approx(line["memory_per_chip"]["total"], rel=0.2)
    assert found.seconds == pytest.approx(line["estimate"]["step_seconds"], rel=0.25)


def test_every_candidate_uses_all_chips() -> None:
    """Meshes on paper: all chips are used, sizes divide, rematerialisation saves memory."""
    found = list(candidates(TARGET))
    by_mesh: dict[tuple[MeshConfig, int], dict[str, Candidate]] = {}
    whole = sum(spec.size for spec in parameter_spec(MODEL).values()) * 4
    for candidate in found:
        sizes, stage = mesh_sizes(candidate.config.mesh), candidate.config.stages[0]
        assert math.prod(sizes.values()) == 4
        assert sizes["expert"] in (1, 2, 4)
        assert all(sequences % stage.batch.micro_batch == 0 for _, sequences in stage.batch.ramp)
        assert stage.batch.micro_batch % (sizes["fsdp"] * sizes["expert"]) == 0
        assert whole / 4 <= candidate.memory["params"] <= whole
        by_mesh.setdefault((candidate.config.mesh, stage.batch.micro_batch), {})[stage.remat] = candidate
    assert {micro_batch for _, micro_batch in by_mesh} == {1, 2, 4, 8}
    assert len({mesh for mesh, _ in by_mesh}) > 8
    for policies in by_mesh.values():
        sizes = [policies[remat].bytes for remat in ("layer", "dots", "experts", "none")]
        assert sizes == sorted(set(sizes)), "MODEL has experts: each keeps more"


def test_recomputation_costs_time_where_matrix_products_rule() -> None:
    """The large model: what "layer" computes again costs more than what "dots" reads back."""
    config = load_config(str(ROOT / "configs/minimax_text_01.py"))
    found = {}
    for remat in ("dots", "layer"):
        sizes = {"data": 1, "fsdp": 64, "expert": 32, "sequence": 2, "tensor": 1}
        target = Target(with_mesh(config, sizes, remat), parse_topology("v5p:16x16x16"))
        found[remat] = weigh(target, state_bytes(target))
    assert found["layer"].computing > 1.05 * found["dots"].computing
    assert found["layer"].bytes < 0.5 * found["dots"].bytes


def test_larger_micro_batches_need_more_and_gather_less() -> None:
    by_size = {
        candidate.config.stages[0].batch.micro_batch: candidate
        for candidate in candidates(TARGET)
        if candidate.config.mesh == MeshConfig(fsdp=4) and candidate.config.stages[0].remat == "layer"
    }
    assert sorted(by_size) == [4, 8]
    assert by_size[4].exposed > by_size[8].exposed
    assert by_size[4].memory["activations"] * 2 == pytest.approx(by_size[8].memory["activations"])
    assert by_size[4].memory["gradients"] == 2 * by_size[8].memory["gradients"], "eight sequences are one step's all"


def test_token_groups_must_divide_a_chip_s_tokens() -> None:
    """A step that tracing would refuse is no candidate."""
    transport = replace(STAGE.transport, token_groups=3)
    run = replace(RUN, stages=(replace(STAGE, transport=transport),))
    assert not list(candidates(Target(run, parse_topology("v5p:2x2x1"))))
    with pytest.raises(ConfigError, match="no mesh of the 4 chips divides"):
        search(Target(run, parse_topology("v5p:2x2x1")), compiled=0)


def _lines(capsys: pytest.CaptureFixture[str]) -> tuple[list[dict[str, Any]], str]:
    """What was printed: JSON lines, and what a person reads."""
    said = capsys.readouterr()
    return [json.loads(line) for line in said.out.splitlines()], said.err


def test_on_paper_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """The ranking, best first, with the flags that choose each; the configuration as it is stands beside it."""
    ranking = search(TARGET, compiled=0)
    (line,), said = _lines(capsys)
    assert line == {"ranking": ranking}
    seconds = [entry["step_seconds"] for entry in ranking]
    assert seconds == sorted(seconds)
    assert len({json.dumps(entry["mesh"]) for entry in ranking}) == len(ranking), "each mesh once"
    assert "fsdp 2 x expert 2, layer, micro-batch 4 (as configured)" in said
    for entry in ranking:
        chosen = apply_overrides(TARGET.config, split_overrides(entry["flags"].split())[1])
        assert {axis: size for axis, size in mesh_sizes(chosen.mesh).items() if size > 1} == entry["mesh"]
        stage = chosen.stages[0]
        assert (stage.remat, stage.batch.micro_batch) == (entry["remat"], entry["micro_batch"])
    elsewhere = replace(TARGET, topology=parse_topology("v5p:2x2x2"))
    search(elsewhere, compiled=0)
    assert "as configured: mesh" in _lines(capsys)[1]


def test_what_fits_nowhere_is_refused() -> None:
    huge = replace(RUN, model=replace(MODEL, vocab_size=1 << 24, hidden_size=4096))
    with pytest.raises(ConfigError, match=r"tiny does not fit on v5e:1x1: .* needs about \d+ GiB a chip, 16 GiB"):
        search(Target(replace(huge, mesh=MeshConfig()), parse_topology("v5e:1x1")), compiled=1)


def _answers(monkeypatch: pytest.MonkeyPatch, answer: Callable[[int, Target], dict[str, Any]]) -> list[RunConfig]:
    """Lets a function compile: its answers by number; returns what it was asked."""
    asked: list[RunConfig] = []

    def compiled(target: Target) -> dict[str, Any]:
        asked.append(target.config)
        return answer(len(asked), target)

    monkeypatch.setattr(searching, "compile_apart", compiled)
    return asked


def _fits(seconds: float) -> dict[str, Any]:
    memory = {"total": 10**9, "hbm": 10**10}
    return {"fits": True, "memory_per_chip": memory, "estimate": {"step_seconds": seconds, "mfu": 1 / (10 * seconds)}}


def test_the_next_candidate_takes_the_place_of_one_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused ones are reported with the reason; the ranking goes by compiled seconds, whatever paper said."""
    refused = {"fits": False, "refused": "ShardingError: 3 tokens do not divide"}
    answers = {1: refused, 2: _fits(3.0), 3: _fits(1.0), 4: _fits(2.0)}
    asked = _answers(monkeypatch, lambda number, _: answers[number])
    ranking = search(TARGET, compiled=3)
    lines, said = _lines(capsys)
    assert len(asked) == 4
    assert [line.get("refused") for line in lines[:-1]] == [refused["refused"], None, None, None]
    assert [entry["step_seconds"] for entry in ranking] == [1.0, 2.0, 3.0]
    assert lines[-1] == {"ranking": ranking}
    assert "1 of 3: " in said
    assert "refused: ShardingError: 3 tokens do not divide" in said
    assert said.count("2 of 3: ") == 1
    assert said.splitlines()[-3].startswith("1. 1 s a step, MFU 0.100, 1.0 GB: --config.")
    paper = [line["on_paper"]["step_seconds"] for line in lines[:-1]]
    assert paper == sorted(paper)


def test_a_mesh_that_does_not_fit_comes_again_where_the_same_error_leaves_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not with all the settings that need nearly as much: paper's error for that mesh is known by then."""
    there = TARGET.topology.chip.hbm_bytes
    on_paper = {(c.config.mesh, c.config.stages[0]): c.bytes for c in candidates(TARGET)}

    def answer(number: int, target: Target) -> dict[str, Any]:
        needed = on_paper[target.config.mesh, target.config.stages[0]] * factor
        return _fits(1.0) if needed <= there else {"fits": False, "memory_per_chip": {"total": needed, "hbm": there}}

    fastest = min(candidates(TARGET), key=lambda candidate: candidate.seconds)
    factor = 1.01 * there / fastest.bytes
    asked = _answers(monkeypatch, answer)
    search(TARGET, compiled=2)
    seen: dict[MeshConfig, list[bool]] = {}
    for config in asked:
        seen.setdefault(config.mesh, []).append(on_paper[config.mesh, config.stages[0]] * factor <= there)
    assert any(len(fits) > 1 for fits in seen.values())
    assert all(len(fits) <= 2 for fits in seen.values()), "the second of a mesh fits"
    assert sum(sum(fits) for fits in seen.values()) == 2
    assert "does not fit: " in _lines(capsys)[1]


def test_a_search_that_finds_nothing_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After three attempts for each that was asked for."""
    _answers(monkeypatch, lambda number, _: {"fits": False, "refused": "no"})
    with pytest.raises(ConfigError, match=r"tiny on v5p:2x2x1: none of the 6 best on paper fits"):
        search(TARGET, compiled=2)
    assert _lines(capsys)[0][-1] == {"ranking": []}


def test_ctrl_c_keeps_what_was_compiled(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(number: int, _: Target) -> dict[str, Any]:
        if number == 2:
            raise KeyboardInterrupt
        return _fits(2.0)

    _answers(monkeypatch, answer)
    with pytest.raises(KeyboardInterrupt):
        search(TARGET, compiled=3)
    first, last = _lines(capsys)[0]
    assert first["fits"] is True
    assert [entry["step_seconds"] for entry in last["ranking"]] == [2.0]


@dataclass(frozen=True)
class Dying(Target):
    """What crashes the compiler's process, or is refused there."""

    how: str = "dies"

    def mesh(self) -> Mesh:
        if self.how == "dies":
            os.write(2, b"what a compiler says\nbefore it aborts\n")
            os.abort()
        raise MeshError("such a mesh cannot be\nsecond line")


def test_a_compiler_that_dies_is_an_answer() -> None:
    """In a process of its own: neither a crash nor an error ends the search."""
    died = compile_apart(Dying(TARGET.config, TARGET.topology))
    assert died == {"fits": False, "refused": f"the compiler ended with code {-signal.SIGABRT}: before it aborts"}
    refused = compile_apart(Dying(TARGET.config, TARGET.topology, how="refuses"))
    assert refused == {"fits": False, "refused": "MeshError: such a mesh cannot be"}


@pytest.mark.xdist_group("libtpu")
@pytest.mark.usefixtures("compiler")
class TestWithCompiler:
    """With the GPU compiler, without a GPU."""

    def test_a_search(self, capsys: pytest.CaptureFixture[str]) -> None:
        """One candidate compiled: the report of the step, its flags, and the ranking."""
        (best,) = search(Target(RUN, parse_topology("h100:4")), compiled=1)
        (report, last), _ = _lines(capsys)
        assert last["ranking"] == [best]
        assert report["fits"] is True
        assert report["flags"] == best["flags"]
        assert report["memory_per_chip"]["params"] == report["on_paper"]["memory"]["params"]
        assert report["collectives"]

    def test_ctrl_c_while_a_compile_starts_is_not_lost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        start = SpawnProcess.start

        def interrupted(process: SpawnProcess) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            start(process)

        monkeypatch.setattr(SpawnProcess, "start", interrupted)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers ignore it
        try:
            with pytest.raises(KeyboardInterrupt):
                compile_apart(TARGET)
        finally:
            signal.signal(signal.SIGINT, before)
        for child in multiprocessing.active_children():
            child.join(timeout=20)
            assert child.exitcode is not None
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def test_ctrl_c_ends_a_compile(self) -> None:
        """At once, with the code of an interrupted program, and the compiler's process goes with it."""
        command = [sys.executable, "train.py", "--config", "configs/research_1p4b.py", "--compile_only",
                   "--topology=h100:8", "--search", "--search_compiles=1"]  # fmt: skip
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
            assert program.stderr is not None
            said = ""
            while "1 of 1: " not in said:
                said += (letter := program.stderr.read(1))
                assert letter, said
            time.sleep(1.0)  # until the compiler's process is there
            below = psutil.Process(program.pid).children(recursive=True)
            assert below
            program.send_signal(signal.SIGINT)
            out, err = program.communicate(timeout=20)
        assert program.returncode == 75
        assert json.loads(out) == {"ranking": []}
        assert "Ctrl-C" in err
        assert not psutil.wait_procs(below, timeout=20)[1]
