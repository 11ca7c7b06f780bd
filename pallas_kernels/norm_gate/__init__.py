"""Joint RMSNorm over all heads, gated."""

from pallas_kernels.norm_gate.api import norm_gate

__all__ = ["norm_gate"]
