"""Scaling, measured: the training step of a configuration on one device and on several, in one process.

    python -m mmx_jax.training.scaling --config configs/two_gpus.py --axes fsdp,expert --profile runs/traces
    python -m mmx_jax.training.scaling --config configs/two_gpus.py:long --axes sequence --json sequence.json

The configuration's batch is that of one device. Each mesh axis of --axes is given all devices in turn: axes that split
the batch get that many times the rows (weak scaling), the others the same rows (strong). Rows hold random tokens, fresh
ones in every step. Efficiency is the tokens/s of all devices over those of one times their number, in the same run.

Before the clock starts, steps at learning rate 0 compare losses: those of one device over all the rows of a first step
of the others, one part after another, against that step. They are equal where nothing is dropped and no routed row is
lost. Exit code 1 if a mesh failed or lost rows, or the losses differ by more than bf16 explains.
"""

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from mmx_jax.config import MESH_AXES, BatchConfig, ConfigError, MeshConfig, RunConfig, StageConfig
from mmx_jax.config.command_line import EXIT_CONFIG, fail_with
from mmx_jax.config.overrides import run_with_config
from mmx_jax.data import Batch
from mmx_jax.flops import peak_flops, training_flops_per_token
from mmx_jax.training.ahead import mesh_sizes
from mmx_jax.training.random_rows import random_batches
from mmx_jax.training.stages import StageSetup
from mmx_jax.training.state import abstract_batch
from mmx_jax.training.step import make_train_step
from parallel.distributed import make_cpu_devices_exact
from parallel.mesh import MeshError, make_mesh
from parallel.overlap import Overlap, ProfileError, read_overlap
from parallel.sharding import DEFAULT_RULES, ShardingError

_AXES = flags.DEFINE_list("axes", ["fsdp"], "Mesh axes that get all the devices, one measurement each.")
_DEVICES = flags.DEFINE_integer("devices", None, "How many devices; default all.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 5, "Timed steps; 0 compiles and initialises, no more.", lower_bound=0)
_DOCUMENTS = flags.DEFINE_integer("documents", 1, "Documents that are packed into each row.", lower_bound=1)
_PROFILE = flags.DEFINE_string("profile", None, "Folder for profiler traces of the meshes, to read their overlap from.")
_JSON = flags.DEFINE_string("json", None, "Also write the measurements to this file.")

_BEGUN = time.monotonic()
PROFILED_STEPS = 2
LOSS_TOLERANCE = 1e-3
"""Relative; bf16 sums in another order differ by about a hundredth of it."""


@dataclass(frozen=True)
class Plan:
    """What is timed of each mesh."""

    steps: int
    documents: int
    profile: Path | None


@dataclass(frozen=True)
class Figures:
    """What a step says of its rows."""

    loss: float
    tokens: float
    """Tokens that count in the loss."""
    grad_norm: float
    lost: float
    """Highest share of routed rows, over the layers, that were lost on the way to their experts."""


@dataclass(frozen=True)
class Measurement:
    """One mesh, or one device."""

    axis: str
    """The mesh axis that has all devices; "none" on one device."""
    devices: int
    sequences: int
    sequence_length: int
    compile_seconds: float
    program_bytes: int
    """Memory of one device that the compiled step needs at its peak: state, batch, temporaries, code."""
    start: tuple[Figures, ...] = ()
    """Figures of the first rows at the initial parameters."""
    step_seconds: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    """Losses of the timed steps."""
    overlap: dict[str, Overlap] = field(default_factory=dict)
    """By GPU, over `PROFILED_STEPS` steps; empty without a profile."""

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all devices."""
        return self.sequences * self.sequence_length

    @property
    def seconds(self) -> float | None:
        """Mean of a step; None if none was timed. Single ones are less sure: sending a step can take as long as one."""
        return statistics.fmean(self.step_seconds) if self.step_seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all devices together."""
        return self.tokens / self.seconds if self.seconds else None


def widened(config: RunConfig, axis: str, devices: int) -> RunConfig:
    """The run with all devices on one mesh axis, its rows multiplied where the axis splits the batch.

    Raises:
      ConfigError: no such axis, or a sequence that does not divide.
    """
    if axis not in MESH_AXES:
        raise ConfigError(f"--axes: no mesh axis {axis!r}; the axes are {', '.join(MESH_AXES)}")
    stage, ways = config.stages[0], devices if axis in DEFAULT_RULES.batch else 1
    batch = BatchConfig(micro_batch=stage.batch.micro_batch * ways, ramp=((0, stage.batch.ramp[0][1] * ways),))
    sizes = {"fsdp": 1} | {axis: devices}
    return replace(config, mesh=MeshConfig(**sizes), stages=(replace(stage, batch=batch),))


@dataclass(frozen=True)
class Prepared:
    """The first stage's step of a run, lowered for a mesh over some devices; its ramp has one point."""

    axis: str
    config: RunConfig
    setup: StageSetup
    batch: Batch
    """Shapes and shardings of a step's rows."""
    lowered: Any

    @classmethod
    def of(cls, config: RunConfig, axis: str, devices: Sequence[jax.Device]) -> "Prepared":
        """Lowers the step, kernels compiled; the configuration's mesh takes all of `devices`.

        Raises:
          MeshError, ShardingError: the configuration does not fit the mesh.
        """
        stage = config.stages[0]
        mesh = make_mesh(mesh_sizes(config.mesh), devices)
        setup = StageSetup(config, stage, mesh)
        micro_batches = stage.batch.ramp[0][1] // stage.batch.micro_batch
        batch = abstract_batch(micro_batches, stage.batch.micro_batch, stage.sequence_length, mesh)
        scalars = (jax.ShapeDtypeStruct((), dtype, sharding=NamedSharding(mesh, PartitionSpec()))
                   for dtype in (jnp.int32, jnp.float32))  # fmt: skip
        step = make_train_step(config.model, stage, setup.optimizer, setup.factors, setup.abstract, config.compiler)
        with jax.set_mesh(mesh):
            lowered = step.lower(setup.abstract, batch, *scalars)
        say(f"{axis}: lowered")
        return cls(axis, config, setup, batch, lowered)

    def compile(self) -> tuple[Any, float]:
        """The compiled step, and the seconds that it took."""
        begun = time.perf_counter()
        compiled = self.lowered.compile()
        say(f"{self.axis}: compiled")
        return compiled, time.perf_counter() - begun

    def measure(self, step: Any, starts: int, plan: Plan) -> dict[str, Any]:
        """Initialises and times the compiled step; returns what a `Measurement` knows of it.

        Args:
          step: what `compile` gave.
          starts: steps at learning rate 0 before those that are timed, each on rows of its own.
          plan: what is timed.
        """
        stage = self.config.stages[0]
        batches = random_batches(self.batch, self.config.model.vocab_size, self.config.seed, plan.documents)
        with jax.set_mesh(self.setup.mesh):
            timed = Timed(step, self.setup.random_state(), np.int32(self.batch.tokens.shape[0]))
            say(f"{self.axis}: initialised")
            start = [timed.figures(next(batches)) for _ in range(starts if plan.steps else 0)]
            say(f"{self.axis}: losses {', '.join(f'{figures.loss:.6f}' for figures in start)}")
            rate = stage.schedule.phases[0].learning_rate
            seconds, losses = timed.run([next(batches) for _ in range(plan.steps)], rate)
            say(f"{self.axis}: steps of {', '.join(f'{value:.4f}' for value in seconds)} s")
            overlap = {}
            if plan.profile is not None and plan.steps:
                overlap = timed.profiled([next(batches) for _ in range(PROFILED_STEPS)], plan.profile / self.axis)
        return {"start": tuple(start), "step_seconds": tuple(seconds), "losses": tuple(losses), "overlap": overlap}


def measured(prepared: Prepared, compiled: Future[tuple[Any, float]], starts: int, plan: Plan) -> Measurement:
    """What a mesh needs, and how fast it is."""
    step, seconds = compiled.result()
    stage = prepared.config.stages[0]
    found = prepared.measure(step, starts, plan)
    return Measurement(
        axis=prepared.axis, devices=prepared.setup.mesh.size, sequences=stage.batch.ramp[0][1],
        sequence_length=stage.sequence_length, compile_seconds=seconds, program_bytes=program_bytes(step), **found,
    )  # fmt: skip


@dataclass
class Timed:
    """A compiled step and the state that it advances."""

    step: Any
    state: Any
    micro_batches: np.int32

    def _send(self, batch: Batch, learning_rate: float) -> dict[str, jax.Array]:
        self.state, metrics = self.step(self.state, batch, self.micro_batches, np.float32(learning_rate))
        return metrics

    def figures(self, batch: Batch) -> Figures:
        """A step that leaves the parameters as they are."""
        metrics = jax.device_get(self._send(batch, 0.0))
        return Figures(
            loss=float(metrics["loss"]),
            tokens=float(metrics["source_tokens"].sum()),
            grad_norm=float(metrics["grad_norm"]),
            lost=float(metrics["lost_rate"].max()),
        )

    def run(self, batches: Sequence[Batch], learning_rate: float) -> tuple[list[float], list[float]]:
        """Seconds from one step's figures to the next one's, and losses; as in training the next step is sent first."""
        jax.block_until_ready((self.state, batches))
        clock, seconds, losses = time.perf_counter(), [], []
        sent: list[dict[str, jax.Array]] = []
        for batch in [*batches, None]:
            before = sent
            sent = [] if batch is None else [self._send(batch, learning_rate)]
            for metrics in before:
                losses.append(float(metrics["loss"]))
                now = time.perf_counter()
                seconds.append(now - clock)
                clock = now
        return seconds, losses

    def profiled(self, batches: Sequence[Batch], folder: Path) -> dict[str, Overlap]:
        """What each GPU does in steps at learning rate 0; empty, with a word on stderr, where no GPU can be traced."""
        options = jax.profiler.ProfileOptions()
        options.host_tracer_level, options.python_tracer_level = 0, 0
        jax.block_until_ready((self.state, batches))
        with jax.profiler.trace(str(folder), profiler_options=options):
            for batch in batches:
                self._send(batch, 0.0)
            jax.block_until_ready(self.state)
        try:
            return read_overlap(folder)
        except ProfileError as error:
            print(error, file=sys.stderr)
            return {}


def program_bytes(compiled: Any) -> int:
    """Memory of one device that a compiled program needs at its peak."""
    stats = compiled.memory_analysis()
    return stats.peak_memory_in_bytes + stats.generated_code_size_in_bytes


def say(what: str) -> None:
    """Tells on stderr what has been done, and after how many seconds."""
    print(f"[{time.monotonic() - _BEGUN:5.0f} s] {what}", file=sys.stderr, flush=True)


def expected_loss(one: Measurement, many: Measurement) -> float:
    """The loss that one device has on all the rows of the first step of several."""
    parts = one.start[: many.sequences // one.sequences]
    return sum(part.loss * part.tokens for part in parts) / sum(part.tokens for part in parts)


def problems(one: Measurement, many: Measurement) -> list[str]:
    """What is wrong with a mesh's results."""
    found = []
    if many.start and not abs(many.start[0].loss / expected_loss(one, many) - 1) <= LOSS_TOLERANCE:
        found.append(f"loss {many.start[0].loss:.6f}, on one device {expected_loss(one, many):.6f}")
    if any(figures.lost for figures in many.start):
        found.append(f"{max(figures.lost for figures in many.start):.2%} of routed rows lost")
    return found


def line(config: RunConfig, one: Measurement, many: Measurement) -> dict[str, Any]:
    """A measurement as JSON values, beside that of one device."""
    stage: StageConfig = config.stages[0]
    speed, alone = many.tokens_per_second, one.tokens_per_second
    peak = peak_flops(jax.devices()[0].device_kind)
    flops = training_flops_per_token(config.model, stage.sequence_length)
    return asdict(many) | {
        "tokens_per_step": many.tokens,
        "tokens_per_device": many.tokens // many.devices,
        "seconds": many.seconds,
        "tokens_per_second": speed,
        "efficiency": speed / alone / many.devices if speed and alone else None,
        "mfu": speed * flops / peak / many.devices if speed and peak else None,
        "loss": many.start[0].loss if many.start else None,
        "loss_of_one_device": expected_loss(one, many) if many.start else None,
        "hidden_share": {gpu: round(overlap.hidden_share, 4) for gpu, overlap in many.overlap.items()},
        "problems": problems(one, many),
    }


COLUMNS = (
    ("axis", "axis", "<9"), ("devices", "devices", "7"), ("tokens/step", "tokens_per_step", "11,"),
    ("s/step", "seconds", "8.4f"), ("tokens/s", "tokens_per_second", "10,.0f"), ("efficiency", "efficiency", "10.1%"),
    ("MFU", "mfu", "6.1%"), ("loss", "loss", "9.6f"), ("on one", "loss_of_one_device", "9.6f"),
    ("bytes", "program_bytes", "8.2e"), ("compiled in", "compile_seconds", "9.0f s"),
)  # fmt: skip
"""Heading, name in the JSON values, width and format."""


def cell(value: Any, form: str) -> str:
    """A value in its column; empty where there is none."""
    form, _, unit = form.partition(" ")
    if value is None or isinstance(value, str):
        width = form.partition(".")[0].rstrip(",")
        return format(value or "", width if width.startswith("<") else f">{width}") + (
            " " * len(f" {unit}") if unit else ""
        )
    return format(value, form) + (f" {unit}" if unit else "")


def text(values: dict[str, Any]) -> str:
    """A measurement for the console."""
    if "error" in values:
        return f"{values['axis']}: FAILED: {values['error'].splitlines()[0]}"
    lines = [" ".join(cell(values[name], form) for _, name, form in COLUMNS)]
    for gpu, share in values["hidden_share"].items():
        overlap = values["overlap"][gpu]
        exposed = (overlap["collective"] - overlap["hidden"]) / PROFILED_STEPS
        kinds = ", ".join(f"{kind} {seconds / PROFILED_STEPS:.4f} s" for kind, seconds in overlap["by_kind"].items())
        lines.append(f"  {gpu}: {share:.1%} of collectives hidden, {exposed:.4f} s a step exposed ({kinds})")
    return "\n".join(lines + [f"  WRONG: {problem}" for problem in values["problems"]])


def compare(
    config: RunConfig, axes: Sequence[str], devices: Sequence[jax.Device], plan: Plan
) -> Iterator[dict[str, Any]]:
    """Compiles the step for one device and for each axis at the same time, then measures one after another.

    Yields the JSON values of `line`, those of one device first; of a mesh that failed its "axis" and "error".

    Raises:
      ConfigError, MeshError, ShardingError: no such axis, or the configuration does not fit a mesh.
      JaxRuntimeError: the step failed on one device.
    """
    runs = {axis: widened(config, axis, len(devices)) for axis in axes}
    compiling: list[tuple[Prepared, Future[tuple[Any, float]]]] = []
    with ThreadPoolExecutor() as pool:
        for axis, run in [("none", widened(config, "fsdp", 1)), *runs.items()]:
            prepared = Prepared.of(run, axis, devices[: math.prod(mesh_sizes(run.mesh).values())])
            compiling.append((prepared, pool.submit(prepared.compile)))
    sizes = [prepared.batch.tokens.size for prepared, _ in compiling]
    one = measured(*compiling[0], max(sizes) // sizes[0], replace(plan, profile=None))
    yield line(config, one, one)
    for prepared, compiled in compiling[1:]:
        try:
            yield line(config, one, measured(prepared, compiled, 1, plan))
        except jax.errors.JaxRuntimeError as error:
            yield {"axis": prepared.axis, "error": str(error)}


def main(config: RunConfig) -> int:
    """Measures one device, then each mesh; prints a line for each, and writes --json."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # the longest rows need nearly all of a GPU
    make_cpu_devices_exact(os.environ)
    plan = Plan(_STEPS.value, _DOCUMENTS.value, Path(_PROFILE.value) if _PROFILE.value else None)
    measurements: list[dict[str, Any]] = []
    try:
        if not _AXES.value:
            raise ConfigError(f"--axes: names at least one of {', '.join(MESH_AXES)}")
        if _JSON.value and not Path(_JSON.value).absolute().parent.is_dir():
            raise ConfigError(f"--json {_JSON.value}: its folder does not exist")
        devices = jax.devices()[: _DEVICES.value]
        if len(devices) < max(2, _DEVICES.value or 2):
            raise ConfigError(f"--devices: scaling needs at least 2 devices; there are {len(devices)}")
        report = {"device": devices[0].device_kind, "jax": jax.__version__, "date": date.today().isoformat(),
                  "config": config.name, "measurements": measurements}  # fmt: skip
        print(f"{len(devices)} x {report['device']}, jax {report['jax']}, {report['date']}: {config.name}", flush=True)
        print(" ".join(cell(head, form) for head, _, form in COLUMNS), flush=True)
        for values in compare(config, _AXES.value, devices, plan):
            print(text(values), flush=True)
            measurements.append(values)
            if _JSON.value:
                Path(_JSON.value).write_text(json.dumps(report, indent=1) + "\n")
    except (ConfigError, MeshError, ShardingError) as error:
        fail_with(error, EXIT_CONFIG)
    return 1 if any("error" in values or values["problems"] for values in measurements) else 0


if __name__ == "__main__":
    run_with_config(main)
