"""Logits of given tokens, for parity checks by others."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmx_jax.checkpoint import CheckpointStore
from mmx_jax.config import ModelConfig
from mmx_jax.convert.errors import ConvertError
from mmx_jax.convert.stored import find_step, stored_model
from mmx_jax.model import Cache, TextModel, parameter_spec
from mmx_jax.model.quantize import abstract_quantized_params


def load_params(checkpoint: str | Path, step: int | None = None) -> tuple[ModelConfig, dict[str, Array]]:
    """Configuration and fp32 parameters of a step, verified; quantised weights stay in 8 bits.

    Raises: ConvertError when there is no step; CheckpointError when it is damaged.
    """
    found, number = find_step(checkpoint, step)
    store = CheckpointStore(found.folder)
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
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0:
        raise ConvertError(f"tokens must be an integer array [B, T], got {tokens.dtype} {list(tokens.shape)}")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ConvertError(f"tokens must lie in 0 .. {config.vocab_size - 1}, got {tokens.min()} .. {tokens.max()}")
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


def logits_file(
    checkpoint: str | Path, tokens: str | Path, output: str | Path, *, decode: bool = False, compute: str = "float32"
) -> None:
    """Reads tokens int32 [B, T] from an .npy file and writes fp32 logits [B, T, V] to another.

    Raises: ConvertError and CheckpointError as the functions above.
    """
    try:
        ids = np.load(tokens, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConvertError(f"{tokens}: no .npy file of tokens ({error})") from error
    config, params = load_params(checkpoint)
    config = dataclasses.replace(config, compute_dtype=compute)
    np.save(output, compute_logits(config, params, ids, decode=decode))
