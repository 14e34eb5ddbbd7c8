"""Rows for ranking models: from the blocks of sessions, or from the flat rows of scenario `ctr`.

Letters: F rows, L clicks of history, K feedback tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from etl.dataset import FEEDBACK_BIT, PADDING, SPLITS, Dataset, feedback_labels
from etl.runtime.arrays import IntArray
from etl.runtime.lookup import lookup
from trainer.data.batch import FeedbackRows
from trainer.data.ragged import Ragged
from trainer.data.reader import Reader, Sessions

HISTORY = 10
"""Number of past clicks in a row's features."""
ROW_COLUMNS = ["user_id", "item", "gender", "age", "history", "click", "like", "share", "follow", "split"]


@dataclass(frozen=True)
class FlatRows:
    """F rows with their features and outcomes.

    Attributes:
        user_id: int64 `[F]`.
        item: int64 `[F]`, the candidate.
        history: int64 `[F, L]`, the last clicks before the row, oldest first, padded with 0.
        profile: int64 `[F, 2]`, gender and age.
        feedback: int16 `[F]`, outcome bits, bit 7 = clicked. Labels only.
        split: `[F]`, index in `SPLITS`.
    """

    user_id: IntArray
    item: IntArray
    history: IntArray
    profile: IntArray
    feedback: npt.NDArray[np.int16]
    split: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.item)

    def take(self, row_N: IntArray) -> FlatRows:
        """Select rows by number, in the order of `row_N`."""
        return FlatRows(*(values[row_N] for values in vars(self).values()))


@dataclass(frozen=True)
class RankBatch:
    """Tensors of one step on one worker.

    Attributes:
        user: int64 `[F]`, row in the user table; 0 = unknown.
        item: int64 `[F]`.
        history: int64 `[F, L]`.
        profile: int64 `[F, 2]`.
        label: float32 `[F, K]`.
    """

    user: torch.Tensor
    item: torch.Tensor
    history: torch.Tensor
    profile: torch.Tensor
    label: torch.Tensor

    def describe(self) -> str:
        """A short description that identifies the batch in error messages."""
        return f"{len(self.item)} rows here, items {self.item.tolist()[:8]} …"

    def to(self, device: torch.device) -> RankBatch:
        """Move the batch to a device."""
        if device.type == "cpu":
            return self
        return RankBatch(*(t.pin_memory().to(device, non_blocking=True) for t in vars(self).values()))


def block_rows(sessions: Sessions, rows: FeedbackRows) -> FlatRows:
    """Feedback rows of sessions, each with the clicks before it."""
    items, session = sessions.items, rows.session
    click = rows.position[:, None] + np.arange(-HISTORY, 0)
    index = np.clip(items.offset[session][:, None] + click, 0, max(len(items.values) - 1, 0))
    history = np.where(click >= 0, items.values[index], PADDING) if len(rows.item) else np.zeros((0, HISTORY), np.int64)
    split = np.zeros(len(rows.item), np.int8)
    profile = sessions.profile[session]
    return FlatRows(sessions.user_id[session], rows.item, history.astype(np.int64), profile, rows.feedback, split)


def rank_batch(rows: FlatRows, users: IntArray, tasks: list[str]) -> RankBatch:
    """Build a batch of rows.

    Args:
        rows: this worker's share; may be empty.
        users: int64, all training users, sorted; a user's table row is its index + 1, 0 if unknown.
        tasks: the columns of `label`.
    """
    label = np.stack([feedback_labels(rows.feedback, task) for task in tasks], axis=1)
    index, match = lookup(users, rows.user_id)
    return RankBatch(
        torch.from_numpy(np.where(match, index + 1, PADDING)),
        torch.from_numpy(rows.item),
        torch.from_numpy(rows.history),
        torch.from_numpy(np.ascontiguousarray(rows.profile)),
        torch.from_numpy(label.astype(np.float32)),
    )


def all_users(dataset: Dataset, reader: Reader[Sessions] | Reader[FlatRows]) -> IntArray:
    """The distinct users of a dataset, sorted."""
    users = [
        np.unique(reader.read_columns([group], ["user_id"])["user_id"].to_numpy())
        for group in range(len(reader.groups))
    ]
    return np.unique(np.concatenate(users)) if users else np.zeros(0, np.int64)


class RowReader(Reader[FlatRows]):
    """Reads the flat rows of scenario `ctr`, training only on rows of some splits.

    Args:
        dataset: the opened dataset.
        trained: splits to train on: train, and for a refit valid.
    """

    def __init__(self, dataset: Dataset, trained: tuple[str, ...]) -> None:
        super().__init__(dataset, [entry.path for entry in dataset.row_files])
        self.trained = trained

    def _read_targets(self, group: int) -> IntArray:
        split = self.read_columns([group], ["split"])["split"].to_numpy(zero_copy_only=False)
        return np.isin(split, self.trained).astype(np.int64)

    def read(self, groups: IntArray) -> FlatRows:
        """Read all rows of some row groups."""
        return flat_rows(self.read_columns(groups, ROW_COLUMNS))


def flat_rows(table: pa.Table) -> FlatRows:
    """Rows of scenario `ctr` from the columns of its files."""
    history = Ragged.of(table["history"])
    feedback = np.zeros(len(table), np.int16)
    for task, bit in FEEDBACK_BIT.items():
        if task in table.column_names:
            feedback |= table[task].to_numpy().astype(np.int16) << bit
    profile = np.stack([table[name].to_numpy().astype(np.int64) for name in ("gender", "age")], axis=1)
    split = (table["split"].to_numpy(zero_copy_only=False)[:, None] == np.array(SPLITS)).argmax(1)
    return FlatRows(
        table["user_id"].to_numpy(),
        table["item"].to_numpy().astype(np.int64),
        history.values.reshape(len(table), -1).astype(np.int64),
        profile,
        feedback,
        split.astype(np.int8),
    )
