"""Which tiles of scores hold something to compute: the ranges of keys that queries see, taken together tile by tile."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.softmax.chunked import Ranges


class Extent(NamedTuple):
    """Over the queries of each tile [B, tiles]: the union of their ranges, and the range that all of them see.

    Queries that see nothing do not count; `any` says where others do.
    """

    low: jax.Array
    high: jax.Array
    common_low: jax.Array
    common_high: jax.Array
    any: jax.Array

    def visible(self, keys: int, tile: int) -> tuple[jax.Array, jax.Array]:
        """Says of tiles of queries and of keys [B, tiles, key tiles] whether some see some, and whether all see all."""
        low = jnp.arange(0, keys, tile, dtype=jnp.int32)
        some = self.any[..., None] & (self.low[..., None] < low + tile) & (self.high[..., None] > low)
        every = (self.common_low[..., None] <= low) & (self.common_high[..., None] >= low + tile)
        return some, some & every


def extent(ranges: Ranges, keys: int, tile: int) -> Extent:
    """Returns the extents of tiles of queries; the last may reach beyond them."""
    batch, length = ranges.start.shape
    start, end = (jnp.pad(x, ((0, 0), (0, -length % tile))).reshape(batch, -1, tile) for x in ranges)
    some = start < end
    return Extent(
        jnp.min(jnp.where(some, start, keys), axis=2),
        jnp.max(jnp.where(some, end, 0), axis=2),
        jnp.max(jnp.where(some, start, 0), axis=2),
        jnp.min(jnp.where(some, end, keys), axis=2),
        jnp.any(some, axis=2),
    )
