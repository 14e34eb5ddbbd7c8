"""Deterministic, seeded hashing and sampling of rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from etl.runtime.arrays import IntArray
from trainer.data.ragged import cumcount


def sample_per_group(
    user_R: IntArray, group_R: IntArray, index_in_session_R: IntArray, limit: int, salt: int
) -> npt.NDArray[np.bool_]:
    """Mask of a random sample of at most `limit` rows per group.

    The choice is a hash of the row, not of the batch, so it does not depend on the number of workers.

    Args:
        user_R: user of each row.
        group_R: group of each row, in ascending order.
        index_in_session_R: the row's index in its session.
        limit: maximum rows per group.
        salt: seed of the sample.
    """
    within = cumcount(group_R)
    if within.max(initial=-1) < limit:
        return np.ones(len(group_R), bool)
    key = mix(user_R.astype(np.uint64) ^ mix(index_in_session_R.astype(np.uint64) + np.uint64(salt)))
    order = np.lexsort((key, group_R))
    rank = np.empty(len(order), np.int64)
    rank[order] = within  # sorting keeps groups in place, so the index in a sorted group is the rank
    return rank < limit


def mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection that scatters bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
