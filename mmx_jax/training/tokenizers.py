"""Parameters and rows belong together by their tokenizer: under another one the same ids mean other text."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmx_jax.checkpoint import CheckpointError, CheckpointStore
from mmx_jax.config import ConfigError, RunConfig, StageConfig
from mmx_jax.data import DataError, Manifest
from mmx_jax.inference.load import LoadError, find_checkpoints


@dataclass(frozen=True)
class UsedTokenizer:
    """The tokenizer of some rows, or the one that parameters were trained with."""

    sha256: str
    """Of its file."""
    store: str
    """A token store that was prepared with it."""
    user: str
    """Who used it, for the reader of an error."""

    def __str__(self) -> str:
        return f"{_file(self.store)} (SHA-256 {self.sha256[:12]}...)"


def _file(store: str) -> Path:
    """The tokenizer's file in a store, or the store when it is not there any more."""
    try:
        return Path(store) / Manifest.read(store).tokenizer["file"]
    except DataError:
        return Path(store)


def tokenizer_of_rows(stage: StageConfig) -> UsedTokenizer | None:
    """That of the rows which a stage reads; None when its store is not there or not whole."""
    store = stage.data.sources[0].store
    try:
        return UsedTokenizer(Manifest.read(store).tokenizer["sha256"], store, f"stage {stage.name!r}")
    except DataError:
        return None


def tokenizer_of_checkpoint(metadata: Mapping[str, Any], user: str) -> UsedTokenizer | None:
    """That of the rows which a checkpoint was trained on last, by its metadata; None where these do not tell."""
    digest = metadata.get("tokenizer_sha256")
    if digest is None:
        return None
    stages = {stage["name"]: stage for stage in metadata["config"]["stages"]}
    return UsedTokenizer(digest, stages[metadata["progress"]["stage"]]["data"]["sources"][0]["store"], user)


def check_same_tokenizer(stage: StageConfig, parameters: UsedTokenizer | None, rows: UsedTokenizer | None) -> None:
    """Checks that a stage's rows have the tokenizer that its parameters know, unless the stage allows another.

    Raises:
      ConfigError: they have another; names both files, and what would be right.
    """
    if parameters is None or rows is None or parameters.sha256 == rows.sha256 or stage.other_tokenizer:
        return
    raise ConfigError(
        f"stage {stage.name!r}: its rows in {rows.store} have the tokenizer {rows}, but its parameters come from "
        f"{parameters.user}, trained with {parameters}: the same ids mean other text. Prepare its token stores with "
        f"--tokenizer {parameters.store}; or, if these parameters are to learn new ids, set other_tokenizer=True"
    )


def check_tokenizers(config: RunConfig) -> None:
    """Checks every stage before the first one is trained, as far as stores and checkpoints are there already.

    Raises:
      ConfigError: as `check_same_tokenizer`.
    """
    before: UsedTokenizer | None = None
    for stage in config.stages:
        if stage.init_from is not None:
            before = _of_folder(stage.init_from)
        elif "params" not in stage.keep:
            before = None
        rows = tokenizer_of_rows(stage)
        check_same_tokenizer(stage, before, rows)
        before = rows


def _of_folder(folder: str) -> UsedTokenizer | None:
    """That of the checkpoint which a stage would start from; None where there is none, or published weights."""
    try:
        found, number = find_checkpoints(folder)
        store = CheckpointStore(found)
        steps = store.steps() if number is None else [number]
        return tokenizer_of_checkpoint(store.metadata(steps[-1]), f"step {steps[-1]} in {found}") if steps else None
    except (LoadError, CheckpointError):  # where it matters, the stage's start names what is wrong
        return None
