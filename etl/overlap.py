"""`python -m etl.overlap inputs=[A.csv,B.csv]`: users and items that logs have in common."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import MISSING

from etl.command import option, read_options, run_program
from etl.config import SPLIT_BYTES
from etl.folder import InputError
from etl.parse import Parser
from etl.protocol import Int
from etl.tenrec import LogFile, Scenario, make_splits, open_logs, read_blocks

IDS = Scenario(("user_id", "item_id"), "")
PLURAL = {"user_id": "users", "item_id": "items"}


@dataclass
class OverlapConfig:
    """Options of `python -m etl.overlap`."""

    inputs: Any = option(MISSING, "two or more logs of any scenario")


def distinct_ids(log: LogFile) -> tuple[dict[str, Int], Counter[str]]:
    """Distinct ids of a log by column, sorted, read a block at a time; and the rows left out, by reason."""
    seen = {name: np.zeros(0, np.int64) for name in IDS.columns}
    parser, left_out = Parser(IDS, log), Counter[str]()
    for split in make_splits([log], SPLIT_BYTES):
        for block in read_blocks(split)[0]:
            tables, bad = parser.parse(block)
            left_out.update(row.reason for row in bad)
            for table in tables:
                for name, ids in seen.items():
                    seen[name] = np.union1d(ids, table[name].to_numpy())
    return seen, left_out


def job(options: list[str]) -> None:
    """Print how many users and items each pair of logs shares."""
    inputs = read_options(OverlapConfig, "etl.conf.overlap", options).inputs
    if not isinstance(inputs, list) or len(inputs) < 2:
        raise InputError("inputs=[A.csv,B.csv]", repr(inputs), "name at least two logs")
    logs = []
    for log in open_logs([str(i) for i in inputs], IDS):
        seen, left_out = distinct_ids(log)
        logs.append((log.uri, seen))
        line = ", ".join(f"{len(seen[name]):,} {plural}" for name, plural in PLURAL.items())
        rows = "".join(f"; {count:,} rows left out: {reason}" for reason, count in left_out.most_common())
        print(f"{log.uri}: {line}{rows}")
    for (a, left), (b, right) in itertools.combinations(logs, 2):
        shared = {name: len(np.intersect1d(left[name], right[name], assume_unique=True)) for name in IDS.columns}
        print(f"{a} ∩ {b}: {shared['user_id']:,} users, {shared['item_id']:,} items")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("etl.overlap", OverlapConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
