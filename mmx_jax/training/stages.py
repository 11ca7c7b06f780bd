"""Where a stage starts: from random weights, from the stage before, from another run, or from where it was stopped."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from mmx_jax.checkpoint import CheckpointDamagedError, CheckpointStore
from mmx_jax.checkpoint.store import steps_on_disk
from mmx_jax.config import ConfigError, RunConfig, StageConfig, first_difference, to_dict
from mmx_jax.convert import load_safetensors
from mmx_jax.inference.load import find_checkpoints
from mmx_jax.model import parameter_spec
from mmx_jax.model.trainable import learning_rate_factors
from mmx_jax.training.checkpoints import state_tree
from mmx_jax.training.errors import CheckpointRefusedError
from mmx_jax.training.optimizer import make_optimizer
from mmx_jax.training.progress import Progress
from mmx_jax.training.schedule import decay_start, for_round
from mmx_jax.training.state import TrainState, abstract_state, init_optimizer, init_state, shardings_of
from mmx_jax.training.tokenizers import UsedTokenizer, tokenizer_of_checkpoint
from parallel import distributed

log = logging.getLogger(__name__)

FREE_OF_RUN = ("name", "mesh", "compiler", "checkpoint", "evaluation", "logging", "report", "workdir")
FREE_OF_STAGE = ("remat", "split", "transport", "loss_chunk", "init_from", "keep", "other_tokenizer")
"""Settings that may change when a run goes on: they do not decide what is learned from which rows, but for the few
routed slots that `transport` may lose."""


@dataclass(frozen=True)
class StageSetup:
    """What training a stage needs beside values: optimizer, frozen parts, shapes and shardings."""

    config: RunConfig
    stage: StageConfig
    mesh: Mesh

    @cached_property
    def factors(self) -> dict[str, float]:
        """Factor on the learning rate by parameter path."""
        return learning_rate_factors(parameter_spec(self.config.model), self.stage.trainable)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW over the stage's groups."""
        return make_optimizer(self.stage.optimizer, parameter_spec(self.config.model), self.factors)

    @cached_property
    def abstract(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return abstract_state(self.config.model, self.optimizer, self.factors, self.mesh)

    def random_state(self) -> TrainState:
        """The state of a run from nothing; a function of the seed alone."""
        return init_state(
            self.abstract, self.config.model, self.optimizer, self.factors, jax.random.key(self.config.seed)
        )

    def fresh_optimizer(self, params: dict[str, jax.Array]) -> Any:
        """The optimizer's state for parameters from elsewhere."""
        return init_optimizer(self.abstract, params, self.optimizer, self.factors)


@dataclass(frozen=True)
class Start:
    """Where training starts: the stage (by index), its state and counters."""

    index: int
    state: TrainState
    progress: Progress
    reason: str
    """A sentence for the reader of the console."""
    data_fingerprint: str | None = None
    """The rows that the stage began with, when it goes on."""
    tokenizer: UsedTokenizer | None = None
    """The tokenizer that the parameters were trained with, as far as it is known."""


@dataclass(frozen=True)
class SavedStep:
    """A checkpoint of this run that can be looked at."""

    number: int
    metadata: Mapping[str, Any]

    @property
    def progress(self) -> Progress:
        """Its counters."""
        return Progress.from_dict(self.metadata["progress"])

    @property
    def rows(self) -> tuple[str, UsedTokenizer | None]:
        """Digest of the rows that its stage reads, and their tokenizer, which older checkpoints do not tell."""
        return self.metadata["data_fingerprint"], tokenizer_of_checkpoint(self.metadata, f"checkpoint {self.number}")


def first_start(config: RunConfig, mesh: Mesh) -> Start:
    """The start of a run that has no checkpoint."""
    setup = StageSetup(config, config.stages[0], mesh)
    progress = Progress(stage=setup.stage.name)
    if setup.stage.init_from is None:
        return Start(0, setup.random_state(), progress, f"starting from random weights, seed {config.seed}")
    return _from_folder(setup, 0, progress, f"starting from {setup.stage.init_from}")


def next_start(
    config: RunConfig, mesh: Mesh, index: int, state: TrainState, progress: Progress, tokenizer: UsedTokenizer | None
) -> Start:
    """The start of stage `index` after the stage before it ended with `state` and `progress`, on rows of `tokenizer`.

    Raises:
      ConfigError: the stage keeps an optimizer of other parameters.
    """
    before, setup = config.stages[index - 1], StageSetup(config, config.stages[index], mesh)
    counters = Progress(stage=setup.stage.name, update=progress.update, skipped=progress.skipped)
    if setup.stage.init_from is not None:
        return _from_folder(setup, index, counters, f"stage {setup.stage.name!r} from {setup.stage.init_from}")
    kept = "params" in setup.stage.keep
    params, tokenizer = (state.params, tokenizer) if kept else (setup.random_state().params, None)
    counters = _kept_counters(setup.stage, counters, progress, before.sequence_length)
    if "optimizer" not in setup.stage.keep:
        fresh = TrainState(params, setup.fresh_optimizer(params))
        return Start(index, fresh, counters, _after(before, setup.stage), tokenizer=tokenizer)
    if not _same_structure(setup.abstract.optimizer, state.optimizer):
        raise ConfigError(
            f"stage {setup.stage.name!r} keeps the optimizer of stage {before.name!r}, but trains other parameters or "
            "groups; leave 'optimizer' out of its keep"
        )
    taken = TrainState(params, state.optimizer)
    return Start(index, taken, counters, _after(before, setup.stage), tokenizer=tokenizer)


def _same_structure(one: Any, other: Any) -> bool:
    return [key for key, _ in jax.tree.leaves_with_path(one)] == [key for key, _ in jax.tree.leaves_with_path(other)]


def _after(before: StageConfig, stage: StageConfig) -> str:
    kept = ", ".join(stage.keep) or "nothing"
    return f"stage {stage.name!r} after stage {before.name!r}, keeping {kept}"


def _kept_counters(stage: StageConfig, counters: Progress, before: Progress, sequence_length: int) -> Progress:
    """Counters with what the stage keeps; rows are counted again in the stage's length, at the same tokens."""
    if "step" in stage.keep:
        counters = replace(counters, step=before.step)
    if "data" in stage.keep:
        counters = replace(counters, row=math.ceil(before.row * sequence_length / stage.sequence_length))
    return counters


def _from_folder(setup: StageSetup, index: int, counters: Progress, reason: str) -> Start:
    """The start of a stage from a checkpoint of another run, or from published safetensors."""
    assert setup.stage.init_from is not None
    keep = setup.stage.keep
    if any(Path(setup.stage.init_from).glob("*.safetensors")):
        return Start(index, _from_safetensors(setup), counters, reason)
    folder, number = find_checkpoints(setup.stage.init_from)
    wanted = {name: tree for name, tree in state_tree(setup.abstract).items() if name in keep}
    # Imported weights may be stored in bf16; moments are taken over as they are or not at all.
    restored = CheckpointStore(folder).restore(wanted, number, cast="optimizer" not in keep)
    params = restored.tree["params"]
    optimizer = restored.tree["optimizer"] if "optimizer" in keep else setup.fresh_optimizer(params)
    if "step" in keep or "data" in keep:
        before = Progress.from_dict(restored.metadata["progress"])
        stages = {stage["name"]: stage for stage in restored.metadata["config"]["stages"]}
        counters = _kept_counters(setup.stage, counters, before, stages[before.stage]["sequence_length"])
    tokenizer = tokenizer_of_checkpoint(restored.metadata, f"step {restored.step} in {folder}")
    return Start(index, TrainState(params, optimizer), counters, reason, tokenizer=tokenizer)


def _from_safetensors(setup: StageSetup) -> TrainState:
    """State of a stage that starts from published weights: read straight into the shards, with no second copy on disk.

    Raises:
      ConfigError: the stage keeps more than parameters.
      ConvertError: the folder does not hold this model; names file and tensor.
    """
    stage = setup.stage
    assert stage.init_from is not None
    if stage.keep != ("params",):
        raise ConfigError(
            f"stage {stage.name!r} starts from the safetensors in {stage.init_from}, which hold parameters only: "
            f"keep must be ('params',), not {stage.keep!r}"
        )
    params = load_safetensors(stage.init_from, setup.config.model, shardings_of(setup.abstract.params))
    return TrainState(params, setup.fresh_optimizer(params))


def saved_steps(store: CheckpointStore) -> list[SavedStep]:
    """Checkpoints of this run that can be looked at, newest first; the others are named in the log."""
    return [SavedStep(number, store.metadata(number)) for number in distributed.agree(lambda: _readable(store))]


def _readable(store: CheckpointStore) -> list[int]:
    """Numbers of the steps whose metadata can be read, newest first."""
    found = []
    for number in reversed(steps_on_disk(store.folder)):
        try:
            store.metadata(number)
            found.append(number)
        except CheckpointDamagedError as error:
            log.error("%s; looking at the step before it", error)
    return found


def check_same_run(saved: SavedStep, config: RunConfig) -> int:
    """Checks that a checkpoint was written by this configuration, up to its stage; returns that stage's index.

    Raises:
      CheckpointRefusedError: names the first key that differs.
    """
    names = [stage.name for stage in config.stages]
    name = saved.progress.stage
    if name not in names:
        raise CheckpointRefusedError(
            f"the workdir holds step {saved.number} of a stage {name!r}; this configuration has {', '.join(names)}. "
            "Choose another --workdir"
        )
    index = names.index(name)
    difference = first_difference(_deciding(saved.metadata["config"], index), _deciding(to_dict(config), index))
    if difference:
        key, old, new = difference
        raise CheckpointRefusedError(
            f"the workdir holds a checkpoint of another configuration: {key} was {old!r}, now it is {new!r}. Choose "
            "another --workdir, or the old value; a stage of a new run can start from this one by init_from"
        )
    return index


def _deciding(config: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The part of a configuration that decides what is learned in the stages up to `index`."""
    kept = {key: value for key, value in config.items() if key not in FREE_OF_RUN}
    kept["stages"] = []
    for stage in config["stages"][: index + 1]:
        stage = {key: value for key, value in stage.items() if key not in FREE_OF_STAGE}
        stage["data"] = {key: value for key, value in stage["data"].items() if key not in ("workers", "prepare")}
        stage["optimizer"] = {key: value for key, value in stage["optimizer"].items() if key != "max_skipped_steps"}
        kept["stages"].append(stage)
    return kept


def resume(config: RunConfig, mesh: Mesh, store: CheckpointStore, *, reported: bool) -> Start | None:
    """Where a run that was here before goes on; None when there is nothing left to train.

    An interrupted run goes on from its newest good checkpoint. A finished one whose last figures were not reported yet
    starts at its end; with `continue_finished` it starts from the checkpoint before the decay, for one more budget.

    Args:
      config: the run.
      mesh: where to restore to.
      store: the run's checkpoints; at least one.
      reported: whether the newest update was evaluated.

    Raises:
      CheckpointRefusedError: the checkpoints are of another configuration.
      CheckpointError: none of them is good.
    """
    steps = saved_steps(store)
    for saved in steps:
        index = check_same_run(saved, config)
        last, finished = index + 1 == len(config.stages), saved.metadata["finished"]
        setup, progress = StageSetup(config, config.stages[index], mesh), saved.progress
        if finished and last and reported:
            return _another_round(setup, store, steps, saved) if config.report.continue_finished else None
        state = _restored(setup, store, saved)
        if state is None:
            continue
        if finished and not last:
            return next_start(config, mesh, index + 1, state, progress, saved.rows[1])
        where = f"checkpoint {saved.number}: stage {progress.stage!r}, step {progress.step:,}, row {progress.row:,}"
        return Start(index, state, progress, f"resuming from {where}", *saved.rows)
    store.restore({"params": {}})  # every step there is, is damaged: says so, naming what is wrong with the oldest
    return None


def _restored(setup: StageSetup, store: CheckpointStore, saved: SavedStep) -> TrainState | None:
    """The state of a step; None when it is damaged, which the log tells."""
    try:
        tree = store.restore(state_tree(setup.abstract), step=saved.number).tree
    except CheckpointDamagedError as error:
        log.error("%s; trying the step before it", error)
        return None
    return TrainState(tree["params"], tree["optimizer"])


def _another_round(setup: StageSetup, store: CheckpointStore, steps: list[SavedStep], end: SavedStep) -> Start:
    """The start of one more budget of the last stage, which ended at `end`: the newest good step before a decay.

    Raises:
      CheckpointRefusedError: there is none.
    """
    for saved in steps:
        if saved.progress.stage != setup.stage.name or not _before_decay(saved, setup.stage):
            continue
        if (state := _restored(setup, store, saved)) is not None:
            progress = replace(saved.progress, update=end.number, round=end.progress.round + 1)
            where = f"checkpoint {saved.number}, before the decay, for one more budget"
            index = setup.config.stages.index(setup.stage)
            return Start(index, state, progress, f"finished before: going on from {where}", *saved.rows)
    raise CheckpointRefusedError(
        f"{store.folder}: the run is finished, and no step from before its decay, from which one more budget could go "
        "on, is there and good. Bring one back, take --config.report.continue_finished=False, or start another "
        "--workdir from this one by init_from"
    )


def _before_decay(saved: SavedStep, stage: StageConfig) -> bool:
    """Whether a step of the stage comes before the decay of its round (the one that was saved as such, or earlier)."""
    decay = decay_start(for_round(stage.schedule, saved.progress.round))
    return saved.metadata["before_decay"] or saved.progress.tokens < decay
