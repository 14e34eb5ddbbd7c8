"""`python -m trainer.show run=RUN`: print a trained model's parameters, gates, neighbours, recommendations."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from etl.runtime.options import read_options, run_program
from trainer.program_configs import ShowConfig


def job(options: list[str]) -> None:
    """Show the run that the options name."""
    config = read_options(ShowConfig, None, options)
    from trainer.inspection import inspect  # imports torch

    print("\n".join(inspect(config)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("trainer.show", ShowConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
