"""`python -m etl.overlap inputs=[A.csv,B.csv]`: count the users and items that logs have in common."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from etl.runtime.errors import InputError
from etl.runtime.options import option, read_options, run_program

PLURAL = {"user_id": "users", "item_id": "items"}


@dataclass
class OverlapConfig:
    """Options of `python -m etl.overlap`."""

    inputs: Any = option(MISSING, "two or more logs of any scenario")


def job(options: list[str]) -> None:
    """Print how many users and items each pair of logs shares."""
    inputs = read_options(OverlapConfig, None, options).inputs
    if not isinstance(inputs, list) or len(inputs) < 2:
        raise InputError("inputs=[A.csv,B.csv]", repr(inputs), "name at least two logs")
    import numpy as np

    from etl.logs.distinct_ids import IDS, distinct_ids
    from etl.logs.tenrec import open_logs

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
