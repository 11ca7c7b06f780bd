"""Permutations that are pure functions of integers: the same on every machine and with every numpy."""

import numpy as np
from jaxtyping import Int64, UInt64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fold(*keys: int) -> int:
    """One 64-bit key of several integers."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = _mix(state * np.uint64(3) + np.uint64(key % 2**64) + _GOLDEN)
    return int(state[0])


def permutation(size: int, *keys: int) -> Int64[np.ndarray, "size"]:
    """Random order of 0 .. size - 1 that depends on the integer keys alone.

    Indices are sorted by SplitMix64 words; different indices never get the same word, so that no tie decides.
    """
    words = _mix(np.arange(size, dtype=np.uint64) * _GOLDEN + np.uint64(fold(*keys)))
    return np.argsort(words).astype(np.int64, copy=False)
