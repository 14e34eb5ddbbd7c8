"""`python -m etl.describe data=DIR output=FILE.html`: a dataset's tables and distributions on one page.

`python -m etl.describe input=LOG.csv scenario=qk_video output=FILE.html` compares a log with the real one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from etl.runtime.errors import InputError
from etl.runtime.options import option, read_options, run_program
from etl.runtime.output_file import new_file


@dataclass
class DescribeConfig:
    """Options of `python -m etl.describe`."""

    data: Any = option(None, "dataset folder, or a list of these, one a scenario")
    input: Any = option(None, "log, or list of logs, to hold against public scans of the real one instead")
    scenario: str | None = option(None, "scenario of input: qk_video, qb_video, qk_article, qb_article")
    output: str = option(MISSING, "HTML file to write; an existing one is replaced")


def job(options: list[str]) -> None:
    """Write the page."""
    config = read_options(DescribeConfig, None, options)
    if (config.data is None) == (config.input is None):
        raise InputError("data=DIR or input=LOG.csv", "both" if config.data else "neither", "name one of them")
    text = _log_page(config) if config.data is None else _dataset_page(config)
    with new_file(config.output) as file:
        file.write_text(text, encoding="utf-8")
    print(config.output)


def _dataset_page(config: DescribeConfig) -> str:
    from etl.dataset import open_dataset
    from etl.dataset_page import page

    folders = config.data if isinstance(config.data, list) else [config.data]
    return page([open_dataset(str(folder), verify=False) for folder in folders])


def _log_page(config: DescribeConfig) -> str:
    from etl.dataset_page import log_page
    from etl.logs.scan import scan
    from etl.logs.tenrec_published import SCAN_STATISTICS

    if config.scenario not in SCAN_STATISTICS:
        raise InputError(
            f"scenario one of {', '.join(SCAN_STATISTICS)}", config.scenario, "name the scenario of the log"
        )
    inputs = config.input if isinstance(config.input, list) else [config.input]
    return log_page(
        config.scenario, [str(name) for name in inputs], scan([str(name) for name in inputs], config.scenario)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("etl.describe", DescribeConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
