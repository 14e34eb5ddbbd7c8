"""The distinct users and items of a log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from etl.logs.parse import parse_file
from etl.logs.splits import LogFile
from etl.logs.tenrec import Scenario, open_logs
from etl.runtime.arrays import IntArray

PENDING = 1 << 20
"""Ids that are collected before they are merged with the distinct ones, which takes a sort."""
IDS = Scenario(("user_id", "item_id"), "")


class DistinctIds:
    """Collects distinct ids in memory for at most twice their number, plus `PENDING`."""

    def __init__(self) -> None:
        self.ids, self.pending, self.n_pending = np.zeros(0, np.int64), list[IntArray](), 0

    def add(self, ids: IntArray) -> None:
        """Add ids, in any order."""
        self.pending.append(np.unique(ids))
        self.n_pending += len(self.pending[-1])
        if self.n_pending > max(PENDING, len(self.ids)):
            self.sorted()

    def sorted(self) -> IntArray:
        """The distinct ids so far, ascending."""
        self.ids = np.unique(np.concatenate([self.ids, *self.pending]))
        self.pending, self.n_pending = [], 0
        return self.ids


def distinct_ids(log: LogFile, columns: Sequence[str] = IDS.columns) -> tuple[dict[str, IntArray], Counter[str]]:
    """Distinct sorted ids of a log by column, reading block by block; and counts of skipped rows by reason."""
    seen = {name: DistinctIds() for name in columns}
    left_out = Counter[str]()
    for tables, bad in parse_file(log, IDS):
        left_out.update(row.reason for row in bad)
        for table in tables:
            for name, ids in seen.items():
                ids.add(table[name].to_numpy())
    return {name: ids.sorted() for name, ids in seen.items()}, left_out


def distinct_users(inputs: list[str]) -> IntArray:
    """Distinct users of logs, sorted.

    Raises:
        InputError: a log cannot be read.
    """
    users = [distinct_ids(log, ["user_id"])[0]["user_id"] for log in open_logs(inputs, IDS)]
    return np.unique(np.concatenate(users))
