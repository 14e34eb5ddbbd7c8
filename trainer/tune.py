"""`python -m trainer.tune data=DIR output=TUNE model=MODEL`: hyperparameters by random search with early stopping.

Trials are compared on valid only; the test click is never read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from etl.runtime.options import read_options, run_program
from trainer.program_configs import TuneConfig


def load(options: Sequence[str]) -> TuneConfig:
    """Parse and validate a command line."""
    return read_options(TuneConfig, None, options)


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
