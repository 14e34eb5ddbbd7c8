"""First stage: each split becomes one record per user that appears in it.

Work per row decides the cost of the job, so rows are reduced here, before the shuffle, and travel
through Spark as one binary value per user: a copy of bytes instead of a conversion per element.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from etl import protocol, table_one
from etl.contract import CLICKED, FEEDBACK_BIT
from etl.folder import InputError
from etl.job import QUARANTINE_ROWS_PER_SPLIT, Job, write_array, write_record
from etl.parse import BadRow, Parser
from etl.tenrec import LogFile, Split, read_blocks

PARTIAL_USERS = "user_id long, part long, raw_clicks long, clicks long, gender short, age short, rows binary"
USERS_PER_BATCH = 20_000
NO_VALUE = -(2**15)
"""`gender` or `age` null in all rows so far; -1 may be a value of the log."""
PART_SHIFT = 20
"""A part number is its split's index shifted by this, plus the block inside the split."""
CATEGORY_SHIFT = 8
"""`packed` holds the feedback bits in its low byte and the category's code + 1 above."""


def row_dtype(job: Job) -> np.dtype[Any]:
    """One row as it travels: raw item id, packed feedback and category, watching times."""
    fields = [("item", "<i8"), ("packed", "<i4"), ("watching", "<i4")]
    return np.dtype(fields + [("row_hash", "<u8")] * (job.dedupe == "exact"))


def combine_splits(job: Job, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Spark task: split descriptions in, partial users (`PARTIAL_USERS`) out."""
    for batch in batches:
        for text in batch.column(0).to_pylist():
            raw = json.loads(text)
            file = LogFile(**{**raw["file"], "columns": tuple(raw["file"]["columns"])})
            split = Split(raw["index"], file, raw["begin"], raw["end"])
            try:
                yield from _combine(job, split)
            except InputError as error:
                # The driver sees a task's exception only as text: leave the error itself for it.
                told = {"expected": error.expected, "got": str(error.got), "cure": error.cure}
                write_record(job.work("errors", split.index, "json"), told)
                raise


def _combine(job: Job, split: Split) -> Iterator[pa.RecordBatch]:
    parser = Parser(job.scenario, split.file, row_hash=job.dedupe == "exact")
    known = np.load(job.work("known_items", 0, "npy"), mmap_mode="r") if job.known_items else None
    seen = _Seen()
    blocks, fingerprint = read_blocks(split)
    for number, block in enumerate(blocks):
        tables, bad = parser.parse(block)
        seen.add_bad(bad)
        if bad and job.strict:
            raise InputError(
                "well-formed rows",
                f"{bad[0].reason} in {bad[0].file} at byte {bad[0].byte_offset}",
                "mend the file, or run without strict=true to quarantine such rows",
            )
        if tables:
            table = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
            yield from _partial_users(job, (split.index << PART_SHIFT) + number, table, known, seen)
    seen.write(job, split, fingerprint())


def _partial_users(job: Job, part: int, table: pa.Table, known: Any, seen: _Seen) -> Iterator[pa.RecordBatch]:
    user = table["user_id"].to_numpy()
    rows, clicked = _pack(job, table, seen)
    gender, age = (table[name].fill_null(NO_VALUE).to_numpy() for name in ("gender", "age"))
    seen.count_rows(job, rows, clicked)
    if known is not None:
        place = np.minimum(np.searchsorted(known, rows["item"]), len(known) - 1)
        is_known = known[place] == rows["item"] if len(known) else np.zeros(len(rows), bool)
        seen.unknown += int((~is_known).sum())
    else:
        is_known = np.ones(len(rows), bool)
    if np.any(user[1:] < user[:-1]):
        order = np.argsort(user, kind="stable")
        user, rows, clicked, is_known = user[order], rows[order], clicked[order], is_known[order]
        gender, age = gender[order], age[order]
    offset = protocol.group_offsets(user)
    first = offset[:-1]
    # Without exposures, unclicked rows count in the raw statistics only, and as rows of their user.
    useful = is_known & (clicked if not job.exposures and job.first_users is None else True)
    clicks = [protocol.clicks_through(which, offset)[1] for which in (clicked, clicked & is_known)]
    keep = useful & protocol.tail_rows(clicked & is_known, offset, job.max_clicks) if job.truncates_early else useful
    kept = np.concatenate([[0], np.cumsum(keep)])
    last = [protocol.last_value(values, offset, NO_VALUE).astype(np.int16) for values in (gender, age)]
    yield from _batches(user[first], part, clicks, last, rows[keep], kept[offset])


def _pack(job: Job, table: pa.Table, seen: _Seen) -> tuple[np.ndarray[Any, Any], protocol.Mask]:
    clicked = table["click"].to_numpy() == 1
    packed = clicked.astype(np.int32) * CLICKED
    for action in job.scenario.actions:
        packed |= table[action].to_numpy() << FEEDBACK_BIT[action]
    packed |= (seen.category_codes(table["category"].combine_chunks()) + 1) << CATEGORY_SHIFT
    rows = np.zeros(len(table), row_dtype(job))
    rows["item"], rows["packed"] = table["item_id"].to_numpy(), packed
    if job.scenario.watching:
        rows["watching"] = table["watching_times"].to_numpy()
    if job.dedupe == "exact":
        rows["row_hash"] = table["row_hash"].to_numpy()
    return rows, clicked


def _batches(
    user: protocol.Array,
    part: int,
    clicks: list[protocol.Int],
    last: list[protocol.Array],
    rows: np.ndarray[Any, Any],
    offset: protocol.Int,
) -> Iterator[pa.RecordBatch]:
    for begin in range(0, len(user), USERS_PER_BATCH):
        end = min(begin + USERS_PER_BATCH, len(user))
        span = rows[offset[begin] : offset[end]]
        ends = ((offset[begin : end + 1] - offset[begin]) * rows.dtype.itemsize).astype(np.int32)
        binary = pa.BinaryArray.from_buffers(
            pa.binary(), end - begin, [None, pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(span))]
        )
        arrays = [
            pa.array(user[begin:end]),
            pa.array(np.full(end - begin, part, np.int64)),
            *(pa.array(values[begin:end]) for values in (*clicks, *last)),
            binary,
        ]
        yield pa.RecordBatch.from_arrays(arrays, ["user_id", "part", "raw_clicks", "clicks", "gender", "age", "rows"])


class _Seen:
    """What one split counted: it leaves through files, since Spark's accumulators count retries twice."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.sample: list[BadRow] = []
        self.categories: dict[str, int] = {}
        self.items: list[protocol.Array] = []
        self.unknown = 0

    def add_bad(self, bad: list[BadRow]) -> None:
        self.reasons.update(row.reason for row in bad)
        self.sample += bad[: QUARANTINE_ROWS_PER_SPLIT - len(self.sample)]

    def category_codes(self, column: pa.DictionaryArray) -> protocol.Array:
        """Codes of this split's own dictionary, -1 for null."""
        names = column.dictionary.to_pylist()
        codes = [self.categories.setdefault(name, len(self.categories)) for name in names]
        lookup = np.array([*codes, -1], np.int32)
        return lookup[column.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)]

    def count_rows(self, job: Job, rows: np.ndarray[Any, Any], clicked: protocol.Mask) -> None:
        self.counts.update(table_one.count_rows(rows["packed"] & 0xFF, job.scenario.actions))
        self.items.append(_count_items(rows["item"], clicked))

    def write(self, job: Job, split: Split, fingerprint: str) -> None:
        items = np.concatenate(self.items) if self.items else np.zeros((0, 2), np.int64)
        write_array(job.work("raw_items", split.index, "npy"), items)
        record = {
            "file": split.file.uri,
            "fingerprint": fingerprint,
            "counts": dict(self.counts),
            "reasons": dict(self.reasons),
            "sample": [dataclasses.asdict(row) for row in self.sample],
            "categories": list(self.categories),
            "unknown": self.unknown,
        }
        write_record(job.work("splits", split.index, "json"), record)


def _count_items(item_N: protocol.Array, clicked_N: protocol.Mask) -> protocol.Array:
    """Rows `(item, clicks)` int64, one for each distinct item."""
    items, place = table_one.distinct(item_N)
    return np.stack([items, np.bincount(place[clicked_N], minlength=len(items))], axis=1)
