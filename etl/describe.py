"""`python -m etl.describe data=DIR output=FILE.html`: a dataset's tables and distributions on one page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from etl.command import option, read_options, run_program
from etl.folder import InputError


@dataclass
class DescribeConfig:
    """Options of `python -m etl.describe`."""

    data: Any = option(MISSING, "dataset folder, or a list of these, one a scenario")
    output: str = option(MISSING, "HTML file to write; an existing one is replaced")


def job(options: list[str]) -> None:
    """Write the page that the options describe."""
    config = read_options(DescribeConfig, "etl.conf.describe", options)
    from etl.contract import open_dataset
    from etl.dataset_page import page

    folders = config.data if isinstance(config.data, list) else [config.data]
    output = Path(config.output)
    if output.is_dir():
        raise InputError("output=FILE.html", f"the folder {output}", "name a file")
    text = page([open_dataset(str(folder), verify=False) for folder in folders])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    print(output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("etl.describe", DescribeConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
