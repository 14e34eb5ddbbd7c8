"""`python -m trainer.apply run=RUN data=DIR output=BUNDLE`: score other logs with a trained run.

Prepare the other dataset with `items_from`, so that it uses the run's item ids.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from etl.runtime.options import read_options, run_program
from trainer.program_configs import ApplyConfig


def job(options: list[str]) -> None:
    """Write the bundle that the options ask for."""
    config = read_options(ApplyConfig, None, options)
    from trainer.score_dataset import score_dataset

    score_dataset(config)
    print(config.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("trainer.apply", ApplyConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
