"""Lightning attention: causal linear attention with a constant decay for each head."""

from pallas_kernels.lightning.api import (
    chunk_state,
    decode_step,
    implementations,
    lightning_attention,
    lightning_backward,
)
from pallas_kernels.lightning.segments import border_ids, canonical_segment_ids, continuations

__all__ = [
    "border_ids",
    "canonical_segment_ids",
    "chunk_state",
    "continuations",
    "decode_step",
    "implementations",
    "lightning_attention",
    "lightning_backward",
]
