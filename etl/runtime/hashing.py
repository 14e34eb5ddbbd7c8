"""Multiplicative hash of integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio (Fibonacci hashing, Knuth 1973, section 6.4)."""


def multiplicative_hash(value_N: npt.NDArray[np.integer[Any]], bits: int) -> npt.NDArray[np.int64]:
    """Hash values of 1 to 63 bits.

    >>> multiplicative_hash(np.array([0, 1, 2]), 8).tolist()
    [0, 158, 60]
    """
    mixed = value_N.astype(np.uint64)
    mixed *= MULTIPLIER
    mixed >>= np.uint64(64 - bits)
    return mixed.view(np.int64)
