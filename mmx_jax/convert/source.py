"""A folder of published weights, checked against its own config.json before a byte of data is read."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mmx_jax.config import ModelConfig
from mmx_jax.convert.errors import ConfigSchemaError, WeightsFileError, WeightsMismatchError
from mmx_jax.convert.files import read_bounded
from mmx_jax.convert.hf_config import end_of_text_ids, parse_config, read_json
from mmx_jax.convert.names import TensorSlice, tensor_map, text_names
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


def match_tensors(stored: Mapping[str, StoredTensor], config: ModelConfig, where: Path) -> dict[str, StoredTensor]:
    """The stored tensors under our names, exactly those of the model.

    Raises: WeightsMismatchError naming what is missing, unexpected, of another shape or of a dtype that is no float.
    """
    names = text_names(stored)
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
            try:
                _ = found.dtype
            except WeightsFileError as error:
                differences.append(str(error))
    if differences:
        raise WeightsMismatchError(where, differences)
    return {name: stored[names[name]] for name in wanted}


def read_end_ids(folder: Path) -> tuple[int, ...]:
    """The ids at which generation ends, in order: generation_config.json's, else config.json's; none when neither says.

    Raises: ConfigSchemaError.
    """
    for name in (GENERATION_FILE, CONFIG_FILE):
        if (folder / name).exists() and (ids := end_of_text_ids(read_json(folder / name), folder / name)):
            return ids
    return ()


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer among a folder's files; None where there is none.

    Raises: WeightsFileError for one that cannot be used.
    """
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

    Raises: ConfigSchemaError; WeightsFileError for a tokenizer that cannot be read.
    """
    config = parse_config(read_json(folder / CONFIG_FILE), folder / CONFIG_FILE)
    ids = read_end_ids(folder)
    if beyond := [token for token in ids if token >= config.vocab_size]:
        reason = f"{beyond[0]} is no id of a model with vocab_size {config.vocab_size}"
        raise ConfigSchemaError(folder, "eos_token_id", reason)
    end = ids[0] if ids else None
    trained = config.trained_vocab_size
    if tokenizer := read_tokenizer(folder):
        end = tokenizer.end_of_text_id if end is None else end
        trained = min(tokenizer.vocab_size, config.vocab_size)
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
        self.stored = match_tensors(stored, self.config, self.path)

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
        if not (folder / name).exists():
            continue
        try:
            files[name] = read_bounded(folder / name, COMPANION_BYTES)
        except OSError as error:
            raise WeightsFileError(folder / name, f"cannot be read: {error}") from error
    return files
