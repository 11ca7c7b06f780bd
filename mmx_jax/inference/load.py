"""From a folder to a model that can be asked: configuration, weights and tokenizer of a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from mmx_jax.checkpoint import CheckpointDamagedError, CheckpointStore
from mmx_jax.config import ModelConfig, RunConfig, StageConfig
from mmx_jax.config.serialize import from_dict
from mmx_jax.convert.stored import locate
from mmx_jax.data import Tokenizer, TokenizerError, check_vocabulary, load_tokenizer
from mmx_jax.inference.generator import inference_dtypes
from mmx_jax.model import abstract_params
from mmx_jax.model.dot import Weight
from mmx_jax.model.quantize import abstract_quantized_params


class LoadError(RuntimeError):
    """A folder that holds no model; the message says what was looked for."""


@dataclass(frozen=True)
class Loaded:
    """A trained model and what is needed to use it."""

    run: RunConfig
    stage: StageConfig
    """The stage that the checkpoint was written in; the last one for weights that no training here made."""
    model: ModelConfig
    """The stage's model: with its RoPE base, and with the tokenizer's limits where the configuration sets none."""
    params: dict[str, Weight]
    """Weights by path, in the dtypes of `inference_dtypes`; those of an int8 checkpoint stay in 8 bits."""
    step: int
    """Number of the checkpoint."""
    metadata: Mapping[str, Any]
    """What was saved with it."""
    folder: Path
    """Folder of the checkpoints."""

    @property
    def workdir(self) -> Path:
        """Folder of the run."""
        return self.folder.parent

    def summary(self) -> dict[str, Any]:
        """What result files say of the model."""
        return {
            "name": self.run.name,
            "checkpoint": str(self.folder),
            "step": self.step,
            "stage": self.stage.name,
            "tokens": self.metadata.get("progress", {}).get("tokens"),
        }


def find_checkpoints(folder: str | Path) -> tuple[Path, int | None]:
    """Folder of checkpoints, and the step when `folder` is a single one: a workdir, its checkpoints, or one of them.

    Raises:
      LoadError: none of the three.
    """
    found = locate(folder)
    if found is None:
        what = "holds no checkpoint" if Path(folder).is_dir() else "no such folder"
        raise LoadError(
            f"{folder}: {what}; name a run's workdir, its folder 'checkpoints', or one step such as 00001200"
        )
    return found


def load_for_inference(folder: str | Path, step: int | None = None) -> Loaded:
    """Reads the configuration and the weights of a checkpoint, verified, for this process alone.

    Args:
      folder: a run's workdir, its folder of checkpoints, or a single step's folder.
      step: which one; None takes the newest good one.

    Raises:
      LoadError: no checkpoint there.
      CheckpointError: the step is not there, or damaged.
      ConfigError: its configuration is of another version of this code.
    """
    found, only = find_checkpoints(folder)
    step = only if step is None else step
    store = CheckpointStore(found, alone=True)
    metadata = _metadata(store, step)
    described: RunConfig = from_dict(metadata["config"])
    dtypes = inference_dtypes(described.model)
    shapes: dict[str, Any]
    if metadata.get("quantization"):
        shapes = abstract_quantized_params(described.model, dtypes)
    else:
        leaves = abstract_params(described.model).items()
        shapes = {path: jax.ShapeDtypeStruct(leaf.shape, dtypes[path]) for path, leaf in leaves}
    restored = store.restore({"params": shapes}, step, cast=True)
    run: RunConfig = from_dict(restored.metadata["config"])
    name = restored.metadata.get("progress", {}).get("stage")
    stage = next((stage for stage in run.stages if stage.name == name), run.stages[-1])
    model = run.model if stage.rope_base is None else replace(run.model, rope_base=stage.rope_base)
    return Loaded(run, stage, model, restored.tree["params"], restored.step, restored.metadata, store.folder)


def _metadata(store: CheckpointStore, step: int | None) -> dict[str, Any]:
    """Metadata of a step, or of the newest step whose metadata can be read."""
    if step is not None:
        return store.metadata(step)
    *older, newest = store.steps()
    for candidate in (newest, *reversed(older)):
        try:
            return store.metadata(candidate)
        except CheckpointDamagedError as error:
            damage = error
    raise damage


def with_tokenizer(loaded: Loaded, path: str | Path | None = None) -> tuple[Loaded, Tokenizer]:
    """The tokenizer of a model, and the model limited to it: ids that it does not have are never sampled (INV-41),
    generation stops at its end of text unless the configuration says another id (INV-42).

    Args:
      loaded: the model.
      path: a tokenizer file or a folder with one; None looks into the workdir, then into the stage's token stores.

    Raises:
      TokenizerError: none is found, or it has more ids than the model.
      LoadError: the one that was found, not named, is another than the checkpoint was trained with.
    """
    places = [Path(path)] if path else [loaded.workdir, *(Path(source.store) for source in loaded.stage.data.sources)]
    for place in places:
        try:
            tokenizer = load_tokenizer(place)
            break
        except TokenizerError:
            if path:
                raise
    else:
        raise TokenizerError(f"no tokenizer in {', '.join(map(str, places))}; name one with --tokenizer")
    trained_with = loaded.metadata.get("tokenizer_sha256")
    if not path and trained_with not in (None, tokenizer.sha256):
        raise LoadError(
            f"{tokenizer.file} (SHA-256 {tokenizer.sha256[:12]}...) is not the tokenizer that {loaded.folder} was made "
            f"with ({trained_with[:12]}...): its ids mean other text. Bring that one back, or name one with --tokenizer"
        )
    check_vocabulary(tokenizer.vocab_size, loaded.model.vocab_size, f"the tokenizer {tokenizer.file}")
    model = replace(
        loaded.model,
        trained_vocab_size=min(loaded.model.trained_vocab_size or tokenizer.vocab_size, tokenizer.vocab_size),
        end_of_text_id=tokenizer.end_of_text_id if loaded.model.end_of_text_id is None else loaded.model.end_of_text_id,
    )
    return replace(loaded, model=model), tokenizer
