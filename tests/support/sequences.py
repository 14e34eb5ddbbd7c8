"""Item sequences (one user per line: user id, then items in time order) as a `qb_video` log.

    python -m tests.support.sequences Toys_and_Games.txt toys.csv

Then `python -m etl input=toys.csv output=toys scenario=qb_video protocol.min_clicks=3 protocol.max_clicks=50` retains
what published results on such files use: all sequences of three items or more, their last fifty.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.engine import write_log


def convert(sequences: Path, log: Path) -> int:
    """Write the log, with every item as a click without other outcomes; returns the number of clicks."""
    rows = []
    for number, line in enumerate(sequences.read_text().splitlines(), 1):
        words = line.split()
        if len(words) < 2 or not all(word.isdigit() for word in words):
            raise ValueError(f"{sequences}, line {number}: expected a user and items, got {line[:40]!r}")
        rows += [(words[0], item, 1, 0, 0, 0, "\\N", 1, "\\N", "\\N") for item in words[1:]]
    write_log(log, rows)
    return len(rows)


if __name__ == "__main__":
    print(f"{convert(Path(sys.argv[1]), Path(sys.argv[2])):,} clicks: {sys.argv[2]}")
