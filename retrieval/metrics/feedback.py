"""Metrics of feedback tasks: AUC, GAUC, log-loss and calibration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from etl.runtime.arrays import BoolArray, FloatArray, IntArray


def auc(label_N: npt.NDArray[np.integer], score_N: npt.NDArray[np.floating]) -> float | None:
    """Area under the ROC curve; ties count half; None if there is only one class.

    >>> auc(np.array([0, 1, 1]), np.array([.1, .1, .9]))
    0.75
    """
    area_G, _ = _grouped_auc(None, label_N, score_N)
    return None if len(area_G) == 0 or np.isnan(area_G[0]) else float(area_G[0])


def gauc(
    user_N: npt.NDArray[np.integer], label_N: npt.NDArray[np.integer], score_N: npt.NDArray[np.floating]
) -> float | None:
    """Group AUC: AUC within each user, weighted by the user's rows (DIN, Zhu et al. 2017).

    Users with only one class are left out; None if no user remains.
    """
    area_G, rows_G = _grouped_auc(user_N, label_N, score_N)
    has = ~np.isnan(area_G)
    return float(np.average(area_G[has], weights=rows_G[has])) if has.any() else None


def _grouped_auc(
    group_N: npt.NDArray[np.integer] | None, label_N: npt.NDArray[np.integer], score_N: npt.NDArray[np.floating]
) -> tuple[FloatArray, IntArray]:
    """AUC of each group (NaN with one class) and its rows, by the rank-sum formula; None = a single group.

    NaN scores count against the model: lowest for positive rows, highest for negative rows.

    Group, score and label of a row are packed into one 64-bit key: sorting keys takes a sixth of the time of
    `np.lexsort` by two columns, which matters with the full log's 36 million rows per task.
    """
    n = len(score_N)
    if n == 0:
        return np.zeros(0), np.zeros(0, np.int64)
    score_N = np.where(np.isnan(score_N), np.where(label_N > 0, -np.inf, np.inf).astype(score_N.dtype), score_N)
    key = _score_code(score_N)
    key <<= np.uint64(1)
    key |= (label_N > 0).astype(np.uint64)
    if group_N is not None:
        key |= _group_code(group_N) << np.uint64(33)
    key.sort()
    label = (key & np.uint64(1)).astype(np.float64)
    key >>= np.uint64(1)
    new_tie = np.concatenate([[True], key[1:] != key[:-1]])
    key >>= np.uint64(32)
    group_start = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    rows = np.diff(np.append(group_start, n))
    tie_start = np.flatnonzero(new_tie)
    tie_rows = np.diff(np.append(tie_start, n))
    # Ranks from 1 within the group; ties get the mean rank.
    mean_rank = np.repeat(tie_start + (tie_rows + 1) / 2, tie_rows) - np.repeat(group_start, rows)
    positives = np.add.reduceat(label, group_start)
    rank_sum = np.add.reduceat(label * mean_rank, group_start)
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (rank_sum - positives * (positives + 1) / 2) / (positives * (rows - positives))
    return np.where((positives > 0) & (positives < rows), area, np.nan), rows


def _score_code(score_N: npt.NDArray[np.floating]) -> npt.NDArray[np.uint64]:
    """Order-preserving codes of the scores, below 2^32."""
    if score_N.dtype != np.float32:
        return np.unique(score_N, return_inverse=True)[1].astype(np.uint64)
    # FloatArray bits order like integers after fixing the sign; adding 0 turns -0.0 into 0.0.
    bits = (score_N + np.float32(0)).view(np.uint32)
    negative = bits >> np.uint32(31) == 1
    return np.where(negative, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)


def _group_code(group_N: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """Order-preserving codes of the groups, below 2^31."""
    if group_N.min() >= 0 and group_N.max() < 1 << 31:
        return group_N.astype(np.uint64)
    return np.unique(group_N, return_inverse=True)[1].astype(np.uint64)


CALIBRATION_BINS = 10


def calibration(label_N: npt.NDArray[np.integer], score_N: npt.NDArray[np.floating]) -> dict[str, Any]:
    """Calibration of probabilities: log-loss, and predicted and observed rates in bins of equally many rows.

    Returns:
        `log_loss` in nats; `predicted` and `observed`, mean score and share of positives by bin, lowest scores first;
        `error`, the mean absolute difference of the two, weighted by rows. None and empty if scores are not
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
    clicked_N: BoolArray,
    label_N: npt.NDArray[np.integer],
    score_N: npt.NDArray[np.floating],
) -> Iterator[tuple[str, Any]]:
    """All metrics of one feedback task, as `(name, value)`."""
    yield from feedback_aucs(task, user_N, clicked_N, label_N, score_N)
    yield f"rows/{task}", len(label_N)
    yield f"positives/{task}", int(label_N.sum())
    yield f"users/{task}", len(np.unique(user_N))
    curve = calibration(label_N, score_N)
    yield f"log_loss/{task}", curve.pop("log_loss")
    yield f"calibration_error/{task}", curve.pop("error")
    yield f"calibration/{task}", curve


def feedback_aucs(
    task: str,
    user_N: npt.NDArray[np.integer],
    clicked_N: BoolArray,
    label_N: npt.NDArray[np.integer],
    score_N: npt.NDArray[np.floating],
) -> Iterator[tuple[str, float | None]]:
    """The AUCs of a task: over all rows, over clicked rows, and within users (GAUC)."""
    yield f"auc/{task}", auc(label_N, score_N)
    yield f"auc/{task}_given_click", auc(label_N[clicked_N], score_N[clicked_N])
    yield f"gauc/{task}", gauc(user_N, label_N, score_N)
