"""The session protocol: which rows, users and clicks are retained, and the positions of exposures (pure functions).

Rows are grouped by user and in time order within each user. Shapes: N rows, U users, `offset_U1`
int64 `[U + 1]` with user u's rows at `offset_U1[u]:offset_U1[u + 1]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etl.runtime.arrays import AnyArray, BoolArray, IntArray


def group_offsets(user_N: AnyArray) -> IntArray:
    """Offsets of runs of equal values.

    >>> group_offsets(np.array([7, 7, 3])).tolist()
    [0, 2, 3]
    """
    change = np.flatnonzero(user_N[1:] != user_N[:-1]) + 1
    ends = [len(user_N)] if len(user_N) else []
    return np.concatenate([[0], change, ends]).astype(np.int64)


def regroup(order_U: AnyArray, offset_U1: IntArray) -> tuple[IntArray, IntArray]:
    """Reorder groups: the current indices of the rows in the new order, and the new offsets.

    >>> [values.tolist() for values in regroup(np.array([1, 0]), np.array([0, 2, 3]))]
    [[2, 0, 1], [0, 1, 3]]
    """
    rows_U = np.diff(offset_U1)[order_U]
    offset = np.concatenate([[0], np.cumsum(rows_U)])
    return np.repeat(offset_U1[:-1][order_U] - offset[:-1], rows_U) + np.arange(offset[-1]), offset


def clicks_through(clicked_N: BoolArray, offset_U1: IntArray) -> tuple[IntArray, IntArray]:
    """Number of the user's clicks up to and including each row `[N]`, and in total `[U]`."""
    running = np.concatenate([[0], np.cumsum(clicked_N, dtype=np.int64)])
    before_U = running[offset_U1[:-1]]
    total_U = running[offset_U1[1:]] - before_U
    return running[1:] - np.repeat(before_U, np.diff(offset_U1)), total_U


def tail_rows(clicked_N: BoolArray, offset_U1: IntArray, max_clicks: int) -> BoolArray:
    """Mask of rows from each user's `max_clicks`-th last click on; all rows if the user has fewer clicks.

    Applied to a part of a user's rows it only drops rows that are dropped in the end as well.
    """
    through_N, total_U = clicks_through(clicked_N, offset_U1)
    first_kept_U = total_U - max_clicks + 1
    return through_N >= np.repeat(first_kept_U, np.diff(offset_U1))


def last_value(value_N: AnyArray, offset_U1: IntArray, missing: int) -> AnyArray:
    """Each user's last value that is not `missing`, else `missing`; every user must have a row.

    >>> last_value(np.array([4, -9, -9]), np.array([0, 2, 3]), -9).tolist()
    [4, -9]
    """
    last_U = value_N[offset_U1[1:] - 1]
    if not np.any(last_U == missing):  # usually a user's last row has a value
        return last_U
    index = np.where(value_N != missing, np.arange(len(value_N)), -1)
    found_U = np.maximum.reduceat(index, offset_U1[:-1])
    return np.where(found_U >= 0, value_N[found_U], missing)


def first_of_equal(*keys_N: AnyArray) -> BoolArray:
    """Mask of the first row of each combination of keys.

    >>> first_of_equal(np.array([1, 1, 1]), np.array([5, 6, 5])).tolist()
    [True, True, False]
    """
    n = len(keys_N[0])
    order = np.lexsort(keys_N)  # stable: rows with equal keys keep their time order
    new = np.ones(n, bool)
    if n:
        new[1:] = np.any([key[order[1:]] != key[order[:-1]] for key in keys_N], axis=0)
    first = np.zeros(n, bool)
    first[order] = new
    return first


def dedupe(how: str, user_N: AnyArray, item_N: AnyArray, clicked_N: BoolArray, row_hash_N: AnyArray) -> BoolArray:
    """Mask of the rows that `protocol.dedupe` keeps.

    Args:
        how: `none`; `exact`: drop repeats of rows equal in all named columns (same user, item and `row_hash`);
            `first`: keep only a user's first click on an item, and all unclicked rows.
    """
    if how == "exact":
        return first_of_equal(user_N, item_N, row_hash_N)
    keep = np.ones(len(user_N), bool)
    if how == "first":
        click = np.flatnonzero(clicked_N)
        keep[click] = first_of_equal(user_N[click], item_N[click])
    return keep


@dataclass(frozen=True)
class Cut:
    """The rows of users retained in sessions.

    Attributes:
        user_U: users with enough clicks.
        row_N: rows of those users from the first retained click on.
        position_N: number of retained clicks before the row, `retained_U` after the last; valid where `row_N`.
        clicks_U: number of clicks of each user before truncation.
        retained_U: number of retained clicks.
    """

    user_U: BoolArray
    row_N: BoolArray
    position_N: IntArray
    clicks_U: IntArray
    retained_U: IntArray


def cut(clicked_N: BoolArray, offset_U1: IntArray, clicks_U: IntArray, *, min_clicks: int, max_clicks: int) -> Cut:
    """Keep users with at least `min_clicks` clicks, and their last `max_clicks` clicks.

    Args:
        clicked_N: click mask of the rows, possibly already cut before the `max_clicks`-th last click.
        offset_U1: rows of each user.
        clicks_U: number of clicks of each user, including rows that were already cut.

    The rows before the first retained click are dropped. A user whose rows have clicks 0, 1, 0, 1, 0 and
    `max_clicks=30` keeps all but the first, at positions 0, 1, 1, 2.
    """
    rows_U = np.diff(offset_U1)
    through_N, present_U = clicks_through(clicked_N, offset_U1)
    retained_U = np.minimum(present_U, max_clicks)
    user_U = clicks_U >= min_clicks
    before_N = through_N - clicked_N  # number of clicks before the row
    position_N = before_N - np.repeat(present_U - retained_U, rows_U)
    inside = (position_N >= 1) | ((position_N == 0) & clicked_N)
    return Cut(user_U, inside & np.repeat(user_U, rows_U), position_N, clicks_U, retained_U)
