"""`python -m cluster`: submit and chain the three programs."""

import sys
from collections.abc import Sequence

from cluster.config import ClusterConfig, load
from cluster.pipeline import run_pipeline
from etl.command import run_program


def job(options: list[str]) -> None:
    """Run what the options ask for."""
    print(run_pipeline(load(options).pipeline))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("cluster", ClusterConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
