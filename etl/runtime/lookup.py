"""Lookup of values in a sorted array."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def lookup(sorted_M: npt.NDArray[Any], value_N: Any) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """The index of each value in a sorted array, and whether it is in it; otherwise the index is meaningless.

    Faster than `np.isin` for an array that is sorted and shorter than the values.

    >>> index, match = lookup(np.array([2, 3, 7]), np.array([7, 5, 2]))
    >>> index.tolist(), match.tolist()
    ([2, 2, 0], [True, False, True])
    """
    index = np.asarray(np.minimum(np.searchsorted(sorted_M, value_N), max(len(sorted_M) - 1, 0)))
    if not len(sorted_M):
        return index, np.zeros(index.shape, bool)
    return index, np.asarray(sorted_M[index] == value_N)
