"""The train clicks of all sessions, the input of every counted source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from scipy import sparse

from etl.dataset import TRAIN_HOLDOUT, Dataset
from etl.runtime.lookup import lookup
from retrieval.ragged import concat_ranges, index_in_group


@dataclass(frozen=True)
class TrainSessions:
    """The train clicks of all sessions.

    Attributes:
        user_id: int64 `[S]`, sorted.
        offset: int64 `[S + 1]` into `items`.
        items: int32, dense ids, oldest first.
        n_items: number of items of the dataset.
    """

    user_id: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    items: npt.NDArray[np.int32]
    n_items: int

    def __post_init__(self) -> None:
        # Shared by all sources, hence read-only.
        for array in (self.user_id, self.offset, self.items):
            array.flags.writeable = False

    @classmethod
    def of(cls, dataset: Dataset, held_out: int = TRAIN_HOLDOUT) -> TrainSessions:
        """Read all sessions of a dataset without their last `held_out` clicks."""
        users, lengths, items = [], [], []
        for entry in dataset.session_files:
            table = pq.read_table(dataset.file(entry.path), columns=["user_id", "items"])
            column = table["items"].combine_chunks()
            clicks = np.diff(column.offsets.to_numpy())
            position = index_in_group(clicks)
            users.append(table["user_id"].to_numpy())
            items.append(column.flatten().to_numpy()[position < np.repeat(clicks - held_out, clicks)])
            lengths.append(np.maximum(clicks - held_out, 0))
        user, length = np.concatenate(users), np.concatenate(lengths).astype(np.int64)
        order = np.argsort(user, kind="stable")
        offset, source = concat_ranges((np.cumsum(length) - length)[order], length[order])
        return cls(user[order], offset, np.concatenate(items)[source], dataset.manifest.n_items)

    def incidence(self) -> sparse.csr_matrix:
        """Binary matrix of sessions and their items `[S, n_items + 1]`."""
        shape = (len(self.user_id), self.n_items + 1)
        ones = np.ones(len(self.items), np.float32)
        # Copied, since scipy does not copy and `sum_duplicates` works in place.
        matrix = sparse.csr_matrix((ones, self.items.copy(), self.offset.copy()), shape=shape)
        matrix.sum_duplicates()
        matrix.data[:] = 1.0
        return matrix


def rows_of_users(user_S: npt.NDArray[np.int64], user_Q: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The row of each user of `user_Q` in the sorted `user_S`, -1 if missing."""
    row, match = lookup(user_S, user_Q)
    return np.where(match, row, -1)
