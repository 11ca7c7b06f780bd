"""MiniMax-01 in JAX."""
