"""`python -m etl.twin output=FILE.csv scenario=qk_video users=N seed=S`: a synthetic log with known ground truth."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from etl.logs.tenrec_published import FEWEST_ITEMS, PUBLISHED
from etl.runtime.errors import InputError
from etl.runtime.files import write_json
from etl.runtime.options import option, read_options, run_program
from etl.runtime.output_file import new_file, new_log


@dataclass
class TwinConfig:
    """Options of `python -m etl.twin`."""

    output: str = option(MISSING, "CSV file to write (.gz compresses it), with FILE.truth.json next to it")
    scenario: str = option(MISSING, "log to generate", choices=tuple(PUBLISHED))
    users: int = option(MISSING, "number of users; all other sizes follow", at_least=1)
    items: int | None = option(
        None, "number of items; default: in the published proportion to the users", at_least=FEWEST_ITEMS
    )
    task_correlation: float = option(0.5, "correlation of what drives likes, shares and follows", at_least=0, at_most=1)
    successor_smoothness: float = option(
        0.7,
        "share of successors that similar items have in common; 0 = each item has its own: only counting learns them",
        at_least=0,
        at_most=1,
    )
    observed_topics: bool = option(False, "the category column shows an item's topic instead of hinting at it")
    blocks: float | None = option(
        None, "mean number of contiguous blocks of a user's rows; default: the real log's", at_least=1, at_most=1_000
    )
    history: bool = option(False, "write scenario ctr: rows with their user's first ten clicks, and no truth")
    seed: int = option(0, "random seed; the same seed gives the same bytes", at_least=0)


def job(options: list[str]) -> None:
    """Write the synthetic log, and its ground truth."""
    config = read_options(TwinConfig, None, options)
    if config.history and not config.scenario.endswith("video"):
        raise InputError("a video log for history=true", config.scenario, "choose scenario=qk_video")
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
        if not config.history:  # the ground truth is for sessions; written first, so that no log is without it
            with new_file(f"{output}.truth.json") as file:
                write_json(file, truth(twin))
        rows = write(twin, stream, scratch=output, history=config.history)
    seconds = time.monotonic() - begin
    print(f"{rows:,} rows of {twin.users:,} users in {seconds:.0f} s ({rows / seconds:,.0f} rows/s): {output}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run_program("etl.twin", TwinConfig, job, argv)


if __name__ == "__main__":
    sys.exit(main())
