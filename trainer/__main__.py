"""`python -m trainer`: a dataset → a run folder with a bundle."""

import sys
from collections.abc import Sequence

from etl.runtime.options import run_program
from trainer.config import TrainerConfig, load


def job(options: list[str]) -> None:
    """Train, or resume training, the run that the options describe."""
    asked = load(options)
    from trainer.launch import launch  # torch takes seconds to import: --help and wrong options need none of it

    launch(options, asked)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("trainer", TrainerConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
