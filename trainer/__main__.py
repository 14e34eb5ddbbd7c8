"""`python -m trainer`: a dataset → a run folder with a bundle."""

import sys
from collections.abc import Sequence

from etl.runtime.options import run_program
from trainer.config import TrainerConfig, load


def job(options: list[str]) -> None:
    """Train, or resume training, the run that the options describe."""
    loaded_config = load(options)
    from trainer.launch import launch  # imports torch, which takes seconds; not needed for --help or option errors

    launch(options, loaded_config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("trainer", TrainerConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
