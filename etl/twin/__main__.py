"""`python -m etl.twin output=FILE.csv scenario=qk_video users=N seed=S`: a log with a known truth."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from etl.command import option, read_options, run_program
from etl.folder import InputError, write_json
from etl.twin.published import PUBLISHED

FEWEST_ITEMS_OF_CATEGORY = 25


@dataclass
class TwinConfig:
    """Options of `python -m etl.twin`."""

    output: str = option(MISSING, "CSV file to write; FILE.truth.json stands beside it")
    scenario: str = option(MISSING, ", ".join(PUBLISHED))
    users: int = option(MISSING, "number of users; all other sizes follow")
    items: int | None = option(None, "size of the catalogue, where it shall not follow from the users")
    task_correlation: float = option(0.5, "what the tasks have in common, 0 to 1")
    seed: int = option(0, "the same seed gives the same bytes")


def job(options: list[str]) -> None:
    """Write the twin that the options describe, and its truth."""
    config = read_options(TwinConfig, "etl.conf.twin", options)
    check(config)
    from etl.twin.generate import make_twin, write
    from etl.twin.oracle import truth

    begin = time.monotonic()
    output = Path(config.output)
    twin = make_twin(
        config.scenario,
        users=config.users,
        items=config.items,
        task_correlation=config.task_correlation,
        seed=config.seed,
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        rows = write(twin, output)
        write_json(output.with_name(f"{output.name}.truth.json"), truth(twin))
    except OSError as error:
        raise InputError("an output file that can be written", error, "check the folder and its free space") from None
    seconds = time.monotonic() - begin
    print(f"{rows:,} rows of {twin.users:,} users in {seconds:.0f} s ({rows / seconds:,.0f} rows/s): {output}")


def check(config: TwinConfig) -> None:
    """Raise `InputError` where an option is out of its range."""
    if config.scenario not in PUBLISHED:
        raise InputError(f"scenario one of {', '.join(PUBLISHED)}", config.scenario, "choose scenario=qb_video, say")
    if config.users < 1 or config.seed < 0:
        raise InputError("users of at least 1 and a seed of at least 0", f"{config.users}, {config.seed}", "mend them")
    from etl.twin.process import CATEGORIES

    fewest = CATEGORIES * FEWEST_ITEMS_OF_CATEGORY
    if config.items is not None and config.items < fewest:
        cure = f"{FEWEST_ITEMS_OF_CATEGORY} for each of the {CATEGORIES} categories"
        raise InputError(f"items of at least {fewest}", config.items, cure)
    if not 0 <= config.task_correlation <= 1:
        raise InputError("task_correlation in 0..1", config.task_correlation, "give a share")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("etl.twin", TwinConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
