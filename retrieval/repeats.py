"""Detects whether targets repeat seen items, which decides `mask_seen=auto`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from etl.dataset import TRAIN_HOLDOUT, Dataset

MAX_REPEATS = 0.005
"""Up to this share of repeats, masking loses less than seen items in the lists would cost."""
SAMPLE_SESSIONS = 200_000


@dataclass(frozen=True)
class Repeats:
    """Number of valid targets of a dataset, and of those that repeat a seen item."""

    targets: int
    repeated: int

    @property
    def share(self) -> float:
        """Share of repeats; 0 without targets."""
        return self.repeated / max(self.targets, 1)

    @property
    def mask_seen(self) -> bool:
        """The value of `mask_seen=auto`."""
        return self.targets > 0 and self.share <= MAX_REPEATS

    def __str__(self) -> str:
        return f"{self.repeated:,} of {self.targets:,} valid targets repeat a seen item"


def count_repeats(dataset: Dataset, *, sample: int = SAMPLE_SESSIONS) -> Repeats:
    """Count the repeats among a dataset's valid targets.

    Args:
        dataset: dataset of sessions; rows of scenario `ctr` have no targets.
        sample: approximate number of sessions to read, in evenly spaced row groups.
    """
    groups, sessions = [], 0
    for entry in dataset.session_files:
        count = pq.read_metadata(dataset.file(entry.path)).num_row_groups
        groups += [(entry.path, group) for group in range(count)]
        sessions += entry.rows
    n_sampled = max(1, round(len(groups) * min(1.0, sample / max(sessions, 1))))
    targets = repeated = 0
    for index in np.unique(np.linspace(0, len(groups) - 1, n_sampled).round().astype(int)) if groups else ():
        path, group = groups[index]
        with pq.ParquetFile(dataset.file(path)) as file:
            column = file.read_row_group(group, columns=["items"])["items"].combine_chunks()
        is_repeat = valid_repeats(column.offsets.to_numpy(), column.flatten().to_numpy())
        targets, repeated = targets + len(is_repeat), repeated + int(is_repeat.sum())
    return Repeats(targets, repeated)


def valid_repeats(offset: npt.NDArray[np.integer], items: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Whether each session's second last click repeats an earlier one.

    >>> valid_repeats(np.array([0, 4, 8]), np.array([1, 2, 1, 9, 1, 2, 3, 1])).tolist()
    [True, False]
    """
    offset = offset - offset[0]
    length = np.diff(offset)
    session = np.repeat(np.arange(len(length)), length)
    seen = np.arange(len(items)) < np.repeat(offset[1:] - TRAIN_HOLDOUT, length)
    target = items[np.maximum(offset[1:] - TRAIN_HOLDOUT, 0)] if len(items) else items
    hit = seen & (items == np.repeat(target, length))
    return np.bincount(session[hit], minlength=len(length)) > 0
