"""Which mesh, rematerialisation and micro-batch: all that divide are weighed on paper, the best of them are compiled.

python train.py --config configs/research_1p4b.py --compile_only --topology v5p:2x4x4 --search
"""

import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax

from mmx_jax.config import MESH_AXES, ConfigError, MeshConfig, RunConfig
from mmx_jax.training.ahead import Target, compile_ahead, mesh_sizes, with_mesh
from mmx_jax.training.paper import Candidate, check_batch, state_bytes, weigh
from parallel.mesh import MeshError, resolve_sizes
from parallel.sharding import ShardingError
from parallel.topology import TopologyError

ATTEMPTS = 3
"""For each candidate that is to be compiled so many may be tried: the compiler may refuse some."""
FILLED = 0.97
"""Share of a chip's memory that a candidate may need on paper."""
SHOWN = 12
"""Meshes in the table on paper."""
MOST_TENSOR, MOST_SEQUENCE = 8, 64
"""Largest axes that are tried."""
REMAT = ("none", "experts", "dots", "attention", "layer")
Report = dict[str, Any]


def search(target: Target, compiled: int) -> list[Report]:
    """Compiles the best candidates on paper; prints each JSON line as soon as it is known, and a ranking as the last.

    Progress goes to stderr: the ranking on paper at once, then what is being compiled, at the end the best with the
    flags that choose it. A candidate that the compiler refuses, or that does not fit after all, is reported, and the
    next one on paper takes its place. Ctrl-C prints the ranking of what was compiled until then.

    Args:
      target: the run, whose mesh, rematerialisation and micro-batch give way; all else stays.
      compiled: so many that fit; 0 ranks on paper alone.

    Returns:
      The ranking (`ranked`), the fastest that fits first.

    Raises:
      ConfigError: nothing fits even on paper, or nothing that was compiled.
      TopologyError: there is no compiler for the chips.
      KeyboardInterrupt: after the ranking was printed.
    """
    start = time.monotonic()
    found = sorted(candidates(target), key=lambda candidate: candidate.seconds)
    fitting = _fitting(target, found)
    _say(f"{len(fitting)} of {len(found)} candidates fit on paper ({time.monotonic() - start:.0f} s); by mesh:")
    _say(paper_table(target, fitting))
    if compiled == 0:
        best = list(_best_by_mesh(fitting))[:SHOWN]
        return _print_ranking([_entry(_on_paper_report(target, candidate)) for candidate in best])
    reports: list[Report] = []
    try:
        for report in _compile_best(target, fitting, compiled):
            print(json.dumps(report), flush=True)
            reports.append(report)
    except KeyboardInterrupt:
        _say("stopped")
        raise
    finally:
        ranking = _print_ranking(ranked(reports))
    if not ranking:
        raise ConfigError(f"{target.config.name} on {target.topology}: none of the {len(reports)} best on paper fits")
    return ranking


def _fitting(target: Target, found: Sequence[Candidate]) -> list[Candidate]:
    there = target.topology.chip.hbm_bytes
    fitting = [candidate for candidate in found if candidate.bytes <= FILLED * there]
    if fitting:
        return fitting
    if not found:
        raise ConfigError(f"{target.config.name}: no mesh of the {target.topology.chips} chips divides its sizes")
    least = min(candidate.bytes for candidate in found)
    raise ConfigError(
        f"{target.config.name} does not fit on {target.topology}: of {len(found)} candidates the smallest needs about "
        f"{least / 2**30:.0f} GiB a chip, {there / 2**30:.0f} GiB are there"
    )


def candidates(target: Target) -> Iterator[Candidate]:
    """All meshes whose sizes divide what they split, with each policy and each micro-batch that divides the steps."""
    micro_batches = _divisors(math.gcd(*(sequences for _, sequences in target.stage.batch.ramp)))
    policies = [remat for remat in REMAT if remat != "experts" or target.config.model.num_experts]
    for sizes in _meshes(target):
        try:
            state = state_bytes(_changed(target, sizes, REMAT[0], micro_batches[0]))
        except (ShardingError, ConfigError):
            continue
        for micro_batch in micro_batches:
            these = [_changed(target, sizes, remat, micro_batch) for remat in policies]
            with suppress(ShardingError):
                check_batch(these[0])
                yield from (weigh(one, state) for one in these)


def _changed(target: Target, sizes: dict[str, int], remat: str, micro_batch: int) -> Target:
    """The target on another mesh, with another policy and micro-batch."""
    config = with_mesh(target.config, sizes, remat, target.stage_index, micro_batch)
    return Target(config, target.topology, target.stage_index)


def _meshes(target: Target) -> Iterator[dict[str, int]]:
    model, chips, slices = target.config.model, target.topology.chips, target.topology.slices
    ways = _divisors(chips)
    experts = [n for n in ways if model.num_experts % n == 0] if model.num_experts else [1]
    tensors = [n for n in ways if n <= MOST_TENSOR and model.num_heads % n == 0]
    sequences = [n for n in ways if n <= MOST_SEQUENCE]
    for data, expert, tensor, sequence in itertools.product({1, slices}, experts, tensors, sequences):
        fsdp, rest = divmod(chips, data * expert * tensor * sequence)
        if not rest and data * fsdp % slices == 0:
            yield {"data": data, "fsdp": fsdp, "expert": expert, "sequence": sequence, "tensor": tensor}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _best_by_mesh(fitting: Sequence[Candidate]) -> Iterator[Candidate]:
    """The first of each mesh."""
    seen: set[MeshConfig] = set()
    for candidate in fitting:
        if candidate.config.mesh not in seen:
            seen.add(candidate.config.mesh)
            yield candidate


def _compile_best(target: Target, fitting: Sequence[Candidate], compiled: int) -> Iterator[Report]:
    """Reports of what was tried, until so many fit: of each mesh the fastest on paper.

    Where that needs more memory than there is, the mesh may come again with one that fits by the same error of paper.
    """
    done: set[MeshConfig] = set()
    error_of_paper: dict[MeshConfig, float] = {}
    attempts = 0
    for candidate in fitting:
        mesh = candidate.config.mesh
        if len(done) == compiled or attempts == ATTEMPTS * compiled:
            return
        if mesh in done or candidate.bytes * error_of_paper.get(mesh, 0.0) > target.topology.chip.hbm_bytes:
            continue
        attempts += 1
        _say(f"{len(done) + 1} of {compiled}: {describe(candidate.config, target.stage_index)} ... ", end="")
        start = time.monotonic()
        report = compile_apart(Target(candidate.config, target.topology, target.stage_index))
        _say(f"{time.monotonic() - start:.0f} s: {_result(report)}")
        if report["fits"]:
            done.add(mesh)
        else:
            memory = report.get("memory_per_chip", {"hbm": math.inf})
            needed = memory.get("total", memory["hbm"])
            error_of_paper[mesh] = max(error_of_paper.get(mesh, 0.0), needed / candidate.bytes)
        yield _on_paper_report(target, candidate) | report


def _on_paper_report(target: Target, candidate: Candidate) -> Report:
    """What is known of a candidate before it is compiled."""
    config = candidate.config
    stage = config.stages[target.stage_index]
    return {
        "config": config.name,
        "topology": str(target.topology),
        "mesh": {axis: size for axis, size in mesh_sizes(config.mesh).items() if size > 1},
        "remat": stage.remat,
        "micro_batch": stage.batch.micro_batch,
        "flags": flags_of(target.config, config, target.stage_index),
        "on_paper": {
            "memory": {part: round(size) for part, size in candidate.memory.items()},
            "total": round(candidate.bytes),
            "step_seconds": round(candidate.seconds, 3),
            "exposed_collective_seconds": round(candidate.exposed, 3),
            "mfu": round(_mfu(target, candidate), 4),
        },
    }


def _mfu(target: Target, candidate: Candidate) -> float:
    return target.model_flops / (target.topology.chip.peak_flops * target.topology.chips * candidate.seconds)


def flags_of(before: RunConfig, after: RunConfig, stage_index: int = 0) -> str:
    """What to type on the command line of the one configuration to get the other's mesh, policy and micro-batch."""
    sizes = {axis: getattr(after.mesh, axis) for axis in MESH_AXES}
    values = {f"mesh.{axis}": size for axis, size in sizes.items() if size != getattr(before.mesh, axis)}
    old, new = before.stages[stage_index], after.stages[stage_index]
    if new.remat != old.remat:
        values[f"stages.{stage_index}.remat"] = new.remat
    if new.batch.micro_batch != old.batch.micro_batch:
        values[f"stages.{stage_index}.batch.micro_batch"] = new.batch.micro_batch
    return " ".join(f"--config.{path}={value}" for path, value in values.items())


def describe(config: RunConfig, stage_index: int = 0) -> str:
    """A candidate in a few words."""
    stage = config.stages[stage_index]
    mesh = " x ".join(f"{axis} {size}" for axis, size in mesh_sizes(config.mesh).items() if size > 1) or "one chip"
    return f"{mesh}, {stage.remat}, micro-batch {stage.batch.micro_batch}"


def ranked(reports: Sequence[Report]) -> list[Report]:
    """Those that were compiled and fit, the fastest first: flags, mesh, policy, memory, time and MFU."""
    fitting = [report for report in reports if report["fits"]]
    return [_entry(report) for report in sorted(fitting, key=lambda report: report["estimate"]["step_seconds"])]


def _entry(report: Report) -> Report:
    """A line of the ranking, by the compiled program or, without one, on paper."""
    kept = {key: report[key] for key in ("flags", "mesh", "remat", "micro_batch")}
    paper = report["on_paper"]
    speed, total = paper, paper["total"]
    if "estimate" in report:
        speed, total = report["estimate"], report["memory_per_chip"]["total"]
    return kept | {"memory": total, "step_seconds": speed["step_seconds"], "mfu": speed["mfu"]}


def _print_ranking(ranking: list[Report]) -> list[Report]:
    for place, entry in enumerate(ranking, start=1):
        _say(f"{place}. {entry['step_seconds']:.4g} s a step, MFU {entry['mfu']:.3f}, {entry['memory'] / 1e9:.1f} GB: "
             f"{entry['flags'] or 'as configured'}")  # fmt: skip
    print(json.dumps({"ranking": ranking}), flush=True)
    return ranking


def _result(report: Report) -> str:
    """What came out of a compile, in a few words."""
    if "refused" in report:
        return f"refused: {report['refused']}"
    memory = report["memory_per_chip"]
    needed = f"{memory['total'] / 1e9:.1f}" if "total" in memory else "more"
    size = f"{needed} of {memory['hbm'] / 1e9:.0f} GB"
    if not report["fits"]:
        return f"does not fit: {size}"
    return f"{size}, {report['estimate']['step_seconds']:.4g} s a step, MFU {report['estimate']['mfu']:.3f}"


def paper_table(target: Target, fitting: Sequence[Candidate]) -> str:
    """The best candidate of each mesh, the fastest first, and how the configuration as it is compares."""
    best = list(_best_by_mesh(fitting))[:SHOWN]
    lines = [("s a step", "waits", "MFU", "GB", *(best[0].memory), "")]
    lines += [_paper_line(target, candidate) for candidate in best]
    try:
        *figures, name = _paper_line(target, as_configured(target))
        lines.append((*figures, f"{name} (as configured)"))
    except (MeshError, ShardingError, ConfigError) as error:
        lines.append((*("-" for _ in lines[0][1:]), f"as configured: {error}"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line[:-1], widths)) + f"  {line[-1]}"
                     for line in lines)  # fmt: skip


def _paper_line(target: Target, candidate: Candidate) -> tuple[str, ...]:
    parts = (f"{size / 1e9:.1f}" for size in (candidate.bytes, *candidate.memory.values()))
    return (f"{candidate.seconds:.4g}", f"{candidate.exposed:.3g}", f"{_mfu(target, candidate):.3f}", *parts,
            describe(candidate.config, target.stage_index))  # fmt: skip


def as_configured(target: Target) -> Candidate:
    """The configuration as it is, weighed.

    Raises:
      MeshError, ShardingError, ConfigError: it does not fit the topology.
    """
    stage = target.stage
    sizes = resolve_sizes(mesh_sizes(target.config.mesh), target.topology.chips)
    own = _changed(target, sizes, stage.remat, stage.batch.micro_batch)
    check_batch(own)
    return weigh(own, state_bytes(own))


def compile_apart(target: Target) -> Report:
    """The report of `compile_ahead`, from a process of its own that Ctrl-C can end and whose memory is given back.

    A step that cannot be compiled is an answer: {"fits": False, "refused": why}.

    Raises:
      TopologyError: there is no compiler for the chips.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile() as words:
        process = context.Process(target=_compile, args=(target, sender, words.name), daemon=True)
        try:
            with _ctrl_c_later():
                process.start()
                sender.close()
            answer = receiver.recv()
        except EOFError:
            process.join()
            last = Path(words.name).read_text(errors="replace").strip().rpartition("\n")[2]
            answer = {"fits": False, "refused": f"the compiler ended with code {process.exitcode}: {last}"}
        finally:
            if process.pid is not None:
                process.kill()
                process.join()
    if isinstance(answer, TopologyError):
        raise answer
    return answer


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Holds Ctrl-C back until the end; processes started meanwhile never hear of it: this one decides what it means."""
    resource_tracker.ensure_running()  # it unblocks signals when it starts
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if came:
        signal.raise_signal(signal.SIGINT)


def _compile(target: Target, sender: Connection, words: str) -> None:
    """The work of the process: sends a report, or an error that ends the search; its stderr goes to a file."""
    with open(words, "w") as file:
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # a program for absent chips cannot be read back
    try:
        sender.send(compile_ahead(target))
    except TopologyError as error:
        sender.send(error)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        sender.send({"fits": False, "refused": f"{type(error).__name__}: {reason}"})


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _say(line: str, end: str = "\n") -> None:
    print(line, end=end, file=sys.stderr, flush=True)
