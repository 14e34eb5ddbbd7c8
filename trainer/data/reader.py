"""Streams samples from the dataset's Parquet files, one window of row groups at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from etl.dataset import Dataset
from etl.runtime.arrays import IntArray
from trainer.config import TrainerConfig
from trainer.data.order import Order, share
from trainer.data.ragged import Ragged

T = TypeVar("T")
ENTERED_COLUMN = "watching_times"
"""Visit count of a click; read only if the model reads past actions."""
SESSION_COLUMNS = ["user_id", "items", "feedback", "n_clicks", "gender", "age"]
EXPOSURE_COLUMNS = ["exposure_items", "exposure_position", "exposure_feedback"]
LISTS = ("items", "feedback", ENTERED_COLUMN, *EXPOSURE_COLUMNS)


def session_columns(*, exposures: bool, actions: bool = False) -> list[str]:
    """Columns of the session files to read.

    Args:
        exposures: whether to read the exposures.
        actions: whether to read the inputs of past actions.
    """
    return SESSION_COLUMNS + (EXPOSURE_COLUMNS if exposures else []) + ([ENTERED_COLUMN] if actions else [])


@dataclass(frozen=True)
class Sessions:
    """N sessions in memory.

    Attributes:
        user_id: int64 `[N]`.
        items: retained clicks as dense ids, oldest first.
        feedback: bits parallel to `items`.
        watching_times: visit count of each click; empty lists if not read.
        n_clicks: int32 `[N]`, number of clicks before truncation.
        profile: int64 `[N, 2]`, gender and age, -1 where unknown.
        exposure_items, exposure_position, exposure_feedback: the exposures; empty lists if the dataset
            was prepared without them.
    """

    user_id: IntArray
    items: Ragged
    feedback: Ragged
    watching_times: Ragged
    n_clicks: npt.NDArray[np.int32]
    profile: IntArray
    exposure_items: Ragged
    exposure_position: Ragged
    exposure_feedback: Ragged

    def __len__(self) -> int:
        return len(self.user_id)

    @classmethod
    def of(cls, table: pa.Table) -> Sessions:
        """From a table of the dataset's session files; exposure columns may be missing."""
        empty = Ragged(np.zeros(len(table) + 1, np.int64), np.zeros(0, np.int64))
        lists = {name: Ragged.of(table[name]) if name in table.column_names else empty for name in LISTS}
        profile = np.stack([table[name].to_numpy().astype(np.int64) for name in ("gender", "age")], axis=1)
        return cls(user_id=table["user_id"].to_numpy(), n_clicks=table["n_clicks"].to_numpy(), profile=profile, **lists)

    def take(self, row_N: IntArray) -> Sessions:
        """Select sessions by number, in the order of `row_N`."""
        lists = {name: getattr(self, name).take(row_N) for name in LISTS}
        return replace(
            self, user_id=self.user_id[row_N], n_clicks=self.n_clicks[row_N], profile=self.profile[row_N], **lists
        )


@dataclass(frozen=True)
class GlobalBatch(Generic[T]):
    """This worker's share of a global batch.

    Attributes:
        first_sample: number of samples of the epoch before this batch, over all workers.
        samples: number of samples of the batch, over all workers.
        data: this worker's share, collated.
    """

    first_sample: int
    samples: int
    data: T


class Samples(Protocol):
    """In-memory samples of an epoch: sessions or rows."""

    def __len__(self) -> int: ...

    def take(self, row_N: IntArray, /) -> Any:
        """Select samples by number, in the order of `row_N`."""


S = TypeVar("S", bound=Samples)


class Reader(ABC, Generic[S]):
    """Streams a dataset's samples in the order of an epoch, with at most one window in memory.

    Args:
        dataset: the opened dataset.
        paths: sample files of the dataset.
    """

    def __init__(self, dataset: Dataset, paths: list[str]) -> None:
        self.dataset = dataset
        self.groups: list[tuple[str, int]] = []
        rows: list[int] = []
        for path in paths:
            metadata = pq.read_metadata(dataset.file(path))
            for group in range(metadata.num_row_groups):
                self.groups.append((path, group))
                rows.append(metadata.row_group(group).num_rows)
        self.group_rows = np.array(rows, np.int64)
        self._targets: dict[int, npt.NDArray[np.int16]] = {}

    @abstractmethod
    def _read_targets(self, group: int) -> IntArray:
        """Number of targets of each sample of a row group; samples with 0 are not trained on."""

    @abstractmethod
    def read(self, groups: IntArray) -> S:
        """Read all samples of some row groups."""

    def targets(self, group: int) -> IntArray:
        """Number of targets of each sample of a row group, cached."""
        if group not in self._targets:
            self._targets[group] = self._read_targets(group).astype(np.int16)
        return self._targets[group].astype(np.int64)

    def total_targets(self) -> int:
        """Number of targets in an epoch."""
        return sum(int(self.targets(group).sum()) for group in range(len(self.groups)))

    def order(self, config: TrainerConfig, epoch: int) -> Order:
        """The order of an epoch (from 0)."""
        return Order(
            self.group_rows,
            config.seed,
            epoch,
            self.dataset.manifest.fingerprint,
            config.train.batch_tokens,
            config.train.shuffle_buffer_sessions,
        )

    def steps(self, order: Order) -> int:
        """Number of global batches in an epoch."""
        return sum(len(self._batches(order, number, groups)) for number, groups in enumerate(order.windows()))

    def _batches(self, order: Order, window: int, groups: IntArray) -> list[IntArray]:
        """Row numbers of each batch of a window of row groups."""
        return order.batches(window, np.concatenate([self.targets(group) for group in groups]))

    def read_columns(self, groups: Iterable[int], columns: list[str]) -> pa.Table:
        """Read columns of some row groups."""
        tables = []
        for group in groups:
            path, number = self.groups[group]
            with pq.ParquetFile(self.dataset.file(path)) as file:
                tables.append(file.read_row_group(number, columns=columns, use_threads=False))
        return pa.concat_tables(tables)

    def epoch(
        self,
        order: Order,
        collate: Callable[[S, IntArray, IntArray], T],
        *,
        start: int,
        global_rank: int,
        world_size: int,
    ) -> Iterator[GlobalBatch[T]]:
        """This worker's batches of an epoch from sample `start` on.

        Windows before `start` are skipped without reading their samples.

        Args:
            order: the order of the epoch.
            collate: builds a batch from a window's samples, the row numbers of this worker's share, and
                those of the global batch.
            start: number of samples of the epoch already trained on, over all workers.
            global_rank, world_size: of this worker.
        """
        sample = 0
        for number, groups in enumerate(order.windows()):
            batches = self._batches(order, number, groups)
            samples = sum(len(batch) for batch in batches)
            if sample + samples <= start:
                sample += samples
                continue
            window = self.read(groups)
            for batch in batches:
                if sample >= start:
                    mine = share(batch, global_rank, world_size)
                    yield GlobalBatch(sample, len(batch), collate(window, mine, batch))
                sample += len(batch)


class SessionReader(Reader[Sessions]):
    """Reads sessions.

    Args:
        dataset: the opened dataset.
        exposures: whether to read the exposures.
        holdout: number of final clicks of a session that are not trained on (2; 1 for a refit).
        prefixes: maximum target clicks per session; 0 = all.
        actions: whether to read the inputs of past actions.
    """

    def __init__(
        self, dataset: Dataset, *, exposures: bool, holdout: int, prefixes: int = 0, actions: bool = False
    ) -> None:
        super().__init__(dataset, [entry.path for entry in dataset.session_files])
        self.holdout, self.prefixes = holdout, prefixes
        self.columns = session_columns(exposures=exposures, actions=actions)

    def _read_targets(self, group: int) -> IntArray:
        clicks = self.read_columns([group], ["n_clicks"])["n_clicks"].to_numpy()
        lengths = np.minimum(clicks, self.dataset.manifest.max_clicks).astype(np.int64)
        targets = np.maximum(lengths - 1 - self.holdout, 0)
        return np.minimum(targets, self.prefixes) if self.prefixes else targets

    def read(self, groups: IntArray) -> Sessions:
        """Read all sessions of some row groups."""
        return Sessions.of(self.read_columns(groups, self.columns))
