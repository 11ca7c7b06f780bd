"""Rows of random tokens, for measuring: what a step costs does not depend on what the tokens say."""

from collections.abc import Iterator

import jax
import numpy as np

from mmx_jax.data import Batch


def random_batches(abstract: Batch, vocab_size: int, seed: int, documents: int) -> Iterator[Batch]:
    """Batches [A, B, T] on the devices, of rows 0, 1, 2, ... of a stream that does not depend on the mesh.

    Args:
      abstract: their shapes and shardings.
      vocab_size: tokens are below it.
      seed: of the stream.
      documents: documents in each row.
    """
    micro_batches, micro_batch, length = abstract.tokens.shape
    number = 0
    while True:
        rows = [random_row((seed, number + i), length, vocab_size, documents)
                for i in range(micro_batches * micro_batch)]  # fmt: skip
        number += len(rows)
        batch = jax.tree.map(lambda x: x.reshape(micro_batches, micro_batch, length), Batch.stack(rows))
        yield jax.device_put(batch, abstract.tokens.sharding)


def random_row(seed: tuple[int, int], length: int, vocab_size: int, documents: int) -> dict[str, np.ndarray]:
    """One row of random tokens in documents of random lengths, as arrays [T] by field of `Batch`."""
    noise = np.random.default_rng(seed)
    tokens = noise.integers(0, vocab_size, length + 1, dtype=np.int32)
    borders = 1 + noise.choice(length - 1, documents - 1, replace=False)
    segment_ids = np.zeros(length, np.int32)
    segment_ids[[0, *borders]] = 1
    first = np.flatnonzero(segment_ids)
    segment_ids = np.cumsum(segment_ids, dtype=np.int32)
    learned = np.append(segment_ids[1:] == segment_ids[:-1], False)
    return {
        "tokens": tokens[:-1],
        "targets": np.where(learned, tokens[1:], 0).astype(np.int32),
        "positions": (np.arange(length) - first[segment_ids - 1]).astype(np.int32),
        "segment_ids": segment_ids,
        "loss_mask": learned.astype(np.float32),
        "source_id": np.zeros(length, np.int32),
    }
