"""Ranks and ranking metrics (HR, NDCG, MRR; pure functions).

Every metric is a sum and a count, so that parts of the queries can be merged exactly. Ties count
against the target: its rank is 1 + the number of *other* candidates whose score is not lower, so a
model that scores all items equally hits nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from etl.runtime.arrays import BoolArray, FloatArray, IntArray

MISS = np.iinfo(np.int64).max
"""Rank of a target that is not a candidate."""


def main_cutoff(cutoffs: Sequence[int]) -> int:
    """The cutoff of sentences and of the metric that a blend is fitted for: 10 if evaluated, else the largest.

    >>> main_cutoff([5, 10, 20]), main_cutoff([5, 20])
    (10, 20)
    """
    return 10 if 10 in cutoffs else max(cutoffs)


def rank_among(
    score_QK: npt.NDArray[np.floating],
    item_QK: npt.NDArray[np.integer],
    target_Q: npt.NDArray[np.integer],
    target_score_Q: npt.NDArray[np.floating],
) -> IntArray:
    """Rank of each target among the candidates listed for its query.

    Args:
        score_QK: scores of the candidates; NaN counts against the target.
        item_QK: their ids; 0 marks an empty entry.
        target_Q: ids of the targets, which need not be listed.
        target_score_Q: scores of the targets; NaN is lower than everything.

    Returns:
        `[Q]`, 1 = first. If the K best candidates are listed, ranks up to K are exact; larger
        values only mean a rank beyond K.

    >>> rank_among(np.array([[3., 2., 2.]]), np.array([[7, 8, 9]]), np.array([8]), np.array([2.])).tolist()
    [3]
    """
    lower = score_QK < target_score_Q[:, None]
    other = (item_QK != target_Q[:, None]) & (item_QK > 0)
    return np.asarray(1 + np.sum(other & ~lower, axis=1), np.int64)


@dataclass
class RankingSums:
    """Sums over queries for HR, NDCG and MRR at each cutoff.

    HR@k counts ranks up to k; NDCG@k adds 1 / log2(rank + 1), MRR@k adds 1 / rank for those (one
    relevant item, so the ideal DCG is 1).
    """

    cutoffs: Sequence[int]
    queries: int = 0
    repeats: int = 0
    hits: IntArray = field(init=False)
    gains: FloatArray = field(init=False)
    reciprocals: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        self.hits = np.zeros(len(self.cutoffs), np.int64)
        self.gains = np.zeros(len(self.cutoffs))
        self.reciprocals = np.zeros(len(self.cutoffs))

    def add(self, rank_Q: IntArray, repeat_Q: BoolArray | None = None) -> None:
        """Add ranks of some queries, and which of their targets repeat a seen item."""
        self.queries += len(rank_Q)
        self.repeats += 0 if repeat_Q is None else int(repeat_Q.sum())
        for index, cutoff in enumerate(self.cutoffs):
            rank = rank_Q[rank_Q <= cutoff].astype(np.float64)
            self.hits[index] += len(rank)
            self.gains[index] += np.sum(1.0 / np.log2(rank + 1.0))
            self.reciprocals[index] += np.sum(1.0 / rank)

    def merge(self, other: RankingSums) -> None:
        """Add the sums of other queries."""
        self.queries, self.repeats = self.queries + other.queries, self.repeats + other.repeats
        self.hits, self.gains = self.hits + other.hits, self.gains + other.gains
        self.reciprocals = self.reciprocals + other.reciprocals

    def plain(self) -> list[Any]:
        """The sums as JSON values."""
        return [self.queries, self.repeats, *(x.tolist() for x in (self.hits, self.gains, self.reciprocals))]

    @classmethod
    def from_plain(cls, cutoffs: Sequence[int], plain: list[Any]) -> RankingSums:
        """The inverse of `plain`."""
        result = cls(cutoffs, plain[0], plain[1])
        result.hits, result.gains = np.array(plain[2], np.int64), np.array(plain[3])
        result.reciprocals = np.array(plain[4])
        return result

    def averages(self) -> dict[str, float | None]:
        """`hr@k`, `ndcg@k`, `mrr@k`; null without queries."""
        rows = (("hr", self.hits), ("ndcg", self.gains), ("mrr", self.reciprocals))
        return {
            f"{name}@{cutoff}": float(values[index]) / self.queries if self.queries else None
            for name, values in rows
            for index, cutoff in enumerate(self.cutoffs)
        }


def gini(times_N: IntArray, n: int) -> float | None:
    """Gini coefficient of recommendation counts over `n` items: 0 = uniform, near 1 = a single item.

    Args:
        times_N: counts of the recommended items.
        n: number of candidates.

    >>> gini(np.array([2, 2]), 2), gini(np.array([4]), 4)
    (0.0, 0.75)
    """
    total = int(times_N.sum())
    if not total:
        return None
    rank_N = np.arange(n - len(times_N) + 1, n + 1, dtype=np.float64)
    return float(((2 * rank_N - n - 1) * np.sort(times_N)).sum() / (n * total))
