"""The item table: counts and category of every retained item, and the dense ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from etl.dataset import ITEMS_SCHEMA
from etl.protocol import group_offsets
from etl.runtime.arrays import AnyArray
from etl.stages.assemble_users import all_categories, read_uncut_users
from etl.stages.task_files import Job, write_array
from etl.statistics import sum_by_id

DENSE_ENOUGH = 16
"""Maximum slots of a lookup table per item."""
COUNTS = ("train_clicks", "clicks", "exposures")


def number_items(job: Job, known: pa.Table | None) -> pa.Table:
    """Count the retained items over all partitions and assign dense ids.

    Dense ids start at 1 in the order of descending train clicks, ties by raw id; with `known` (the
    item table of another dataset) its ids are used, and items without a row here have counts of 0.

    Returns:
        A table of `ITEMS_SCHEMA`, sorted by dense id.
    """
    counted = sum_by_id(_parts(job, "items"), len(COUNTS))
    item_id, counts = counted[:, 0], {name: counted[:, 1 + i] for i, name in enumerate(COUNTS)}
    if known is not None:
        item = known["item"].to_numpy()
        item_id, counts = _align(known["item_id"].to_numpy(), item_id, counts)
    else:
        order = np.lexsort((item_id, -counts["train_clicks"]))
        item_id, counts = item_id[order], {name: values[order] for name, values in counts.items()}
        item = np.arange(1, len(item_id) + 1, dtype=np.int32)
    _write_lookup(job, item_id, item)
    category = _categories(job, item)
    if known is not None:  # an item that is not in these logs keeps its category
        category = pc.coalesce(category, known["category"])
    return pa.table({"item": item, "item_id": item_id, **counts, "category": category}, schema=ITEMS_SCHEMA)


def _write_lookup(job: Job, item_id: AnyArray, item: AnyArray) -> None:
    """Write the mapping from raw to dense ids, for tasks to memory-map.

    A table with a slot for every raw id takes one lookup per row; if ids are too sparse for that, a
    binary search in the sorted ids takes some twenty non-local lookups.
    """
    largest = int(item_id.max(initial=0))
    if largest <= DENSE_ENOUGH * len(item_id):
        table = np.zeros(largest + 1, np.int32)
        table[item_id] = item
        write_array(job.work("dense_by_id", 0, "npy"), table)
        return
    order = np.argsort(item_id)
    write_array(job.work("item_ids", 0, "npy"), item_id[order])
    write_array(job.work("dense_ids", 0, "npy"), item[order])


def read_lookup(job: Job) -> Callable[[AnyArray], AnyArray]:
    """The mapping from retained raw ids to dense ids, as written by `number_items`."""
    table = job.work("dense_by_id", 0, "npy")
    if table.exists():
        return np.load(table, mmap_mode="r").__getitem__
    ids, dense = (np.load(job.work(kind, 0, "npy"), mmap_mode="r") for kind in ("item_ids", "dense_ids"))
    return lambda item_N: dense[np.searchsorted(ids, item_N)]


def allow_items(job: Job) -> None:
    """Write the items and the last user that the protocol's filters allow.

    Item clicks are counted over all users after `dedupe`; allowed users are the `first_users` lowest
    ids among those with a row of an allowed item.
    """
    clicks = sum_by_id(_arrays(job, "item_clicks"), 1)
    keep = np.ones(len(clicks), bool)
    if job.min_item_clicks > 1:  # 1, the default, is no limit: items that were shown but never clicked stay
        keep &= clicks[:, 1] >= job.min_item_clicks
    if job.max_item_clicks is not None:
        keep &= clicks[:, 1] <= job.max_item_clicks
    allowed = clicks[keep, 0]
    write_array(job.work("allowed_items", 0, "npy"), allowed)
    last = np.iinfo(np.int64).max
    if job.first_users is not None:
        users = np.sort(np.concatenate([_users_with(job, partition, allowed) for partition in _uncut_partitions(job)]))
        if len(users) > job.first_users:
            last = int(users[job.first_users - 1])
    write_array(job.work("last_user", 0, "npy"), np.array([last], np.int64))


def raw_clicks_per_item(job: Job) -> AnyArray:
    """Rows `(item, clicks)` of the raw log."""
    return sum_by_id(_arrays(job, "raw_items"), 1)


def _uncut_partitions(job: Job) -> list[int]:
    return sorted(int(path.stem) for path in job.work_folder("assembled_users").glob("[0-9]*.parquet"))


def _users_with(job: Job, partition: int, allowed: AnyArray) -> AnyArray:
    """Ids of a partition's users with a row of an allowed item."""
    users = read_uncut_users(job, partition)
    row = np.isin(users.item, allowed)
    index = np.repeat(np.arange(len(users.user_id)), np.diff(users.offset))
    return users.user_id[np.unique(index[row])]


def _arrays(job: Job, kind: str) -> Iterator[AnyArray]:
    for path in sorted(job.work_folder(kind).glob("[0-9]*.npy")):
        yield np.load(path)


def _parts(job: Job, kind: str) -> Iterator[AnyArray]:
    """All partitions' tables of a kind as int64 rows."""
    for path in sorted(job.work_folder(kind).glob("[0-9]*.parquet")):
        yield np.stack([column.to_numpy() for column in pq.read_table(path).columns], axis=1)


def _align(ids: AnyArray, counted_ids: AnyArray, counts: dict[str, AnyArray]) -> tuple[AnyArray, dict[str, AnyArray]]:
    """Counts in the order of `ids`, 0 for ids missing in `counted_ids`."""
    order = np.argsort(ids)
    index = order[np.searchsorted(ids[order], counted_ids)]
    aligned = {name: np.zeros(len(ids), np.int64) for name in counts}
    for name, values in counts.items():
        aligned[name][index] = values
    return ids, aligned


def _categories(job: Job, item: AnyArray) -> pa.Array:
    """Each item's most frequent category, ties by UTF-8 bytes; null if it has none.

    Most items have a single category: its rows are summed in one entry per item, and only rows of
    other categories are collected and compared at the end.
    """
    dense = read_lookup(job)
    names = pa.array(all_categories(job), pa.string())
    codes = len(names) + 1
    best = np.zeros(int(item.max(initial=0)) + 1, np.int64)  # code: index in `names` + 1
    rows = np.zeros(len(best), np.int64)
    further = []
    for part in _parts(job, "item_categories"):
        index, code, seen = dense(part[:, 0]).astype(np.int64), part[:, 1], part[:, 2]
        new = best[index] == 0
        best[index[new]] = code[new]
        same = best[index] == code
        rows[index[same]] += seen[same]
        further.append(np.stack([index[~same] * codes + code[~same], seen[~same]], axis=1))
    pairs = sum_by_id(further, 1)
    index, code, seen = pairs[:, 0] // codes, pairs[:, 0] % codes, pairs[:, 1]
    order = np.lexsort((code, -seen, index))  # codes are numbered in the order of UTF-8 bytes
    order = order[group_offsets(index[order])[:-1]]
    index, code, seen = index[order], code[order], seen[order]
    wins = (seen > rows[index]) | ((seen == rows[index]) & (code < best[index]))
    best[index[wins]] = code[wins]
    return names.take(pa.array(best[item] - 1, mask=best[item] == 0))
