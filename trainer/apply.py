"""`python -m trainer.apply run=RUN data=DIR output=BUNDLE`: score other logs with a trained run.

Prepare the other dataset with `items_from`, so that it uses the run's item ids.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import MISSING

from etl.runtime.options import option, read_options, run_program


@dataclass
class ApplyConfig:
    """Options of `python -m trainer.apply`."""

    run: str = option(MISSING, "finished run folder")
    data: str = option(MISSING, "dataset to score, made with items_from=the run's dataset")
    output: str = option(MISSING, "bundle folder to make")
    trained_on: str | None = option(None, "the run's dataset, if that has moved")
    overwrite: bool = option(False, "replace an existing bundle")


def job(options: list[str]) -> None:
    """Write the bundle that the options ask for."""
    config = read_options(ApplyConfig, "trainer.conf.apply", options)
    from trainer.inference.score_dataset import score_dataset

    score_dataset(config)
    print(config.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("trainer.apply", ApplyConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
