"""The distinct users and items of a log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from etl.logs.parse import parsed_blocks
from etl.logs.splits import LogFile
from etl.logs.tenrec import Scenario, open_logs
from etl.protocol import Int

IDS = Scenario(("user_id", "item_id"), "")


def distinct_ids(log: LogFile, columns: Sequence[str] = IDS.columns) -> tuple[dict[str, Int], Counter[str]]:
    """Distinct sorted ids of a log by column, reading block by block; and counts of skipped rows by reason."""
    seen = {name: np.zeros(0, np.int64) for name in columns}
    left_out = Counter[str]()
    for tables, bad in parsed_blocks(log, IDS):
        left_out.update(row.reason for row in bad)
        for table in tables:
            for name, ids in seen.items():
                seen[name] = np.union1d(ids, table[name].to_numpy())
    return seen, left_out


def distinct_users(inputs: list[str]) -> Int:
    """Distinct users of logs, sorted.

    Raises:
        InputError: a log cannot be read.
    """
    users = [distinct_ids(log, ["user_id"])[0]["user_id"] for log in open_logs(inputs, IDS)]
    return np.unique(np.concatenate(users))
