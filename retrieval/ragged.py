"""Index arithmetic of groups of rows that lie one after another."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def index_in_group(length_G: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Index of each row in its group.

    >>> index_in_group(np.array([2, 0, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    return np.arange(int(length_G.sum())) - np.repeat(np.cumsum(length_G) - length_G, length_G)


def concat_ranges(
    begin_R: npt.NDArray[np.integer], length_R: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Offsets `[R + 1]` and concatenated indices of R ranges.

    >>> offset, index = concat_ranges(np.array([7, 2]), np.array([1, 3]))
    >>> offset.tolist(), index.tolist()
    ([0, 1, 4], [7, 2, 3, 4])
    """
    offset = np.concatenate([[0], np.cumsum(length_R)])
    return offset, np.arange(offset[-1]) + np.repeat(begin_R - offset[:-1], length_R)
