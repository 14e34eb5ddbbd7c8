"""Ranks and what is averaged over them: arithmetic only.

Every metric is a sum and a count, so that parts of the queries can be added up exactly. The tie rule
is the strict one: the rank of a target is 1 + the number of *other* candidates whose score is not
lower, so a model that scores all items alike hits nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Int = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

MISS = np.iinfo(np.int64).max
"""Rank of a target that is no candidate."""


def rank_among(
    score_QK: npt.NDArray[np.floating],
    item_QK: npt.NDArray[np.integer],
    target_Q: npt.NDArray[np.integer],
    target_score_Q: npt.NDArray[np.floating],
) -> Int:
    """Rank of each target among the candidates listed for its query.

    Args:
        score_QK: scores of the candidates; NaN counts against the target.
        item_QK: their ids; 0 marks an empty place.
        target_Q: ids of the targets, listed or not.
        target_score_Q: scores of the targets; a NaN is lower than everything.

    Returns:
        `[Q]`, 1 = first. With the K best candidates listed, ranks up to K are exact, and a rank
        beyond K is only known to be beyond.

    >>> rank_among(np.array([[3., 2., 2.]]), np.array([[7, 8, 9]]), np.array([8]), np.array([2.])).tolist()
    [3]
    """
    lower = score_QK < target_score_Q[:, None]
    other = (item_QK != target_Q[:, None]) & (item_QK > 0)
    return np.asarray(1 + np.sum(other & ~lower, axis=1), np.int64)


@dataclass
class RankingSums:
    """Sums over queries of what HR, NDCG and MRR average, at each cutoff.

    HR@k counts ranks up to k; NDCG@k adds 1 / log2(rank + 1), MRR@k adds 1 / rank for those (one
    relevant item, so the ideal DCG is 1).
    """

    cutoffs: Sequence[int]
    queries: int = 0
    repeats: int = 0
    hits: Int = field(init=False)
    gains: Float = field(init=False)
    reciprocals: Float = field(init=False)

    def __post_init__(self) -> None:
        self.hits = np.zeros(len(self.cutoffs), np.int64)
        self.gains = np.zeros(len(self.cutoffs))
        self.reciprocals = np.zeros(len(self.cutoffs))

    def add(self, rank_Q: Int, repeat_Q: Mask | None = None) -> None:
        """Add the ranks of some queries, and which of their targets were seen before."""
        self.queries += len(rank_Q)
        self.repeats += 0 if repeat_Q is None else int(repeat_Q.sum())
        for place, cutoff in enumerate(self.cutoffs):
            rank = rank_Q[rank_Q <= cutoff].astype(np.float64)
            self.hits[place] += len(rank)
            self.gains[place] += np.sum(1.0 / np.log2(rank + 1.0))
            self.reciprocals[place] += np.sum(1.0 / rank)

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
        """The sums that `plain` wrote."""
        sums = cls(cutoffs, plain[0], plain[1])
        sums.hits, sums.gains, sums.reciprocals = np.array(plain[2], np.int64), np.array(plain[3]), np.array(plain[4])
        return sums

    def averages(self) -> dict[str, float | None]:
        """`hr@k`, `ndcg@k`, `mrr@k`; null without queries."""
        rows = (("hr", self.hits), ("ndcg", self.gains), ("mrr", self.reciprocals))
        return {
            f"{name}@{cutoff}": float(sums[place]) / self.queries if self.queries else None
            for name, sums in rows
            for place, cutoff in enumerate(self.cutoffs)
        }


def gini(times_N: Int, n: int) -> float | None:
    """Gini coefficient of how often each of `n` items was recommended: 0 = all alike, near 1 = one alone.

    Args:
        times_N: of the items that were recommended at all.
        n: all items that could be.

    >>> gini(np.array([2, 2]), 2), gini(np.array([4]), 4)
    (0.0, 0.75)
    """
    total = int(times_N.sum())
    if not total:
        return None
    place = np.arange(n - len(times_N) + 1, n + 1, dtype=np.float64)
    return float(((2 * place - n - 1) * np.sort(times_N)).sum() / (n * total))


def auc(label_N: npt.NDArray[np.integer], score_N: npt.NDArray[np.floating]) -> float | None:
    """Area under the ROC curve; ties count half; None with one class only.

    >>> auc(np.array([0, 1, 1]), np.array([.1, .1, .9]))
    0.75
    """
    area_G, _ = _grouped_auc(None, label_N, score_N)
    return None if len(area_G) == 0 or np.isnan(area_G[0]) else float(area_G[0])


def gauc(
    user_N: npt.NDArray[np.integer], label_N: npt.NDArray[np.integer], score_N: npt.NDArray[np.floating]
) -> float | None:
    """AUC inside each user, averaged with the user's rows as weight (Zhu et al. 2017, DIN).

    Users with one class have no AUC and are left out; None if that leaves none.
    """
    area_G, rows_G = _grouped_auc(user_N, label_N, score_N)
    has = ~np.isnan(area_G)
    return float(np.average(area_G[has], weights=rows_G[has])) if has.any() else None


def _grouped_auc(
    group_N: npt.NDArray[np.integer] | None, label_N: npt.NDArray[np.integer], score_N: npt.NDArray[np.floating]
) -> tuple[Float, Int]:
    """AUC of each group (NaN with one class) and its rows, by the rank-sum formula; None is one group.

    A score that is NaN counts against the model: lowest for a positive row, highest for a negative one.
    """
    score_N = np.where(np.isnan(score_N), np.where(label_N > 0, -np.inf, np.inf), score_N)
    order = np.argsort(score_N) if group_N is None else np.lexsort((score_N, group_N))
    label, score = label_N[order].astype(np.float64), score_N[order]
    n = len(score)
    if n == 0:
        return np.zeros(0), np.zeros(0, np.int64)
    new_group = np.arange(n) == 0
    if group_N is not None:
        group = group_N[order]
        new_group[1:] = group[1:] != group[:-1]
    new_tie = new_group | np.concatenate([[True], score[1:] != score[:-1]])
    group_start = np.flatnonzero(new_group)
    rows = np.diff(np.append(group_start, n))
    tie_start = np.flatnonzero(new_tie)
    tie_rows = np.diff(np.append(tie_start, n))
    # Ranks from 1 inside the group; equal scores share their mean rank.
    mean_rank = np.repeat(tie_start + (tie_rows + 1) / 2, tie_rows) - np.repeat(group_start, rows)
    positives = np.add.reduceat(label, group_start)
    rank_sum = np.add.reduceat(label * mean_rank, group_start)
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (rank_sum - positives * (positives + 1) / 2) / (positives * (rows - positives))
    return np.where((positives > 0) & (positives < rows), area, np.nan), rows


CALIBRATION_BINS = 10


def calibration(label_N: npt.NDArray[np.integer], score_N: npt.NDArray[np.floating]) -> dict[str, Any]:
    """How well probabilities are meant: log-loss, and what was predicted and seen in bins of equally many rows.

    Returns:
        `log_loss` in nats; `predicted` and `observed`, mean score and share of positives by bin, lowest scores first;
        `error`, the mean absolute difference of the two, weighted by rows. None and empty where scores are no
        probabilities.
    """
    n = len(label_N)
    if not n or score_N.min() < 0 or score_N.max() > 1:
        return {"log_loss": None, "predicted": [], "observed": [], "error": None}
    score = np.clip(score_N.astype(np.float64), 1e-7, 1 - 1e-7)
    loss = -np.where(label_N > 0, np.log(score), np.log1p(-score)).mean()
    order = np.argsort(score, kind="stable")
    edges = np.unique(np.arange(CALIBRATION_BINS) * n // CALIBRATION_BINS)
    rows = np.diff(np.append(edges, n))
    predicted = np.add.reduceat(score[order], edges) / rows
    observed = np.add.reduceat(label_N[order].astype(np.float64), edges) / rows
    error = float(np.average(np.abs(predicted - observed), weights=rows))
    lists = {"predicted": predicted.tolist(), "observed": observed.tolist()}
    return {"log_loss": float(loss), **lists, "error": error}


def feedback_metrics(
    task: str,
    user_N: npt.NDArray[np.integer],
    clicked_N: Mask,
    label_N: npt.NDArray[np.integer],
    score_N: npt.NDArray[np.floating],
) -> Iterator[tuple[str, Any]]:
    """Every number of one feedback task, as `(name, value)`."""
    yield f"auc/{task}", auc(label_N, score_N)
    yield f"auc/{task}_given_click", auc(label_N[clicked_N], score_N[clicked_N])
    yield f"gauc/{task}", gauc(user_N, label_N, score_N)
    yield f"rows/{task}", len(label_N)
    yield f"positives/{task}", int(label_N.sum())
    yield f"users/{task}", len(np.unique(user_N))
    told = calibration(label_N, score_N)
    yield f"log_loss/{task}", told.pop("log_loss")
    yield f"calibration_error/{task}", told.pop("error")
    yield f"calibration/{task}", told
