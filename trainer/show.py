"""`python -m trainer.show run=RUN`: print a trained model's parameters, gates, neighbours, recommendations."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import MISSING

from etl.runtime.options import option, read_options, run_program


@dataclass
class ShowConfig:
    """Options of `python -m trainer.show`."""

    run: str = option(MISSING, "finished run folder")
    data: str | None = option(None, "its dataset, if that has moved")
    item: int = option(1, "dense id of the item whose neighbours are shown; 1 has most train clicks")
    user: int | None = option(None, "raw id of the user whose session is shown; the dataset's first")
    k: int = option(10, "neighbours and recommendations")


def job(options: list[str]) -> None:
    """Show the run that the options name."""
    config = read_options(ShowConfig, "trainer.conf.show", options)
    from trainer.inspection import inspect  # imports torch

    print("\n".join(inspect(config)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("trainer.show", ShowConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
