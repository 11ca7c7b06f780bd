"""Logits of given tokens, for parity checks by others."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.lib.format import MAGIC_PREFIX

from mmx_jax.checkpoint import CheckpointStore, reader
from mmx_jax.checkpoint.store import step_folder_name
from mmx_jax.config import ModelConfig
from mmx_jax.convert.errors import ConvertError
from mmx_jax.convert.files import new_output, open_regular
from mmx_jax.convert.stored import find_step, stored_model
from mmx_jax.model import Cache, TextModel, parameter_spec
from mmx_jax.model.quantize import abstract_quantized_params


def load_params(checkpoint: str | Path, step: int | None = None) -> tuple[ModelConfig, dict[str, Array]]:
    """Configuration and fp32 parameters of a step, verified; quantised weights stay in 8 bits.

    Raises: ConvertError when there is no step; CheckpointError when it is damaged.
    """
    folder, number = find_step(checkpoint, step)
    store = CheckpointStore(folder)
    metadata = store.metadata(number)
    config = stored_model(metadata)
    dtypes = {path: spec.dtype for path, spec in parameter_spec(config).items()}
    if metadata.get("quantization"):
        tree = abstract_quantized_params(config, dtypes)
    else:
        tree = {path: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for path, spec in parameter_spec(config).items()}
    return config, store.restore({"params": tree}, number, cast=True).tree["params"]


def compute_logits(
    config: ModelConfig, params: dict[str, Array], tokens: Int[np.ndarray, "B T"], *, decode: bool = False
) -> Float[np.ndarray, "B T V"]:
    """fp32 logits of every position.

    Args:
      config: the model; its compute dtype decides the precision of the matmuls.
      params: weights by path.
      tokens: [B, T].
      decode: token by token through the cache instead of in one pass (INV-31).

    Raises: ConvertError for tokens that are no [B, T] array of ids.
    """
    _check_tokens(config, tokens, "tokens")
    ids = jnp.asarray(tokens, jnp.int32)
    ones = jnp.ones_like(ids)

    @jax.jit
    def whole(params: dict[str, Array], ids: Array) -> Array:
        model = TextModel(config, params)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        return model.head(model.backbone(model.embed(ids), positions, ones)[0])

    @jax.jit
    def one(params: dict[str, Array], cache: Cache, ids: Array) -> tuple[Array, Cache]:
        model = TextModel(config, params)
        mixed, _, after = model.backbone(model.embed(ids), cache.positions(ones[:, :1]), ones[:, :1], cache)
        assert after is not None
        return model.head(mixed)[:, 0], after

    if not decode:
        return np.asarray(whole(params, ids))
    cache = Cache.init(config, ids.shape[0], ids.shape[1], "float32")
    rows = []
    for t in range(ids.shape[1]):
        logits, cache = one(params, cache, ids[:, t : t + 1])
        rows.append(np.asarray(logits))
    return np.stack(rows, axis=1)


def _check_tokens(config: ModelConfig, tokens: np.ndarray, where: str | Path) -> None:
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0:
        raise ConvertError(f"{where}: must be an integer array [B, T], got {tokens.dtype} {list(tokens.shape)}")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ConvertError(f"{where}: ids must lie in 0 .. {config.vocab_size - 1}: {tokens.min()} .. {tokens.max()}")


def read_tokens(path: str | Path) -> np.ndarray:
    """The array of an .npy file; its header is checked against the file's size before anything is allocated.

    Raises: ConvertError for anything but one whole array.
    """
    try:
        with open_regular(Path(path)) as file:
            if file.read(len(MAGIC_PREFIX)) != MAGIC_PREFIX:
                raise ConvertError(f"{path}: is no .npy file (an .npz holds several arrays; save one with numpy.save)")
        # Mapped, not read: a forged shape that is larger than the file is then an error and no allocation.
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except ConvertError:
        raise
    except Exception as error:  # numpy evaluates the header as Python text; a forged one fails in many ways
        raise ConvertError(f"{path}: no .npy file of tokens ({type(error).__name__}: {error})") from error


def logits_file(
    checkpoint: str | Path, tokens: str | Path, output: str | Path, *, decode: bool = False, compute: str = "float32"
) -> None:
    """Reads tokens int32 [B, T] from an .npy file and writes fp32 logits [B, T, V] to exactly the file that is named.

    Everything that can be wrong with either file is found before the weights are read.
    Raises: ConvertError and CheckpointError as the functions above.
    """
    ids = read_tokens(tokens)
    target, partial = new_output(output)
    folder, step = find_step(checkpoint)
    config = stored_model(reader.read_manifest(folder / step_folder_name(step)).metadata)
    _check_tokens(config, ids, tokens)
    nbytes = ids.size * config.vocab_size * np.dtype(np.float32).itemsize
    created = False
    try:
        with open(partial, "xb") as file:
            created = True
            if nbytes > (free := shutil.disk_usage(partial.parent).free):
                raise ConvertError(f"{output}: needs {nbytes / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free")
            config, params = load_params(checkpoint, step)
            config = dataclasses.replace(config, compute_dtype=compute)
            np.save(file, compute_logits(config, params, ids, decode=decode))
        partial.rename(target)
    except OSError as error:
        raise ConvertError(f"{output}: the logits were not written: {error}") from error
    finally:
        if created:
            partial.unlink(missing_ok=True)
