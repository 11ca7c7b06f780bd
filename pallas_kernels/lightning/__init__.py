"""Lightning attention: causal linear attention with a constant decay for each head."""

from pallas_kernels.lightning.api import (
    border_ids,
    canonical_segment_ids,
    chunk_state,
    continuations,
    decode_step,
    implementations,
    lightning_attention,
    lightning_backward,
)

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
