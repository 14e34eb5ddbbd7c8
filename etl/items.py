"""The item table: counts and category of every kept item, and the dense ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from etl.contract import ITEMS_SCHEMA
from etl.gather import all_categories, read_whole
from etl.job import Job, write_array
from etl.protocol import Array

PARTS_AT_ONCE = 8
"""Files of counts that are summed together."""
DENSE_ENOUGH = 16
"""A look-up table may have so many places for each item."""
COUNTS = ("train_clicks", "clicks", "exposures")


def number_items(job: Job, known: pa.Table | None) -> pa.Table:
    """Count the kept items over all partitions and give them dense ids.

    Dense ids run from 1 by falling train clicks, ties by raw id; with `known` (the item table of
    another dataset) its ids are kept, items without a row here count 0.

    Returns:
        A table of `ITEMS_SCHEMA`, sorted by dense id.
    """
    counted = _sum_parts(job, "items", ["item_id"], COUNTS)
    item_id = counted["item_id"].to_numpy()
    counts = {name: counted[name].to_numpy() for name in COUNTS}
    if known is not None:
        item = known["item"].to_numpy()
        item_id, counts = _align(known["item_id"].to_numpy(), item_id, counts)
    else:
        order = np.lexsort((item_id, -counts["train_clicks"]))
        item_id, counts = item_id[order], {name: values[order] for name, values in counts.items()}
        item = np.arange(1, len(item_id) + 1, dtype=np.int32)
    category = _categories(job, item_id)
    if known is not None:  # an item that these logs never show keeps the category it had
        category = pc.coalesce(category, known["category"])
    return pa.table({"item": item, "item_id": item_id, **counts, "category": category}, schema=ITEMS_SCHEMA)


def write_lookup(job: Job, items: pa.Table) -> None:
    """Write what turns raw into dense ids, for the tasks to map into memory.

    A table with a place for every raw id takes one look-up a row; where ids are too thinly spread for
    that, the sorted ids take a binary search, some twenty look-ups far apart.
    """
    item_id, item = items["item_id"].to_numpy(), items["item"].to_numpy()
    largest = int(item_id.max(initial=0))
    if largest <= DENSE_ENOUGH * len(item_id):
        table = np.zeros(largest + 1, np.int32)
        table[item_id] = item
        write_array(job.work("dense_by_id", 0, "npy"), table)
        return
    order = np.argsort(item_id)
    write_array(job.work("item_ids", 0, "npy"), item_id[order])
    write_array(job.work("dense_ids", 0, "npy"), item[order])


def read_lookup(job: Job) -> Callable[[Array], Array]:
    """The function from kept raw ids to dense ids that `write_lookup` left."""
    table = job.work("dense_by_id", 0, "npy")
    if table.exists():
        return np.load(table, mmap_mode="r").__getitem__
    ids, dense = (np.load(job.work(kind, 0, "npy"), mmap_mode="r") for kind in ("item_ids", "dense_ids"))
    return lambda item_N: dense[np.searchsorted(ids, item_N)]


def allow_items(job: Job) -> None:
    """Write the items and the last user that the protocol's filters leave.

    Item clicks are counted over all users after `dedupe`; users are those with a row of an allowed
    item, the lowest `first_users` ids of them.
    """
    clicks = _sum_arrays(sorted(job.work_folder("item_clicks").glob("*.npy")))
    keep = np.ones(len(clicks), bool)
    if job.min_item_clicks > 1:  # 1, the default, is no limit: what was shown and never clicked stays
        keep &= clicks[:, 1] >= job.min_item_clicks
    if job.max_item_clicks is not None:
        keep &= clicks[:, 1] <= job.max_item_clicks
    allowed = clicks[keep, 0]
    write_array(job.work("allowed_items", 0, "npy"), allowed)
    last = np.iinfo(np.int64).max
    if job.first_users is not None:
        users = np.sort(np.concatenate([_users_with(job, partition, allowed) for partition in _whole(job)]))
        if len(users) > job.first_users:
            last = int(users[job.first_users - 1])
    write_array(job.work("last_user", 0, "npy"), np.array([last], np.int64))


def raw_clicks_per_item(job: Job) -> Array:
    """Rows `(item, clicks)` over the raw log."""
    return _sum_arrays(sorted(job.work_folder("raw_items").glob("*.npy")))


def _whole(job: Job) -> list[int]:
    return sorted(int(path.stem) for path in job.work_folder("whole_users").glob("[0-9]*.parquet"))


def _users_with(job: Job, partition: int, allowed: Array) -> Array:
    """Ids of the users of a partition who have a row of an allowed item."""
    users = read_whole(job, partition)
    row = np.isin(users.item, allowed)
    index = np.repeat(np.arange(len(users.user_id)), np.diff(users.offset))
    return users.user_id[np.unique(index[row])]


def _sum_arrays(paths: list[Any]) -> Array:
    """Sum `(key, value)` rows of several files by key, a few files at a time to bound memory."""
    total = np.zeros((0, 2), np.int64)
    for begin in range(0, len(paths), PARTS_AT_ONCE):
        rows = np.concatenate([total, *(np.load(path) for path in paths[begin : begin + PARTS_AT_ONCE])])
        table = pa.table({"key": rows[:, 0], "value": rows[:, 1]}).group_by("key").aggregate([("value", "sum")])
        total = np.stack([table["key"].to_numpy(), table["value_sum"].to_numpy()], axis=1)
    return total[np.argsort(total[:, 0])]


def _sum_parts(job: Job, kind: str, keys: list[str], values: tuple[str, ...]) -> pa.Table:
    """Sum the partitions' tables by key, a few at a time: together they are larger than their sum."""
    paths = sorted(job.work_folder(kind).glob("[0-9]*.parquet"))
    total: list[pa.Table] = []
    for begin in range(0, len(paths), PARTS_AT_ONCE):
        table = pa.concat_tables(total + [pq.read_table(path) for path in paths[begin : begin + PARTS_AT_ONCE]])
        summed = table.group_by(keys).aggregate([(name, "sum") for name in values])
        total = [summed.rename_columns([name.removesuffix("_sum") for name in summed.column_names])]
    return total[0]


def _align(wanted: Array, found: Array, counts: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Counts in the order of `wanted`, 0 where `found` lacks an id."""
    order = np.argsort(wanted)
    place = order[np.searchsorted(wanted[order], found)]
    aligned = {name: np.zeros(len(wanted), np.int64) for name in counts}
    for name, values in counts.items():
        aligned[name][place] = values
    return wanted, aligned


def _categories(job: Job, item_id: Array) -> pa.Array:
    """Each item's most frequent category, ties by the smaller in UTF-8 bytes; null without one."""
    pairs = _sum_parts(job, "item_categories", ["item_id", "code"], ("rows",))
    item, code, rows = (pairs[name].to_numpy() for name in ("item_id", "code", "rows"))
    order = np.lexsort((code, -rows, item))  # codes are numbered in the order of UTF-8 bytes
    item, code = item[order], code[order]
    first = np.concatenate([[True], item[1:] != item[:-1]]) if len(item) else np.zeros(0, bool)
    item, code = item[first], code[first]
    names = pa.array(all_categories(job), pa.string())
    if len(item) == 0:
        return pa.nulls(len(item_id), pa.string())
    place = np.minimum(np.searchsorted(item, item_id), len(item) - 1)
    index = pa.array(code[place] - 1, mask=item[place] != item_id)
    return names.take(index)
