"""Joint RMSNorm over all heads, gated."""

from pallas_kernels.norm_gate.api import implementations, norm_gate

__all__ = ["implementations", "norm_gate"]
