"""Filters rows by minimum counts per user and item, in rounds on disk; see `etl/merlin.py` for the purpose.

The log is read once. Candidate rows are spooled to a file, and the codes of their users and items to another, so that
neither the log nor the spool is ever held in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv

from etl.logs.distinct_ids import DistinctIds
from etl.logs.parse import parse_file
from etl.logs.tenrec import HISTORY, SCENARIOS, VIDEO, open_logs
from etl.runtime.arrays import BoolArray, IntArray
from etl.runtime.errors import InputError

ACTIONS = ("like", "share", "follow")
COUNTED_ROWS = 1 << 24
"""Number of rows whose codes are in memory at once."""


@dataclass(frozen=True)
class Limits:
    """Row count limits of users and items.

    Attributes:
        min_user_rows: minimum rows of a user.
        max_user_rows: maximum rows of a user.
        min_item_rows: minimum rows of an item.
        rounds: number of rounds of filtering users, then items.
    """

    min_user_rows: int
    max_user_rows: int
    min_item_rows: int
    rounds: int


@dataclass(frozen=True)
class Written:
    """Counts of written rows, users and items."""

    rows_read: int
    rows: int
    users: int
    items: int


def prepare(inputs: list[str], stream: IO[bytes], work: Path, limits: Limits) -> Written:
    """Write the remaining rows as CSV of scenario `ctr` with empty histories, in the order of the logs.

    A row remains if it was clicked or has no action, and if its user and item do. Malformed rows are left out.

    Args:
        inputs: video logs.
        stream: output stream of the CSV file.
        work: folder for temporary files, about 25 bytes per row.
        limits: which users and items remain.

    Raises:
        InputError: a log cannot be read, or no row remains.
    """
    with tempfile.TemporaryDirectory(prefix=".merlin-", dir=work) as folder:
        spool = Path(folder) / "rows.arrow"
        rows_read, user_id, item_id = _spool(inputs, spool)
        codes = Path(folder) / "codes"
        _write_codes(spool, codes, user_id, item_id)
        user, item = remaining(codes, len(user_id), len(item_id), limits)
        rows = _write_rows(spool, codes, user, item, stream)
    if not rows:
        got = f"none of {rows_read:,} rows"
        raise InputError("rows of users and items with enough rows", got, "lower min_user_rows and min_item_rows")
    return Written(rows_read, rows, int(user.sum()), int(item.sum()))


def _spool(inputs: list[str], path: Path) -> tuple[int, IntArray, IntArray]:
    """Spool the candidate rows; returns the number of rows read, and the distinct users and items, ascending."""
    scenario, rows_read = SCENARIOS["qk_video"], 0
    distinct = {name: DistinctIds() for name in ("user_id", "item_id")}
    writer = None
    for log in open_logs(inputs, scenario):
        for tables, _ in parse_file(log, scenario):
            for table in tables:
                rows_read += len(table)
                table = _candidates(table)
                for name, ids in distinct.items():
                    ids.add(table[name].to_numpy())
                if writer is None:
                    options = pa.ipc.IpcWriteOptions(compression="lz4")
                    writer = pa.ipc.new_file(path, table.schema, options=options)
                writer.write_table(table)
    if writer is None:
        raise InputError("input with data rows", "none usable", "check the files")
    writer.close()
    return rows_read, distinct["user_id"].sorted(), distinct["item_id"].sorted()


def _candidates(table: pa.Table) -> pa.Table:
    """Select rows that were clicked or have no action, with the category as text."""
    flags = {name: table[name].to_numpy() for name in ("click", *ACTIONS)}
    keep = (flags["click"] == 1) | ~np.any([flags[name] == 1 for name in ACTIONS], axis=0)
    table = table.filter(pa.array(keep))
    index = table.schema.get_field_index("category")
    return table.set_column(index, "category", table["category"].cast(pa.string())).combine_chunks()


def _batches(spool: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(spool)) as source, pa.ipc.open_file(source) as reader:
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def _write_codes(spool: Path, path: Path, user_id: IntArray, item_id: IntArray) -> None:
    """Write int32 pairs: indices of each row's user and item among the distinct ones."""
    with path.open("wb") as stream:
        for batch in _batches(spool):
            user = np.searchsorted(user_id, batch["user_id"].to_numpy())
            item = np.searchsorted(item_id, batch["item_id"].to_numpy())
            stream.write(np.stack([user, item], axis=1).astype(np.int32).tobytes())


def _pairs(path: Path) -> npt.NDArray[np.int32]:
    """Memory-map the file's pairs `[N, 2]`; handles empty files."""
    values = np.memmap(path, np.int32, mode="r") if path.stat().st_size else np.zeros(0, np.int32)
    return values.reshape(-1, 2)


def remaining(codes: Path, n_users: int, n_items: int, limits: Limits) -> tuple[BoolArray, BoolArray]:
    """Which users and items remain after all rounds, bool `[n_users]` and `[n_items]`.

    Each round filters users first, then items by the remaining rows. After the last round a user may again have
    fewer rows than the minimum.

    Args:
        codes: file of int32 pairs (user, item), one per row.
        n_users: number of user codes.
        n_items: number of item codes.
        limits: row count limits, and the number of rounds.
    """
    user, item = np.ones(n_users, bool), np.ones(n_items, bool)
    for _ in range(limits.rounds):
        rows = _count(codes, user, item, 0)
        user &= (rows >= limits.min_user_rows) & (rows <= limits.max_user_rows)
        item &= _count(codes, user, item, 1) >= limits.min_item_rows
    present = [_count(codes, user, item, column) > 0 for column in (0, 1)]
    return user & present[0], item & present[1]


def _count(codes: Path, user: BoolArray, item: BoolArray, column: int) -> IntArray:
    """Number of rows of each user (column 0) or item (column 1), over rows whose user and item remain."""
    counts = np.zeros(len((user, item)[column]), np.int64)
    pairs = _pairs(codes)
    for begin in range(0, len(pairs), COUNTED_ROWS):
        part = np.asarray(pairs[begin : begin + COUNTED_ROWS])
        part = part[user[part[:, 0]] & item[part[:, 1]]]
        counts += np.bincount(part[:, column], minlength=len(counts))
    return counts


def _write_rows(spool: Path, codes: Path, user: BoolArray, item: BoolArray, stream: IO[bytes]) -> int:
    """Write the remaining rows as CSV; returns their number."""
    columns = SCENARIOS["ctr"].columns
    stream.write((",".join(columns) + "\n").encode())
    pairs = _pairs(codes)
    begin = rows = 0
    for batch in _batches(spool):
        part = np.asarray(pairs[begin : begin + len(batch)])
        begin += len(batch)
        batch = batch.filter(pa.array(user[part[:, 0]] & item[part[:, 1]]))
        values = {name: batch[name] for name in VIDEO if name in batch.schema.names}
        values["video_category"] = batch["category"]
        values |= dict.fromkeys(HISTORY, pa.array(np.zeros(len(batch), np.int8)))
        table = pa.table([values[name] for name in columns], columns)
        pa_csv.write_csv(table, stream, pa_csv.WriteOptions(include_header=False))
        rows += len(batch)
    return rows
