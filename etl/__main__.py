"""`python -m etl`: CSV logs → a dataset folder."""

import sys
from collections.abc import Sequence

from etl.config import EtlConfig, load, unread_options
from etl.runtime.options import run_program


def job(options: list[str]) -> None:
    """Build the dataset that the options describe."""
    config = load(options)
    if names := unread_options(config):
        print(f"warning: scenario={config.scenario} does not read {', '.join(names)}", file=sys.stderr, flush=True)
    from etl.sessions import timed_build

    done, *warnings = timed_build(config)
    print(done, flush=True)
    for line in warnings:
        print(line, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("etl", EtlConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
