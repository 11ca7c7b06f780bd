"""Softmax attention over a range of keys for each query."""

from pallas_kernels.softmax.api import RESULTS, implementations, named, softmax_attention, softmax_backward

__all__ = ["RESULTS", "implementations", "named", "softmax_attention", "softmax_backward"]
