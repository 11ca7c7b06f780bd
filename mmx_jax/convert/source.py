"""A folder of published weights, checked against its own config.json before a byte of data is read."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mmx_jax.config import LIGHTNING, ModelConfig
from mmx_jax.convert.errors import ConfigSchemaError, ConvertError, WeightsFileError, WeightsMismatchError
from mmx_jax.convert.files import read_bounded
from mmx_jax.convert.hf_config import NATIVE_TYPE, buffer_block, end_of_text_ids, parse_config, read_json
from mmx_jax.convert.names import DECAY_BUFFERS, TEXT_PREFIX, TensorSlice, tensor_map, text_names
from mmx_jax.convert.safetensors import StoredTensor, read_folder
from mmx_jax.data import Tokenizer, TokenizerError, load_tokenizer
from mmx_jax.data.tokenizer import FILE_NAMES

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
COMPANION_BYTES = 2**30
SCAN_ELEMENTS = 2**18

# Unsigned view and all-ones exponent of each float dtype: a value is finite when its exponent is smaller.
_BITS: dict[np.dtype, tuple[Any, int, int]] = {
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7FFF, 0x7F80),
    np.dtype(np.float16): (np.uint16, 0x7FFF, 0x7C00),
    np.dtype(np.float32): (np.uint32, 0x7FFFFFFF, 0x7F800000),
    np.dtype(np.float64): (np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}


def _dtype_problem(tensor: StoredTensor) -> list[str]:
    """What is wrong with the dtype of a tensor, if anything is."""
    try:
        _ = tensor.dtype
    except WeightsFileError as error:
        return [str(error)]
    return []


def _buffer_differences(stored: Mapping[str, StoredTensor], config: ModelConfig, block: int | None) -> list[str]:
    """What is wrong with the decay buffers, which are left out only where transformers would have written them.

    Args:
      stored: all tensors of a folder.
      config: the model.
      block: tokens of a block in the buffers (`buffer_block`); None where there must be none.
    """
    lightning = {str(number) for number, kind in enumerate(config.layers) if kind == LIGHTNING}
    lines = []
    for name, tensor in stored.items():
        ours = name.removeprefix(TEXT_PREFIX)
        if not (match := DECAY_BUFFERS.match(ours)):
            continue
        layer, reason = ours.split(".")[2], None
        if block is None:
            reason = "unexpected; only the transformers format has decay buffers"
        elif layer not in lightning:
            reason = f"unexpected; layer {layer} is no lightning layer of the model"
        elif tensor.shape != (shape := _buffer_shape(match[1], config.num_heads, block)):
            reason = f"shape {list(tensor.shape)}, the configuration gives {list(shape)}"
        lines += _dtype_problem(tensor) if reason is None else [f"{name} in {tensor.file.name}: {reason}"]
    return lines


def _buffer_shape(kind: str, heads: int, block: int) -> tuple[int, ...]:
    if kind == "diagonal_decay":
        return 1, heads, block, block
    return heads, 1 if kind == "slope_rate" else block, 1


def match_tensors(
    stored: Mapping[str, StoredTensor], config: ModelConfig, where: Path, block: int | None = None
) -> dict[str, StoredTensor]:
    """The stored tensors under our names, exactly those of the model and, with `block`, transformers' decay buffers.

    Raises: WeightsMismatchError naming what is missing, unexpected, there twice, of another shape or of a dtype that is
      no float.
    """
    try:
        names = text_names(stored)
    except ConvertError as error:
        raise WeightsMismatchError(where, [str(error)]) from error
    wanted = tensor_map(config)
    differences = [f"{name}: missing" for name in wanted if name not in names]
    differences += [
        f"{theirs} in {stored[theirs].file.name}: unexpected" for n, theirs in names.items() if n not in wanted
    ]
    for name, tensor in wanted.items():
        if name not in names:
            continue
        found = stored[names[name]]
        if found.shape != tensor.shape:
            reason = f"shape {list(found.shape)}, the configuration gives {list(tensor.shape)}"
            differences.append(f"{found.name} in {found.file.name}: {reason}")
        else:
            differences += _dtype_problem(found)
    differences += _buffer_differences(stored, config, block)
    if differences:
        raise WeightsMismatchError(where, differences)
    return {name: stored[names[name]] for name in wanted}


def read_end_ids(folder: Path) -> tuple[int, ...]:
    """The ids at which generation ends, in order: generation_config.json's, else config.json's; none when neither says.

    Raises: ConfigSchemaError.
    """
    for name in (GENERATION_FILE, CONFIG_FILE):
        if os.path.lexists(folder / name) and (ids := end_of_text_ids(read_json(folder / name), folder / name)):
            return ids
    return ()


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer among a folder's files; None where there is none.

    Raises: WeightsFileError for one that cannot be used, and for a link to nothing in the place of a file.
    """
    for name in TOKENIZER_FILES:
        if os.path.lexists(folder / name) and not (folder / name).exists():
            raise WeightsFileError(folder / name, "is a link to nothing; mend it, or remove it")
    if not any((folder / name).exists() for name in FILE_NAMES):
        return None
    try:
        return load_tokenizer(folder)
    except TokenizerError as error:
        # The advice is for a configuration of ours, which a conversion does not have.
        reason, _, advice = str(error).partition("; name ")
        reason += f"; name it as eos_token in {folder / 'tokenizer_config.json'}" if advice else ""
        raise WeightsFileError(folder, f"its tokenizer cannot be used: {reason}") from error
    except Exception as error:  # files that are no tokenizer fail in as many ways as there are libraries
        raise WeightsFileError(folder, f"its tokenizer cannot be read: {type(error).__name__}: {error}") from error


def read_config(folder: Path) -> ModelConfig:
    """The model that a folder's config.json, generation_config.json and tokenizer describe.

    Raises: ConfigSchemaError; WeightsFileError for a tokenizer that cannot be read or is not this model's.
    """
    config = parse_config(read_json(folder / CONFIG_FILE), folder / CONFIG_FILE)
    ids = read_end_ids(folder)
    if beyond := [token for token in ids if token >= config.vocab_size]:
        reason = f"{beyond[0]} is no id of a model with vocab_size {config.vocab_size}"
        raise ConfigSchemaError(folder, "eos_token_id", reason)
    end = ids[0] if ids else None
    trained = config.trained_vocab_size
    if tokenizer := read_tokenizer(folder):
        trained = tokenizer.vocab_size
        if trained > config.vocab_size:
            reason = f"has {trained} ids, the model's vocab_size is {config.vocab_size}"
            raise WeightsFileError(tokenizer.file, f"{reason}; it is not this model's tokenizer")
        if beyond := [token for token in ids if token >= trained]:
            reason = f"has {trained} ids, so id {beyond[0]}, at which generation ends, would never be sampled"
            advice = f"; keep only the one of {' and '.join(FILE_NAMES)} that has it, or correct eos_token_id"
            raise WeightsFileError(tokenizer.file, reason + advice)
        end = tokenizer.end_of_text_id if end is None else end
    return dataclasses.replace(config, end_of_text_id=end, trained_vocab_size=trained)


class SourceFolder:
    """Published weights whose files, configuration and tensors agree."""

    def __init__(self, path: str | Path, config: ModelConfig | None = None):
        """Opens a folder; reads headers only.

        Args:
          path: folder with safetensors.
          config: the model that is wanted; None takes the folder's config.json.

        Raises: WeightsFileError, WeightsMismatchError, ConfigSchemaError.
        """
        self.path = Path(path).absolute()
        stored = read_folder(self.path)
        self.config = read_config(self.path) if config is None else config
        self.tensors: dict[str, TensorSlice] = tensor_map(self.config)
        # Without a config.json the caller vouches for the model: its buffers may be there as transformers makes them.
        file = self.path / CONFIG_FILE
        data = read_json(file) if os.path.lexists(file) else {"model_type": NATIVE_TYPE}
        self.stored = match_tensors(stored, self.config, self.path, buffer_block(data, file))

    def dtype(self, name: str) -> np.dtype:
        """Stored dtype of a tensor."""
        return self.stored[name].dtype

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor."""
        return self.stored[name].read_rows(start, stop)


def is_finite(values: np.ndarray) -> bool:
    """Whether a C-ordered float array has neither NaN nor infinity, by its exponent bits, in cache-sized steps."""
    kind, magnitude, exponent = _BITS[values.dtype]
    flat = values.reshape(-1).view(kind)
    scratch = np.empty(min(SCAN_ELEMENTS, flat.size), kind)
    for start in range(0, flat.size, SCAN_ELEMENTS):
        part = flat[start : start + SCAN_ELEMENTS]
        if np.bitwise_and(part, kind(magnitude), out=scratch[: part.size]).max() >= exponent:
            return False
    return True


def check_finite(tensor: StoredTensor, rows: np.ndarray, first_row: int, dtype: np.dtype) -> None:
    """Checks rows that were just read, also for values that overflow in the dtype that they will have.

    Raises: WeightsMismatchError naming the tensor and the place.
    """
    limit = ml_dtypes.finfo(dtype).max
    good = is_finite(rows)
    if good and rows.dtype.itemsize > dtype.itemsize:
        good = bool(np.abs(rows).max(initial=0) <= float(limit))
    if not good:
        wide = rows.astype(np.float64)
        at = np.argwhere(~(np.abs(wide) <= float(limit)))[0]
        place = (int(at[0]) + first_row, *map(int, at[1:]))
        reason = f"{tensor.name} in {tensor.file.name}: {wide[tuple(at)]} at {place} is no finite {dtype.name}"
        raise WeightsMismatchError(tensor.file.parent, [reason])


def read_companions(folder: Path) -> dict[str, bytes]:
    """Name -> content of the tokenizer's files and the generation config that a folder has.

    Raises: WeightsFileError for what is no regular file.
    """
    files = {}
    for name in (*TOKENIZER_FILES, GENERATION_FILE):
        if not os.path.lexists(folder / name):
            continue
        try:
            files[name] = read_bounded(folder / name, COMPANION_BYTES)
        except OSError as error:
            raise WeightsFileError(folder / name, f"cannot be read: {error}") from error
    return files
