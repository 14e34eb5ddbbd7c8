"""`python -m etl.kuairand input=DIR output=FILE.csv`: KuaiRand's logs in the `qb_video` format.

KuaiRand (Gao et al. 2022) has exposures with times and outcomes, so it supports multi-task experiments
on data that anyone can download. Its standard logs and its log of randomly exposed videos are merged in
time order, in bounded memory.

    user_id, video_id → user_id, item_id      is_click → click        is_like → like
    is_follow → follow                        is_forward → share      long_view → watching_times
    first tag of the video → video_category   gender, age: absent → null
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from etl.runtime.options import option, read_options, run_program
from etl.runtime.output_file import new_log


@dataclass
class KuairandConfig:
    """Options of `python -m etl.kuairand`."""

    input: str = option(MISSING, "KuaiRand's data folder, with log_*.csv and video_features_basic*.csv")
    output: str = option(MISSING, "CSV file to write (.gz compresses it)")


def job(options: list[str]) -> None:
    """Convert a folder of KuaiRand logs."""
    config = read_options(KuairandConfig, None, options)
    from etl.logs.kuairand import convert

    with new_log(config.output) as stream:
        rows = convert(Path(config.input), stream, Path(config.output).resolve().parent)
    print(f"{rows:,} exposures: {config.output}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("etl.kuairand", KuairandConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
