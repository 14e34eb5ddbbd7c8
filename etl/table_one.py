"""The study's table of a log: users, items, actions, exposures, and how clicks are spread."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from etl.contract import CLICKED, FEEDBACK_BIT
from etl.protocol import Array

PLURAL = {"like": "likes", "share": "shares", "follow": "follows", "read": "reads", "favorite": "favorites"}
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


def count_rows(feedback_N: Array, actions: tuple[str, ...]) -> Counter[str]:
    """Exposures, clicks, each action, and the readings of negative feedback.

    Args:
        feedback_N: bits as in the dataset, bit 7 = clicked.
        actions: feedback columns of the log.

    Returns:
        `exposures`, `clicks`, plural names of the actions, `skip` (click 0, no other action),
        `passive` (click 1, no other action), `other` (click 0 and an action).
    """
    by_bits = np.bincount(feedback_N.astype(np.int64), minlength=256)
    bits = np.arange(256)
    clicked, acted = (bits & CLICKED) != 0, (bits & ~CLICKED) != 0
    counts = Counter(exposures=int(by_bits.sum()), clicks=int(by_bits[clicked].sum()))
    for action in actions:
        counts[PLURAL[action]] = int(by_bits[(bits >> FEEDBACK_BIT[action]) & 1 == 1].sum())
    counts["skip"] = int(by_bits[~clicked & ~acted].sum())
    counts["passive"] = int(by_bits[clicked & ~acted].sum())
    counts["other"] = int(by_bits[~clicked & acted].sum())
    return counts


def distinct(values_N: Array) -> tuple[Array, Array]:
    """Distinct values in order of appearance, and for each value the place of its equal among them.

    By a hash table: several times faster than sorting, which `np.unique` does.
    """
    encoded = pa.array(values_N).dictionary_encode()
    return encoded.dictionary.to_numpy(zero_copy_only=False), encoded.indices.to_numpy(zero_copy_only=False)


def histogram(values: Array) -> list[list[int]]:
    """Distinct values and how often each occurs, as `[value, count]`."""
    value, count = np.unique(values, return_counts=True)
    return [[int(v), int(c)] for v, c in zip(value, count, strict=True)]


def quantiles(pairs: Array) -> dict[str, int] | None:
    """Quantiles from `(value, count)` rows: the smallest value that so many values do not exceed.

    >>> quantiles(np.array([[1, 3], [9, 1]]))["0.5"]
    1
    """
    if len(pairs) == 0 or pairs[:, 1].sum() == 0:
        return None
    order = np.argsort(pairs[:, 0], kind="stable")
    value, through = pairs[order, 0], np.cumsum(pairs[order, 1])
    place = np.searchsorted(through, np.ceil(np.array(QUANTILES) * through[-1]).clip(1))
    return {str(q): int(value[p]) for q, p in zip(QUANTILES, place, strict=True)}


def table(
    counts: Counter[str], *, users: int, items: int, actions: tuple[str, ...], per_user: Array, per_item: Array
) -> dict[str, Any]:
    """One column of the table; null where the log has no such action.

    Args:
        per_user: `(clicks, users)` rows.
        per_item: `(clicks, items)` rows.
    """
    column: dict[str, Any] = {"users": users, "items": items, "clicks": counts["clicks"]}
    column |= {name: counts[name] if action in actions else None for action, name in PLURAL.items()}
    column |= {name: counts[name] for name in ("exposures", "skip", "passive", "other")}
    column["mean_clicks"] = counts["clicks"] / users if users else None
    column["clicks_per_user"], column["clicks_per_item"] = quantiles(per_user), quantiles(per_item)
    return column
