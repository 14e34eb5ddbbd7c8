"""Second stage: assembles the rows of each user in a partition and applies the session protocol."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from etl import protocol, statistics
from etl.dataset import CLICKED, UNKNOWN
from etl.runtime.arrays import AnyArray, BoolArray, IntArray
from etl.runtime.lookup import lookup
from etl.stages.read_split import BLOCK_SHIFT, CATEGORY_SHIFT, NO_VALUE, USER, row_dtype
from etl.stages.task_files import Job, read_records, write_array, write_record, write_work_table


@dataclass
class Users:
    """Complete users of a partition, sorted by id, with their rows in time order.

    Attributes:
        user_id: int64 `[U]`.
        clicks, rows: int64 `[U]`, number of all clicks and rows of the user, including those already cut.
        gender, age: int16 `[U]`.
        offset: int64 `[U + 1]`, row offsets of the users.
        item, packed, watching: one value per row; the category in `packed` is a global code.
    """

    user_id: AnyArray
    clicks: AnyArray
    rows: AnyArray
    gender: AnyArray
    age: AnyArray
    offset: IntArray
    item: AnyArray
    packed: AnyArray
    watching: AnyArray

    @property
    def clicked(self) -> BoolArray:
        """Mask of the rows that are clicks."""
        return (self.packed & CLICKED) != 0

    def select_rows(self, keep: BoolArray) -> Users:
        """Select rows of the same users; recounts `clicks` and `rows`."""
        new_offset = np.concatenate([[0], np.cumsum(keep)])[self.offset]
        users = Users(
            self.user_id,
            self.clicks,
            np.diff(new_offset),
            self.gender,
            self.age,
            new_offset,
            self.item[keep],
            self.packed[keep],
            self.watching[keep],
        )
        _, users.clicks = protocol.clicks_through(users.clicked, new_offset)
        return users

    def select_users(self, keep: BoolArray) -> Users:
        """Select users, with all their rows."""
        rows = np.repeat(keep, np.diff(self.offset))
        offset = np.concatenate([[0], np.cumsum(np.diff(self.offset)[keep])])
        return Users(
            self.user_id[keep],
            self.clicks[keep],
            self.rows[keep],
            self.gender[keep],
            self.age[keep],
            offset,
            self.item[rows],
            self.packed[rows],
            self.watching[rows],
        )


def assemble_partition(job: Job, partition: int, batches: Iterator[pa.RecordBatch]) -> int:
    """Task: assemble the users of a partition, and write their cut (or, before filters, uncut) rows.

    Args:
        job: the job description.
        partition: number of the partition, used in file names.
        batches: its partial users (`PARTIAL_SCHEMA`), in any order.

    Returns:
        Number of sessions, or of uncut users if filters still need counts.
    """
    users, raw_clicks = _merge_partial_users(job, list(batches))
    values, counts = np.unique(raw_clicks, return_counts=True)
    write_array(job.work("raw_clicks_per_user", partition, "npy"), np.stack([values, counts], axis=1))
    return cut_users(job, partition, users) if job.truncates_early else _write_uncut_users(job, partition, users)


def cut_filtered_partition(job: Job, partition: int) -> int:
    """Task: filter a partition's uncut users by item and user id, and cut them into files.

    Returns:
        Number of sessions.
    """
    users = read_uncut_users(job, partition)
    allowed = np.load(job.work("allowed_items", 0, "npy"), mmap_mode="r")
    users = users.select_rows(lookup(allowed, users.item)[1])
    last_user = np.load(job.work("last_user", 0, "npy"))[0]
    users = users.select_users(users.user_id <= last_user)
    if not job.exposures:
        users = users.select_rows(users.clicked)
    return cut_users(job, partition, users)


def _merge_partial_users(job: Job, batches: list[pa.RecordBatch]) -> tuple[Users, AnyArray]:
    """The users of a partition after `protocol.dedupe`, and each user's number of clicks in the raw log."""
    dtype = row_dtype(job)
    records = [record for batch in batches for record in batch.to_pylist()]
    block_of_record = np.array([r["block_id"] for r in records], np.int64)
    block_id = np.repeat(block_of_record, np.array([len(r["users"]) // USER.itemsize for r in records], np.int64))
    users_P = np.frombuffer(b"".join(r["users"] for r in records), USER)
    rows = np.frombuffer(b"".join(r["rows"] for r in records), dtype)
    del records
    order = np.lexsort((block_id, users_P["user_id"]))
    index, offset = protocol.regroup(order, np.concatenate([[0], np.cumsum(users_P["rows"])]))
    block_id, users_P, rows = block_id[order], users_P[order], rows[index]
    part_offset = protocol.group_offsets(users_P["user_id"])
    first = part_offset[:-1]
    packed = global_categories(job, rows["packed"], np.repeat(block_id >> BLOCK_SHIFT, np.diff(offset)))
    users = Users(
        users_P["user_id"][first],
        _sum(users_P["clicks"], first),
        _sum(users_P["rows"] + users_P["cut"], first),
        _profile(users_P["gender"], part_offset),
        _profile(users_P["age"], part_offset),
        offset[part_offset],
        rows["item"],
        packed,
        rows["watching"],
    )
    if job.dedupe != "none":
        index = np.repeat(np.arange(len(first)), np.diff(users.offset))
        row_hash = rows["row_hash"] if job.dedupe == "exact" else rows["item"]
        users = users.select_rows(protocol.dedupe(job.dedupe, index, users.item, users.clicked, row_hash))
    return users, _sum(users_P["raw_clicks"], first)


def _sum(value_P: AnyArray, first_U: IntArray) -> AnyArray:
    return np.add.reduceat(value_P, first_U, dtype=np.int64) if len(first_U) else np.zeros(0, np.int64)


def _profile(value_P: AnyArray, offset_U1: IntArray) -> AnyArray:
    last = protocol.last_value(value_P, offset_U1, NO_VALUE)
    return np.where(last == NO_VALUE, UNKNOWN, last).astype(np.int16)


def all_categories(job: Job) -> list[str]:
    """Categories of all splits, sorted by UTF-8 bytes; a category's global code is its index."""
    names = {name for record in read_records(job.work_folder("splits")) for name in record["categories"]}
    return sorted(names, key=str.encode)


def global_categories(job: Job, packed_N: AnyArray, split_N: AnyArray) -> AnyArray:
    """Replace each split's category codes by global codes of `all_categories`."""
    records = read_records(job.work_folder("splits"))
    code = {name: index + 1 for index, name in enumerate(all_categories(job))}
    lengths = [1 + len(record["categories"]) for record in records]
    base = np.concatenate([[0], np.cumsum(lengths)])
    lookup = np.array([c for r in records for c in (0, *(code[n] for n in r["categories"]))], np.int32)
    feedback = packed_N & ((1 << CATEGORY_SHIFT) - 1)
    return feedback | lookup[base[split_N] + (packed_N >> CATEGORY_SHIFT)] << CATEGORY_SHIFT


def _write_uncut_users(job: Job, partition: int, users: Users) -> int:
    """Write uncut users and item click counts, for filters that need counts over all users."""
    lengths = np.diff(users.offset)
    table = pa.table({name: getattr(users, name) for name in ("item", "packed", "watching")})
    write_work_table(job.work("assembled_rows", partition, "parquet"), table)
    table = pa.table(
        {"rows": lengths} | {name: getattr(users, name) for name in ("user_id", "clicks", "gender", "age")}
    )
    write_work_table(job.work("assembled_users", partition, "parquet"), table)
    write_array(job.work("item_clicks", partition, "npy"), statistics.count_items(users.item, users.clicked))
    return len(lengths)


def read_uncut_users(job: Job, partition: int) -> Users:
    """Read the uncut users of a partition, written by the first pass of a filtering protocol."""
    rows = pq.read_table(job.work("assembled_rows", partition, "parquet"))
    users = pq.read_table(job.work("assembled_users", partition, "parquet"))
    column = {
        t: c.to_numpy() for table in (rows, users) for t, c in zip(table.column_names, table.columns, strict=True)
    }
    return Users(offset=np.concatenate([[0], np.cumsum(column["rows"])]), **column)


# ---------------------------------------------------------------------------------------------
# Cutting


def cut_users(job: Job, partition: int, users: Users) -> int:
    """Cut users to sessions; writes files with raw item ids, item counts and statistics.

    Returns:
        The number of sessions.
    """
    clicked = users.clicked
    cut = protocol.cut(clicked, users.offset, users.clicks, min_clicks=job.min_clicks, max_clicks=job.max_clicks)
    row = cut.row_N
    index = np.repeat(np.cumsum(cut.user_U) - 1, np.diff(users.offset))[row]
    n_sessions = int(cut.user_U.sum())
    item, packed, position = users.item[row], users.packed[row], cut.position_N[row]
    feedback, category = (packed & 0xFF).astype(np.int16), packed >> CATEGORY_SHIFT
    click = clicked[row]
    click_offset = _offsets(index[click], n_sessions)
    shown = np.ones(len(item), bool) if job.exposures else np.zeros(len(item), bool)
    shown_offset = _offsets(index[shown], n_sessions)
    table = pa.table(
        {
            "user_id": users.user_id[cut.user_U],
            "items": _lists(click_offset, item[click]),
            "feedback": _lists(click_offset, (feedback[click] & ~CLICKED).astype(np.int8)),
            "watching_times": _lists(click_offset, users.watching[row][click]),
            "n_clicks": cut.clicks_U[cut.user_U].astype(np.int32),
            "gender": users.gender[cut.user_U].astype(np.int8),
            "age": users.age[cut.user_U].astype(np.int8),
            "exposure_items": _lists(shown_offset, item[shown]),
            "exposure_position": _lists(shown_offset, position[shown].astype(np.int16)),
            "exposure_feedback": _lists(shown_offset, feedback[shown]),
        }
    )
    write_work_table(job.work("cut", partition, "parquet"), table)
    retained_N = np.repeat(cut.retained_U, np.diff(users.offset))[row]
    # Click positions count from 1: positions 1..n-2 are train, n-1 valid, n test.
    train = click & (position + 1 <= retained_N - 2)
    write_items(job, partition, item, category, click, train)
    counts = statistics.count_rows(feedback, job.scenario.actions, users.watching[row])
    counts["before_first"] = int(users.rows[cut.user_U].sum()) - len(item)
    counts["after_test"] = int(np.count_nonzero(position == retained_N))
    record = {
        "sessions": n_sessions,
        "counts": counts,
        "clicks_per_user": statistics.histogram(cut.retained_U[cut.user_U]),
    }
    write_record(job.work("cut", partition, "json"), record)
    return n_sessions


def _offsets(index_N: AnyArray, n: int) -> IntArray:
    return np.concatenate([[0], np.cumsum(np.bincount(index_N, minlength=n))]).astype(np.int64)


def _lists(offset: IntArray, values: AnyArray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offset.astype(np.int32)), pa.array(values))


def write_items(
    job: Job,
    partition: int,
    item_N: AnyArray,
    category_N: AnyArray,
    click_N: BoolArray,
    train_N: BoolArray,
    also: AnyArray | None = None,
) -> None:
    """Write a partition's counts for the item table; items in `also` are listed even with counts of 0."""
    unique, inverse = statistics.distinct(item_N)
    if also is not None:
        unique = np.concatenate([unique, np.setdiff1d(also, unique)])
    counts = {
        "item_id": unique,
        "train_clicks": np.bincount(inverse[train_N], minlength=len(unique)),
        "clicks": np.bincount(inverse[click_N], minlength=len(unique)),
        "exposures": np.bincount(inverse, minlength=len(unique)),
    }
    write_work_table(job.work("items", partition, "parquet"), pa.table(counts))
    known = category_N > 0
    codes = int(category_N.max(initial=0)) + 1
    pair, index = statistics.distinct(inverse[known].astype(np.int64) * codes + category_N[known])
    rows = np.bincount(index, minlength=len(pair))
    table = pa.table({"item_id": unique[pair // codes], "code": pair % codes, "rows": rows})
    write_work_table(job.work("item_categories", partition, "parquet"), table)
