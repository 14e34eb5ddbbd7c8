"""The job description passed to every task of the sessions job, and the files that tasks write."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from etl.logs.tenrec import SCENARIOS, Scenario
from etl.runtime.errors import InputError
from etl.runtime.files import atomic_file

QUARANTINE_ROWS_PER_SPLIT = 20
"""Maximum sampled bad rows per split; counts cover all."""
MOST_SHARDS = 64
"""Default maximum number of files of a dataset."""
Pieces = list[list[int]]
"""The pieces of one output file: `[part, first row, rows]` each."""


@dataclass(frozen=True)
class Job:
    """The job description: plain values only, since it is pickled with the tasks.

    Attributes:
        folder: the dataset folder under construction, on storage shared by all hosts.
        seed: seed of the `ctr` scenario's samples.
        partitions: number of user partitions.
        known_items: whether the work file `known_items` restricts the items (option `items_from`).
        known_users: whether the work file `known_users` restricts the users (option `users_from`).
        unclicked_per_click: sampled unclicked rows per click in the `ctr` scenario; None = all rows.
    """

    folder: str
    partitions: int
    scenario_name: str
    dedupe: str
    min_item_clicks: int
    max_item_clicks: int | None
    first_users: int | None
    clicked_only: bool
    min_clicks: int
    max_clicks: int
    exposures: bool
    known_items: bool
    known_users: bool
    unclicked_per_click: int | None
    strict: bool
    seed: int

    @property
    def scenario(self) -> Scenario:
        """The log's columns."""
        return SCENARIOS[self.scenario_name]

    @property
    def filters_items(self) -> bool:
        """Whether filters need counts over all users, so that nothing may be cut earlier."""
        return self.min_item_clicks > 1 or self.max_item_clicks is not None or self.first_users is not None

    @property
    def needs_unclicked(self) -> bool:
        """Whether unclicked rows are retained, or count as rows of their user in `protocol.first_users`."""
        return not self.clicked_only and (self.exposures or self.first_users is not None)

    @property
    def truncates_early(self) -> bool:
        """Whether partial users may be truncated before they are assembled."""
        return self.dedupe == "none" and not self.filters_items

    def work(self, kind: str, index: int, suffix: str) -> Path:
        """Intermediate file `index` of a kind."""
        return self.work_folder(kind) / f"{index:05d}.{suffix}"

    def work_folder(self, kind: str) -> Path:
        """Folder of the intermediate files of a kind."""
        return Path(self.folder) / "_work" / kind


def write_table(path: Path, table: pa.Table, **options: Any) -> None:
    """Write a Parquet file atomically."""
    with atomic_file(path) as attempt:
        pq.write_table(table, attempt, **{"compression": "zstd", **options})


def write_work_table(path: Path, table: pa.Table) -> None:
    """Write an intermediate table, without dictionaries, since it is read only once or twice."""
    write_table(path, table, compression="lz4", use_dictionary=False, write_statistics=False, row_group_size=16_384)


def write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write an array for tasks to memory-map."""
    with atomic_file(path) as attempt, attempt.open("wb") as stream:
        np.save(stream, array)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a small JSON record."""
    with atomic_file(path) as attempt:
        attempt.write_text(json.dumps(record))


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Read all JSON records of a folder, in the order of their numbers."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9]*.json"))]


def check_rows(job: Job) -> None:
    """Raise `InputError` if no row could be used."""
    splits = read_records(job.work_folder("splits"))
    if not any(split["counts"].get("exposures") for split in splits):
        reasons = {reason for split in splits for reason in split["reasons"]}
        got = f"none usable ({', '.join(sorted(reasons))})" if reasons else "none"
        if others := sum(split["of_other_users"] for split in splits):
            got += f"; {others:,} are of users that users_from lacks"
        raise InputError("input with data rows", got, "check the files")


def count_shards(rows: int, rows_per_shard: int) -> int:
    """Default number of output files by the number of rows: 1 to 64."""
    return min(MOST_SHARDS, max(1, -(-rows // rows_per_shard)))


def shard_pieces(numbered_rows: list[tuple[int, int]], shards: int) -> list[Pieces]:
    """Cut concatenated parts of `(number, rows)` into `shards` files of equal rows."""
    ends = np.cumsum([rows for _, rows in numbered_rows])
    bounds = np.arange(shards + 1) * int(ends[-1] if len(ends) else 0) // shards
    cut = []
    for begin, end in itertools.pairwise(bounds):
        pieces = []
        for (number, rows), last in zip(numbered_rows, ends, strict=True):
            low, high = max(begin, last - rows), min(end, last)
            if low < high:
                pieces.append([number, int(low - (last - rows)), int(high - low)])
        cut.append(pieces)
    return cut


def read_rows(path: Path, begin: int, rows: int) -> pa.Table:
    """Read rows `begin..begin + rows` of a Parquet file, from the row groups that contain them."""
    with pq.ParquetFile(path, memory_map=True) as file:
        ends = np.cumsum([0] + [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)])
        first = int(np.searchsorted(ends, begin, side="right")) - 1
        last = int(np.searchsorted(ends, begin + rows, side="left"))
        return file.read_row_groups(list(range(first, last))).slice(begin - int(ends[first]), rows)
