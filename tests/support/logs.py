"""Generated `qb_video` logs with a learnable pattern: items follow each other around a ring."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.support.engine import write_log


def generated_log(
    path: Path, *, users: int, items: int, seed: int, clicks: tuple[int, int] = (12, 40), late: int = 0
) -> Path:
    """Write a log in which the next click is mostly the next item of the ring.

    Args:
        late: maximum number of unclicked rows of a user after the last click.
    """
    rng, late_rng = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    rows = []
    for user in range(1, users + 1):
        item, gender, age = int(rng.integers(items)), int(rng.integers(3)), int(rng.integers(8))
        for _ in range(int(rng.integers(*clicks))):
            for _ in range(int(rng.integers(0, 3))):
                shown = int(rng.integers(items))
                like = int(rng.random() < 0.05)
                rows.append((user, 1000 + shown, 0, 0, like, 0, shown % 5, 0, gender, age))
            item = (item + 1) % items if rng.random() < 0.8 else int(rng.integers(items))
            like, share, follow = (int(rng.random() < p * (1 + item % 2)) for p in (0.3, 0.1, 0.05))
            category = "\\N" if rng.random() < 0.01 else item % 5
            rows.append((user, 1000 + item, 1, follow, like, share, category, int(rng.integers(1, 4)), gender, age))
        for _ in range(int(late_rng.integers(0, late + 1))):
            shown, like = int(late_rng.integers(items)), int(late_rng.random() < 0.3)
            rows.append((user, 1000 + shown, 0, 0, like, 0, shown % 5, 1, gender, age))
    return write_log(path, rows)
