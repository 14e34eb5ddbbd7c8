"""Converts a twin to the format of the benchmark's CTR file: each row with its user's first ten clicks."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from etl.logs.tenrec import HISTORY, SCENARIOS
from etl.runtime.arrays import IntArray


def with_history(table: pa.Table, user_R: IntArray, position_R: IntArray) -> tuple[pa.Table, IntArray]:
    """Add the user's first ten clicked items to each row, oldest first, padded with 0.

    Rows of these items are removed, as in the benchmark's file.

    Args:
        table: columns of scenario `qk_video`, a user's rows in time order.
        user_R: int64, each row's user, numbered from 0.
        position_R: int64, number of the user's clicks before the row.

    Returns:
        The remaining rows, with the columns of scenario `ctr`, and the user of each.
    """
    item_R, is_click_R = table["item_id"].to_numpy(), table["click"].to_numpy() == 1
    early = np.flatnonzero(is_click_R & (position_R < len(HISTORY)))
    history = np.zeros((int(user_R.max(initial=-1)) + 1, len(HISTORY)), np.int64)
    history[user_R[early], position_R[early]] = item_R[early]
    left = np.flatnonzero(~(history[user_R] == item_R[:, None]).any(axis=1))
    table, user = table.take(pa.array(left)), user_R[left]
    for name, column in zip(HISTORY, history[user].T, strict=True):
        table = table.append_column(name, pa.array(column))
    return table.select(SCENARIOS["ctr"].columns), user
