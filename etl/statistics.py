"""Statistics of a log: users, items, actions, exposures, and the distribution of clicks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from etl.dataset import CLICKED, FEEDBACK_BIT, PLURAL
from etl.protocol import group_offsets
from etl.runtime.arrays import AnyArray

DENSE_IDS = 1 << 24
"""Smaller ids are counted in dense arrays; the Tenrec logs number their items from 1."""
SPARSE_PARTS = 8
"""Maximum pending parts with larger ids before they are summed."""
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


def count_rows(feedback_N: AnyArray, actions: tuple[str, ...], watching_N: AnyArray) -> Counter[str]:
    """Count exposures, clicks, each action, and the definitions of negative feedback.

    Args:
        feedback_N: bits as in the dataset, bit 7 = clicked.
        actions: feedback columns of the log.
        watching_N: visit count of each row's item, 0 = unknown.

    Returns:
        `exposures`, `clicks`, plural names of the actions, `skip` (click 0, no other action), `entered`
        (skips that were opened and left), `passive` (click 1, no other action), `other` (click 0
        and an action).
    """
    by_bits = np.bincount(feedback_N.astype(np.int64), minlength=256)
    bits = np.arange(256)
    clicked, acted = (bits & CLICKED) != 0, (bits & ~CLICKED) != 0
    counts = Counter(exposures=int(by_bits.sum()), clicks=int(by_bits[clicked].sum()))
    for action in actions:
        counts[PLURAL[action]] = int(by_bits[(bits >> FEEDBACK_BIT[action]) & 1 == 1].sum())
    counts["skip"] = int(by_bits[0])
    counts["entered"] = int(np.count_nonzero((feedback_N == 0) & (watching_N > 0)))
    counts["passive"] = int(by_bits[clicked & ~acted].sum())
    counts["other"] = int(by_bits[~clicked & acted].sum())
    return counts


def distinct(values_N: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Distinct values in order of appearance, and the index of each value among them.

    Uses a hash table, several times faster than the sorting of `np.unique`.
    """
    encoded = pa.array(values_N).dictionary_encode()
    return encoded.dictionary.to_numpy(zero_copy_only=False), encoded.indices.to_numpy(zero_copy_only=False)


def count_items(item_N: AnyArray, *masks_N: AnyArray) -> AnyArray:
    """Rows `(item, count of the first mask, …)` int64, one per distinct item."""
    largest = int(item_N.max(initial=0))
    if largest < DENSE_IDS and largest < 8 * len(item_N):
        items = np.flatnonzero(np.bincount(item_N))
        counts = [np.bincount(item_N[mask], minlength=largest + 1)[items] for mask in masks_N]
    else:
        items, index = distinct(item_N)
        counts = [np.bincount(index[mask], minlength=len(items)) for mask in masks_N]
    return np.stack([items, *counts], axis=1)


def sum_by_id(tables: Iterable[AnyArray], n_counts: int) -> AnyArray:
    """Sum `(id, count, …)` rows by id.

    Args:
        tables: int64 `[n, 1 + n_counts]` each; ids are non-negative and distinct within a part.
        n_counts: number of counts.

    Returns:
        int64 `[ids, 1 + n_counts]`, sorted by id. Memory depends on the distinct ids, not on the parts.
    """
    totals = np.zeros((0, n_counts), np.int64)
    present = np.zeros(0, bool)
    large: list[AnyArray] = []
    for part in tables:
        small = part[:, 0] < DENSE_IDS
        if not small.all():
            large.append(part[~small])
            part = part[small]
            if len(large) > SPARSE_PARTS:
                large = [_sum_sorted(large)]
        ids = part[:, 0]
        missing = int(ids.max(initial=-1)) + 1 - len(totals)
        if missing > 0:
            totals = np.concatenate([totals, np.zeros((missing, n_counts), np.int64)])
            present = np.concatenate([present, np.zeros(missing, bool)])
        totals[ids] += part[:, 1:]
        present[ids] = True
    result = np.flatnonzero(present)
    dense = np.concatenate([result[:, None], totals[result]], axis=1)
    return np.concatenate([dense, _sum_sorted(large)]) if large else dense


def _sum_sorted(tables: list[AnyArray]) -> AnyArray:
    rows = np.concatenate(tables)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    first = group_offsets(rows[:, 0])[:-1]
    return np.concatenate([rows[first, :1], np.add.reduceat(rows[:, 1:], first, axis=0)], axis=1)


def histogram(values: AnyArray) -> list[list[int]]:
    """Distinct values and their counts, as `[value, count]`."""
    value, count = np.unique(values, return_counts=True)
    return [[int(v), int(c)] for v, c in zip(value, count, strict=True)]


def quantiles(pairs: AnyArray) -> dict[str, int] | None:
    """Quantiles of `(value, count)` rows: the smallest value with at least that share of values not above it.

    >>> quantiles(np.array([[1, 3], [9, 1]]))["0.5"]
    1
    """
    if len(pairs) == 0 or pairs[:, 1].sum() == 0:
        return None
    order = np.argsort(pairs[:, 0], kind="stable")
    value, through = pairs[order, 0], np.cumsum(pairs[order, 1])
    index = np.searchsorted(through, np.ceil(np.array(QUANTILES) * through[-1]).clip(1))
    return {str(q): int(value[p]) for q, p in zip(QUANTILES, index, strict=True)}


def table(
    counts: Counter[str], *, users: int, items: int, columns: set[str], per_user: AnyArray, per_item: AnyArray
) -> dict[str, Any]:
    """One column of the table; null if the log has no such column, or the count is meaningless.

    Args:
        counts: result of `count_rows`; for retained rows also `before_first` (rows of retained users before their
            first retained click) and `after_test` (rows after the last one).
        columns: columns of the log.
        per_user: `(clicks, users)` rows.
        per_item: `(clicks, items)` rows.
    """
    column: dict[str, Any] = {"users": users, "items": items, "clicks": counts["clicks"]}
    column |= {name: counts[name] if action in columns else None for action, name in PLURAL.items()}
    column |= {name: counts[name] for name in ("exposures", "skip")}
    column["entered"] = counts["entered"] if "watching_times" in columns else None
    column |= {name: counts[name] for name in ("passive", "other")}
    column |= {name: counts.get(name) for name in ("before_first", "after_test")}
    column["mean_clicks"] = counts["clicks"] / users if users else None
    column["clicks_per_user"], column["clicks_per_item"] = quantiles(per_user), quantiles(per_item)
    return column
