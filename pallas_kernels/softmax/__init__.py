"""Softmax attention over a range of keys for each query."""

from pallas_kernels.softmax.api import implementations, softmax_attention, softmax_backward

__all__ = ["implementations", "softmax_attention", "softmax_backward"]
