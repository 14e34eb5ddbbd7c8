"""First stage: reads a byte range of the log and keeps the rows that sessions may need.

Work per row dominates the cost of the job, so rows are reduced before the shuffle, and pass through
Spark as two binary values per partition of users: a copy of bytes instead of a conversion per row or
user.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from etl import protocol, statistics
from etl.dataset import CLICKED, FEEDBACK_BIT
from etl.logs.parse import BadRow, Parser
from etl.logs.splits import Split, read_blocks
from etl.runtime.arrays import AnyArray, BoolArray, IntArray
from etl.runtime.errors import InputError
from etl.runtime.lookup import lookup
from etl.stages.task_files import QUARANTINE_ROWS_PER_SPLIT, Job, write_array, write_record

PARTIAL_SCHEMA = pa.schema(
    [("partition", pa.int32()), ("block_id", pa.int64()), ("users", pa.binary()), ("rows", pa.binary())]
)
"""Shuffled records: users as `USER` and their rows as `row_dtype`, concatenated."""
USER = np.dtype(
    [
        ("user_id", "<i8"),
        ("raw_clicks", "<i4"),
        ("clicks", "<i4"),
        ("rows", "<i4"),
        ("cut", "<i4"),
        ("gender", "<i2"),
        ("age", "<i2"),
    ]
)
"""A shuffled partial user: clicks in the log and in useful rows, number of shuffled rows, useful rows cut."""
NO_VALUE = -(2**15)
"""`gender` or `age` that is null in all rows so far; -1 may be a value of the log."""
BLOCK_SHIFT = 20
"""A block id is the split's index shifted by this, plus the block's index in the split."""
CATEGORY_SHIFT = 8
"""`packed` has the feedback bits in its low byte and the category code + 1 above."""


def row_dtype(job: Job) -> np.dtype[Any]:
    """A shuffled row: raw item id, packed feedback and category, watching times."""
    fields = [("item", "<i8"), ("packed", "<i4"), ("watching", "<i4")]
    return np.dtype(fields + [("row_hash", "<u8")] * (job.dedupe == "exact"))


def map_split(job: Job, splits: list[Split], number: int) -> Iterator[pa.RecordBatch]:
    """Task: the partial users (`PARTIAL_SCHEMA`) of a split, one batch per block."""
    split = splits[number]
    with reporting_errors(job, split):
        known, counts = KnownIds(job), SplitCounts()
        for block, table in enumerate(split_tables(job, split, known, counts)):
            yield _partial_users(job, (split.index << BLOCK_SHIFT) + block, table, known, counts)


@contextlib.contextmanager
def reporting_errors(job: Job, split: Split) -> Iterator[None]:
    """Write an `InputError` to a file for the driver, which sees a task's exception only as text."""
    try:
        yield
    except InputError as error:
        record = {"expected": error.expected, "got": str(error.got), "hint": error.hint}
        write_record(job.work("errors", split.index, "json"), record)
        raise


def split_tables(job: Job, split: Split, known: KnownIds, counts: SplitCounts) -> Iterator[pa.Table]:
    """The valid rows of a split, one table per block; finally writes counts for the driver."""
    parser = Parser(job.scenario, split.file, row_hash=job.dedupe == "exact")
    blocks, fingerprint = read_blocks(split)
    for block in blocks:
        tables, bad = parser.parse(block)
        counts.add_bad(bad)
        if bad and job.strict:
            raise InputError(
                "well-formed rows",
                f"{bad[0].reason} in {bad[0].file} at byte {bad[0].byte_offset}",
                "fix the file, or run without strict=true to quarantine such rows",
            )
        table = known.select_users(pa.concat_tables(tables).unify_dictionaries()) if tables else None
        if table:
            yield table.combine_chunks()
    counts.write(job, split, known, fingerprint())


def _partial_users(job: Job, block_id: int, table: pa.Table, known: KnownIds, counts: SplitCounts) -> pa.RecordBatch:
    user = table["user_id"].to_numpy()
    if np.any(user[1:] < user[:-1]):
        order = np.argsort(user, kind="stable")
        user, table = user[order], table.take(pa.array(order))
    item, feedback = table["item_id"].to_numpy(), feedback_bits(job, table)
    clicked = feedback >= CLICKED
    counts.add_rows(job, table, feedback)
    offset = protocol.group_offsets(user)
    first = offset[:-1]
    users = np.zeros(len(first), USER)
    users["user_id"] = user[first]
    users["raw_clicks"] = np.add.reduceat(clicked, first, dtype=np.int64)
    for name in ("gender", "age"):
        users[name] = protocol.last_value(table[name].fill_null(NO_VALUE).to_numpy(), offset, NO_VALUE)
    useful = known.has_items(item)
    # Dropped unclicked rows count in the raw statistics only.
    if not job.needs_unclicked:
        useful = clicked if useful is None else useful & clicked
    row = np.arange(len(user)) if useful is None else np.flatnonzero(useful)
    offset = offset if useful is None else np.concatenate([[0], np.cumsum(useful)])[offset]
    _, users["clicks"] = protocol.clicks_through(clicked[row], offset)
    if job.truncates_early:
        keep = protocol.tail_rows(clicked[row], offset, job.max_clicks)
        users["cut"] = np.diff(offset)
        row, offset = row[keep], np.concatenate([[0], np.cumsum(keep)])[offset]
        users["cut"] -= np.diff(offset)
    users["rows"] = np.diff(offset)
    partition = partition_of(users["user_id"], job.partitions)
    order = np.argsort(partition, kind="stable")
    index, offset = protocol.regroup(order, offset)
    rows = _pack(job, table, item, feedback, row[index], counts)
    return _batch(block_id, partition[order], users[order], rows, offset)


def partition_of(user_id: AnyArray, partitions: int) -> AnyArray:
    """The partition of each user: a hash, since ids may have any pattern."""
    mixed = user_id.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing, Knuth 6.4
    return ((mixed >> np.uint64(32)) % np.uint64(partitions)).astype(np.int32)


def feedback_bits(job: Job, table: pa.Table) -> AnyArray:
    """Feedback bits of the rows, uint8."""
    feedback = table["click"].to_numpy().view(np.uint8) << FEEDBACK_BIT["click"]
    for action in job.scenario.actions:
        feedback |= table[action].to_numpy().view(np.uint8) << FEEDBACK_BIT[action]
    return feedback


def _pack(
    job: Job, table: pa.Table, item: AnyArray, feedback: AnyArray, row: IntArray, counts: SplitCounts
) -> np.ndarray[Any, Any]:
    """Pack the rows to shuffle; `row` selects them."""
    category = counts.category_codes(table["category"].combine_chunks())[row]
    rows = np.zeros(len(category), row_dtype(job))
    rows["item"] = item[row]
    rows["packed"] = ((category + 1) << CATEGORY_SHIFT) | feedback[row]
    if job.scenario.watching:
        rows["watching"] = table["watching_times"].to_numpy()[row]
    if job.dedupe == "exact":
        rows["row_hash"] = table["row_hash"].to_numpy()[row]
    return rows


def _batch(
    block_id: int,
    partition_U: AnyArray,
    users: np.ndarray[Any, Any],
    rows: np.ndarray[Any, Any],
    offset_U1: IntArray,
) -> pa.RecordBatch:
    """One record for each partition with users in this batch; users are sorted by partition."""
    bounds = protocol.group_offsets(partition_U)
    columns = [
        pa.array(partition_U[bounds[:-1]]),
        pa.array(np.full(len(bounds) - 1, block_id, np.int64)),
        _binary(users, bounds),
        _binary(rows, offset_U1[bounds]),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=PARTIAL_SCHEMA)


def _binary(values: np.ndarray[Any, Any], bounds: IntArray) -> pa.BinaryArray:
    ends = (bounds * values.dtype.itemsize).astype(np.int32)
    return pa.BinaryArray.from_buffers(pa.binary(), len(ends) - 1, [None, pa.py_buffer(ends), pa.py_buffer(values)])


class KnownIds:
    """The users and items that `users_from` and `items_from` leave; counts the rows of others.

    Attributes:
        users, items: int64, sorted; None = all.
        unknown_items, unknown_users: numbers of rows left out.
    """

    def __init__(self, job: Job) -> None:
        self.users = np.load(job.work("known_users", 0, "npy"), mmap_mode="r") if job.known_users else None
        self.items = np.load(job.work("known_items", 0, "npy"), mmap_mode="r") if job.known_items else None
        self.unknown_items = self.unknown_users = 0

    def select_users(self, table: pa.Table) -> pa.Table:
        """The rows of known users."""
        if self.users is None:
            return table
        is_known = lookup(self.users, table["user_id"].to_numpy())[1]
        self.unknown_users += int((~is_known).sum())
        return table.filter(pa.array(is_known))

    def has_items(self, item: AnyArray) -> BoolArray | None:
        """Mask of rows with known items; None = all."""
        if self.items is None:
            return None
        is_known = lookup(self.items, item)[1]
        self.unknown_items += int((~is_known).sum())
        return is_known


class SplitCounts:
    """Counts of one split, written to files, since Spark's accumulators count retries twice."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.sample: list[BadRow] = []
        self.categories: dict[str, int] = {}
        self.items: list[AnyArray] = []

    def add_bad(self, bad: list[BadRow]) -> None:
        """Count bad rows by reason and keep a sample."""
        self.reasons.update(row.reason for row in bad)
        self.sample += bad[: QUARANTINE_ROWS_PER_SPLIT - len(self.sample)]

    def category_codes(self, column: pa.DictionaryArray) -> AnyArray:
        """Codes in this split's dictionary, -1 for null."""
        names = column.dictionary.to_pylist()
        codes = [self.categories.setdefault(name, len(self.categories)) for name in names]
        lookup = np.array([*codes, -1], np.int32)
        return lookup[column.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)]

    def add_rows(self, job: Job, table: pa.Table, feedback: AnyArray) -> None:
        """Count rows for the statistics, and the clicks of each item."""
        watching = table["watching_times"].to_numpy() if job.scenario.watching else np.zeros(len(table), np.int32)
        self.counts.update(statistics.count_rows(feedback, job.scenario.actions, watching))
        self.items.append(statistics.count_items(table["item_id"].to_numpy(), feedback >= CLICKED))

    def write(self, job: Job, split: Split, known: KnownIds, fingerprint: str) -> None:
        """Write all counts for the driver."""
        write_array(job.work("raw_items", split.index, "npy"), statistics.sum_by_id(self.items, 1))
        record = {
            "file": split.file.uri,
            "fingerprint": fingerprint,
            "counts": dict(self.counts),
            "reasons": dict(self.reasons),
            "sample": [dataclasses.asdict(row) for row in self.sample],
            "categories": list(self.categories),
            "unknown": known.unknown_items,
            "of_other_users": known.unknown_users,
        }
        write_record(job.work("splits", split.index, "json"), record)
