"""`python -m etl.merlin input=QK-video.csv output=FILE.csv`: rows as NVIDIA Merlin's quick start prepares them.

Its published table of multi-task models uses these rows: clicked rows and rows without any action, of users and items
with enough rows. The output is a log of scenario `ctr` without history; use `unclicked_per_click=null` of
`python -m etl` to retain all of its rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from etl.runtime.errors import InputError
from etl.runtime.options import option, read_options, run_program
from etl.runtime.output_file import new_log


@dataclass
class MerlinConfig:
    """Options of `python -m etl.merlin`."""

    input: Any = option(MISSING, "video log, glob or URI, or a list of these, read in this order")
    output: str = option(MISSING, "CSV file to write (.gz compresses it)")
    min_user_rows: int = option(30, "drop users with fewer rows", at_least=1)
    max_user_rows: int = option(150, "drop users with more rows", at_least=1)
    min_item_rows: int = option(30, "drop items with fewer rows", at_least=1)
    rounds: int = option(5, "times that users, then items, are counted and dropped", at_least=0)


def job(options: list[str]) -> None:
    """Write the log."""
    config = read_options(MerlinConfig, None, options)
    if config.max_user_rows < config.min_user_rows:
        raise InputError("max_user_rows of at least min_user_rows", config.max_user_rows, "raise it")
    from etl.logs.merlin import Limits, prepare

    inputs = config.input if isinstance(config.input, list) else [config.input]
    limits = Limits(config.min_user_rows, config.max_user_rows, config.min_item_rows, config.rounds)
    with new_log(config.output) as stream:
        written = prepare([str(i) for i in inputs], stream, Path(config.output).resolve().parent, limits)
    print(
        f"{written.rows:,} of {written.rows_read:,} rows, {written.users:,} users, {written.items:,} items: "
        f"{config.output}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("etl.merlin", MerlinConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
