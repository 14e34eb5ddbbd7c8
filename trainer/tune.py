"""`python -m trainer.tune data=DIR output=TUNE model=MODEL`: hyperparameters by random search with early stopping.

Trials are compared on valid only; the test click is never read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import MISSING

from etl.runtime.option_checks import check_values
from etl.runtime.options import option, read_options, run_program
from trainer.config import MODELS

SCHEDULERS = ("asha", "none")


@dataclass
class TuneConfig:
    """Options of `python -m trainer.tune`."""

    data: str = option(MISSING, "dataset folder")
    output: str = option(MISSING, "folder of the search to make, or to resume; on storage that all machines share")
    model: str = option(MISSING, "model", choices=MODELS)
    trials: int = option(50, "number of trials; the first ones are the recipe and other known settings", at_least=1)
    hours: float | None = option(None, "time budget of this call in hours; null = none", above=0)
    epochs: int = option(10, "maximum number of epochs of a trial", at_least=1)
    scheduler: str = option(
        "asha", "asha = successive halving stops the worse trials early; none = all trials run", choices=SCHEDULERS
    )
    grace_epochs: int = option(2, "epochs before asha may stop a trial", at_least=1)
    reduction: int = option(3, "asha continues one in N trials at each rung", at_least=2)
    space: str | None = option(None, "YAML file with the search space; null = that of the model")
    options: str = option("", "options of python -m trainer that all trials share, with spaces between")
    seed: int = option(0, "random seed of the sampled settings", at_least=0, below=2**63)
    cores: int = option(1, "CPU cores of a trial; as many trials run at a time as cores allow", at_least=1)


def load(options: Sequence[str]) -> TuneConfig:
    """Parse and validate a command line."""
    config = read_options(TuneConfig, "trainer.conf.tune", options)
    check_values(config)
    return config


def job(options: list[str]) -> None:
    """Search, or continue the search, that the options describe, and print the best trial."""
    config = load(options)
    from trainer.tuning.search import search  # imports torch and Ray

    print(search(config))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("trainer.tune", TuneConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
