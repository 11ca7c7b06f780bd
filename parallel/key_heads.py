"""Key and value heads that are whole on every device, because the mesh splits query heads more ways than there are."""

from jax import lax
from jaxtyping import Array, Float, Int

from parallel.sharding import DEFAULT_RULES


def key_head_index(keys: Float[Array, "B S K H"]) -> Int[Array, ""]:
    """Number of the head that this device's query heads read (INV-21). Inside `jax.shard_map`."""
    axes = DEFAULT_RULES.kv_heads
    return lax.axis_index(axes) * keys.shape[2] // lax.axis_size(axes)


def own_key_head(keys: Float[Array, "B S K H"]) -> Float[Array, "B S 1 H"]:
    """Of all key or value heads the one that this device's query heads read. Inside `jax.shard_map`."""
    return lax.dynamic_slice_in_dim(keys, key_head_index(keys), 1, axis=2)
