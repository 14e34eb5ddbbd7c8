"""`python -m retrieval.average`: ensemble session models into one bundle by averaging their scores."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from etl.runtime.errors import InputError
from etl.runtime.options import option, read_options, run_program


@dataclass
class AverageConfig:
    """Options of `python -m retrieval.average`."""

    bundles: list[str] = option(MISSING, "two or more bundles of session models, all of one dataset")
    output: str = option(MISSING, "bundle to make; python -m retrieval evaluates it like any other")


def job(options: list[str]) -> None:
    """Write the bundle."""
    config = read_options(AverageConfig, None, options)
    if len(config.bundles) < 2:
        raise InputError("two bundles or more", len(config.bundles), "write bundles=[A/bundle,B/bundle]")
    if "://" in config.output:
        raise InputError("a path for output, as this program writes no URIs", config.output, "write a folder, copy it")
    if Path(config.output).exists():
        raise InputError("an output that does not exist", config.output, "name another folder")
    from retrieval.mean_bundle import write_mean

    write_mean(config.bundles, Path(config.output))
    print(f"bundle: {config.output}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("retrieval.average", AverageConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
