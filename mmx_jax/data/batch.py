"""The batch: what a training or evaluation step reads."""

from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Arrays of one shape [..., T]; a pytree, so leaves may also be shardings or shapes.

    A target is the next token of the same document. The last token of a document and padding have loss mask 0.
    """

    tokens: Any
    """int32 [B, T]."""
    targets: Any
    """int32 [B, T]; 0 where there is none."""
    positions: Any
    """int32 [B, T]; from 0 in every segment."""
    segment_ids: Any
    """int32 [B, T]; 1, 2, ... per row, 0 is padding."""
    loss_mask: Any
    """float32 [B, T]; 0 or 1."""
    source_id: Any
    """int32 [B, T]; index of the source in the mixture."""

    @classmethod
    def stack(cls, rows: list[dict[str, np.ndarray]]) -> "Batch":
        """Batch [B, T] of B rows, as numpy arrays."""
        return cls(**{field.name: np.stack([row[field.name] for row in rows]) for field in fields(cls)})
