"""`python -m etl.twin output=FILE.csv scenario=qk_video users=N seed=S`: a log with a known truth."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from etl.runtime.errors import InputError
from etl.runtime.files import write_json
from etl.runtime.options import option, read_options, run_program
from etl.runtime.output_file import new_file, new_log
from etl.twin.published import FEWEST_ITEMS, PUBLISHED


@dataclass
class TwinConfig:
    """Options of `python -m etl.twin`."""

    output: str = option(MISSING, "CSV file to write (.gz compresses it); FILE.truth.json stands beside it")
    scenario: str = option(MISSING, ", ".join(PUBLISHED))
    users: int = option(MISSING, "number of users; all other sizes follow")
    items: int | None = option(None, "size of the catalogue, where it shall not follow from the users")
    task_correlation: float = option(0.5, "correlation of what drives likes, shares and follows, 0 to 1")
    successor_smoothness: float = option(
        0.7, "share of transitions that similar items have in common, 0 (only counting can learn them) to 1"
    )
    observed_topics: bool = option(False, "the category column shows an item's topic instead of hinting at it")
    blocks: float | None = option(None, "mean number of contiguous blocks of a user's rows; default: the real log's")
    seed: int = option(0, "the same seed gives the same bytes")


def job(options: list[str]) -> None:
    """Write the twin that the options describe, and its truth."""
    config = read_options(TwinConfig, "etl.conf.twin", options)
    check(config)
    from etl.twin.oracle import truth
    from etl.twin.simulate import make_twin
    from etl.twin.write import write

    begin = time.monotonic()
    output = Path(config.output)
    with new_log(config.output) as stream:
        twin = make_twin(
            config.scenario,
            users=config.users,
            items=config.items,
            task_correlation=config.task_correlation,
            successor_smoothness=config.successor_smoothness,
            observed_topics=config.observed_topics,
            blocks=config.blocks,
            seed=config.seed,
        )
        rows = write(twin, stream, scratch=output)
    with new_file(f"{output}.truth.json") as file:
        write_json(file, truth(twin))
    seconds = time.monotonic() - begin
    print(f"{rows:,} rows of {twin.users:,} users in {seconds:.0f} s ({rows / seconds:,.0f} rows/s): {output}")


def check(config: TwinConfig) -> None:
    """Raise `InputError` where an option is out of its range."""
    if config.scenario not in PUBLISHED:
        raise InputError(f"scenario one of {', '.join(PUBLISHED)}", config.scenario, "choose scenario=qb_video, say")
    if config.users < 1 or config.seed < 0:
        raise InputError("users of at least 1 and a seed of at least 0", f"{config.users}, {config.seed}", "mend them")
    if config.items is not None and config.items < FEWEST_ITEMS:
        raise InputError(f"items of at least {FEWEST_ITEMS}", config.items, "25 for each of the 40 topics")
    for name in ("task_correlation", "successor_smoothness"):
        if not 0 <= getattr(config, name) <= 1:
            raise InputError(f"{name} between 0 and 1", getattr(config, name), f"write {name}=0.5, say")
    if config.blocks is not None and not 1 <= config.blocks <= 1_000:
        raise InputError("blocks between 1 and 1000", config.blocks, "write blocks=1 for users in one block each")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("etl.twin", TwinConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
