"""Confidence intervals and significance tests over users (pure functions of ranks).

Each user has one query, so resampling users is resampling ranks. A query's contribution to a metric
depends only on its rank, so a resample is one multinomial draw over the few distinct values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from etl.runtime.arrays import FloatArray, IntArray

RESAMPLES = 2_000
GAINS = ("hr", "ndcg", "mrr")
"""Metrics that depend only on a query's rank."""
SIGNIFICANCE_LEVEL = 0.05
"""A difference with a smaller p-value is significant."""
SMALLEST_P = 1e-6
"""Smaller p-values are not reported, since the tests' assumptions are not that exact."""
DIGITS = 12
"""Decimals to which differences are rounded."""


def matched_ranks(tables: Sequence[pa.Table]) -> list[IntArray]:
    """Ranks of the users that are in every table, sorted by user.

    Args:
        tables: tables with `user_id`, sorted, and `rank`.

    >>> a, b = pa.table({"user_id": [1, 3], "rank": [2, 7]}), pa.table({"user_id": [3, 4], "rank": [5, 1]})
    >>> [rank.tolist() for rank in matched_ranks([a, b])]
    [[7], [5]]
    """
    users = [table["user_id"].to_numpy() for table in tables]
    common = reduce(np.intersect1d, users)
    return [t["rank"].to_numpy()[np.searchsorted(user, common)] for t, user in zip(tables, users, strict=True)]


def gains(rank_Q: IntArray, metric: str) -> FloatArray:
    """Contribution of each query to `hr@k`, `ndcg@k` or `mrr@k`, `[Q]`.

    >>> gains(np.array([1, 3, 11]), "ndcg@10").tolist()
    [1.0, 0.5, 0.0]
    """
    name, cutoff = metric.split("@")
    rank = np.asarray(rank_Q, np.float64)
    gain = {"hr": np.ones_like(rank), "ndcg": 1.0 / np.log2(rank + 1.0), "mrr": 1.0 / rank}[name]
    return np.where(rank <= int(cutoff), gain, 0.0)


def interval(value_Q: FloatArray, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over users (Efron and Tibshirani 1993, ch. 13).

    Args:
        value_Q: one value per user; with several runs, the user's mean over them.
        level: confidence level.
        seed: seed of the resampling.
    """
    values, count = np.unique(value_Q, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(value_Q), count / len(value_Q), size=RESAMPLES)
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(draws @ values / len(value_Q), [tail, 1.0 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """Difference of two rankers, first minus second, over the same queries.

    Attributes:
        difference: difference of the means.
        low, high: 95 % bootstrap interval over users.
        p: two-sided p-value; McNemar's exact test for HR, Wilcoxon's signed-rank test for NDCG and MRR.
    """

    difference: float
    low: float
    high: float
    p: float


def compare(first_Q: IntArray, second_Q: IntArray, metric: str) -> Difference:
    """Compare two rankers by paired ranks of the same targets."""
    a, b = gains(first_Q, metric), gains(second_Q, metric)
    low, high = interval(a - b)
    return Difference(
        float((a - b).mean()), low, high, _mcnemar(a, b) if metric.startswith("hr@") else signed_rank(a, b)
    )


def _mcnemar(a: FloatArray, b: FloatArray) -> float:
    from scipy.stats import binomtest  # slow import (0.5 s), not needed by evaluations

    only_first, only_second = int(np.sum(a > b)), int(np.sum(b > a))
    total = only_first + only_second
    return float(binomtest(only_first, total).pvalue) if total else 1.0


def signed_rank(a: FloatArray, b: FloatArray) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test on paired values `[Q]`."""
    from scipy.stats import wilcoxon

    # 1/2 − 1/3 and 1/6 − 0 differ as floats, but must tie in the ranks of differences.
    difference = np.round(a - b, DIGITS)
    difference = difference[difference != 0]
    return float(wilcoxon(difference).pvalue) if len(difference) else 1.0


def holm(p_N: Sequence[float]) -> npt.NDArray[np.float64]:
    """Holm-corrected p-values (Holm 1979), in the order of the input.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_N, np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    out = np.empty_like(p)
    out[order] = np.minimum(corrected, 1.0)
    return out


def format_p(p: float) -> str:
    """A p-value as text.

    >>> format_p(0.0412), format_p(1e-9)
    ('0.041', '< 1e-06')
    """
    return f"{p:.2g}" if p >= SMALLEST_P else f"< {SMALLEST_P:.0g}"
