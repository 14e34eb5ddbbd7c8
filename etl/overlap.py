"""`python -m etl.overlap inputs='[A.csv,B.csv]'`: users and items that logs have in common."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from omegaconf import MISSING

from etl.command import option, read_options, run_program
from etl.folder import InputError
from etl.protocol import Int
from etl.tenrec import Scenario, open_input, open_logs

IDS = Scenario(("user_id", "item_id"), "")


@dataclass
class OverlapConfig:
    """Options of `python -m etl.overlap`."""

    inputs: Any = option(MISSING, "two or more logs of any scenario")


def distinct_ids(uri: str) -> dict[str, Int]:
    """Distinct ids of a log by column, sorted; read a block at a time.

    Raises:
        InputError: an id that is no whole number.
    """
    seen = {name: np.zeros(0, np.int64) for name in IDS.columns}
    options = pa_csv.ConvertOptions(include_columns=list(seen), column_types=dict.fromkeys(seen, pa.int64()))
    try:
        with (
            open_input(uri) as stream,
            pa_csv.open_csv(
                stream, read_options=pa_csv.ReadOptions(block_size=1 << 24), convert_options=options
            ) as batches,
        ):
            for batch in batches:
                for name, ids in seen.items():
                    seen[name] = np.union1d(ids, batch.column(name).to_numpy(zero_copy_only=False))
    except pa.ArrowInvalid as error:
        raise InputError(f"ids that are whole numbers in {uri}", str(error).splitlines()[0], "mend the file") from None
    return seen


def job(options: list[str]) -> None:
    """Print how many users and items each pair of logs shares."""
    inputs = read_options(OverlapConfig, "etl.conf.overlap", options).inputs
    if not isinstance(inputs, list) or len(inputs) < 2:
        raise InputError("inputs='[A.csv,B.csv]'", repr(inputs), "name at least two logs")
    logs = {log.uri: distinct_ids(log.uri) for log in open_logs([str(i) for i in inputs], IDS)}
    for uri, ids in logs.items():
        print(f"{uri}: {len(ids['user_id']):,} users, {len(ids['item_id']):,} items")
    for (a, left), (b, right) in itertools.combinations(logs.items(), 2):
        shared = {name: len(np.intersect1d(left[name], right[name], assume_unique=True)) for name in IDS.columns}
        print(f"{a} ∩ {b}: {shared['user_id']:,} users, {shared['item_id']:,} items")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("etl.overlap", OverlapConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
