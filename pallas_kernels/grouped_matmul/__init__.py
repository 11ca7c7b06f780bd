"""Matrix products of rows grouped by expert."""

from pallas_kernels.grouped_matmul.api import grouped_matmul, implementations

__all__ = ["grouped_matmul", "implementations"]
