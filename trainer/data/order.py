"""The order of training sessions: a pure function of (seed, epoch, dataset).

The order is over *global* batches. Each worker takes a share of every batch, so the number of workers
does not change what a step computes. A position in the epoch is one integer: the number of samples
(sessions) before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from etl.runtime.arrays import IntArray

SORTED_TOGETHER = 32
"""Number of batches whose sessions are sorted by length together (length bucketing)."""


@dataclass(frozen=True)
class Order:
    """Everything that determines the order of an epoch.

    Attributes:
        group_rows: number of rows of each row group of the dataset, in file order.
        seed, epoch: of the run.
        fingerprint: of the dataset.
        batch_tokens: target clicks per global batch.
        shuffle_buffer_sessions: size of the shuffle buffer, rounded to complete row groups, at least one.
    """

    group_rows: IntArray
    seed: int
    epoch: int
    fingerprint: str
    batch_tokens: int
    shuffle_buffer_sessions: int

    def rng(self, *more: int) -> np.random.Generator:
        """An independent generator per use, so that any part of an epoch can be generated on its own."""
        return np.random.default_rng([self.seed, self.epoch, int(self.fingerprint[:15], 16), *more])

    def windows(self) -> Iterator[IntArray]:
        """Windows of row groups that are shuffled together, in the order of the epoch."""
        order = self.rng(0).permutation(len(self.group_rows))
        begin, rows = 0, 0
        for end, group in enumerate(order, 1):
            rows += int(self.group_rows[group])
            if rows >= self.shuffle_buffer_sessions or end == len(order):
                yield order[begin:end]
                begin, rows = end, 0

    def batches(self, window: int, tokens_N: IntArray) -> list[IntArray]:
        """Cut a window's sessions into global batches.

        Args:
            window: index of the window in the epoch.
            tokens_N: target clicks of each session of the window; sessions with 0 are left out.

        Returns:
            Row numbers of each batch, shortest session first. Sessions of similar length share a batch to
            save padding; the batches are shuffled.
        """
        rng = self.rng(1, window)
        row = np.flatnonzero(tokens_N > 0)
        row = row[rng.permutation(len(row))]
        mean = max(1.0, float(tokens_N[row].mean())) if len(row) else 1.0
        together = max(1, round(SORTED_TOGETHER * self.batch_tokens / mean))
        batches: list[IntArray] = []
        for begin in range(0, len(row), together):
            part = row[begin : begin + together]
            part = part[np.argsort(tokens_N[part], kind="stable")]
            through = np.cumsum(tokens_N[part])
            number = (through - 1) // self.batch_tokens
            batches += np.split(part, np.flatnonzero(np.diff(number)) + 1)
        return [batches[i] for i in rng.permutation(len(batches))]


def share(batch_N: IntArray, global_rank: int, world_size: int) -> IntArray:
    """A worker's share of a global batch: every `world_size`-th session, so that lengths are balanced."""
    return batch_N[global_rank::world_size]
