"""Scenario `ctr`: flat rows, each with a history, for ranking models, instead of sessions.

As in the benchmark's multi-task set-up: all clicked rows, sampled unclicked rows for each (two by default),
and a random split by row. Both depend on the seed and the row's index in the log, not on the cluster.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from etl import statistics
from etl.dataset import CLICKED, FEEDBACK_BIT, ROWS_FOLDER, ROWS_SCHEMA, SPLITS, UNKNOWN, DataFile, describe_file
from etl.engines.engine import Engine
from etl.logs.splits import Split
from etl.messages import refuse_empty
from etl.stages.assemble_users import all_categories, global_categories, write_items
from etl.stages.item_ids import number_items, read_lookup
from etl.stages.read_split import (
    CATEGORY_SHIFT,
    KnownIds,
    SplitCounts,
    feedback_bits,
    reporting_errors,
    split_tables,
)
from etl.stages.task_files import (
    Job,
    Pieces,
    check_rows,
    count_shards,
    read_records,
    read_rows,
    shard_pieces,
    write_array,
    write_record,
    write_table,
    write_work_table,
)

TRAIN_SHARE, VALID_SHARE = 0.8, 0.1
ROWS_PER_GROUP = 65_536
ROWS_PER_SHARD = 65_536


def make_rows(
    engine: Engine, job: Job, splits: list[Split], known: pa.Table | None, shards: int | None
) -> tuple[pa.Table, list[DataFile]]:
    """Sample the rows of all splits, number their items and write the row files.

    Returns:
        The item table and the manifest entries of the files.
    """
    engine.map(partial(sample_split, job, splits), len(splits))
    check_rows(job)
    rows = engine.map(partial(count_split, job), len(splits))
    _count_users(job)
    refuse_empty(job)
    items = number_items(job, known)
    shards = shards or count_shards(sum(rows), ROWS_PER_SHARD)
    written = engine.map(partial(write_shard, job, shard_pieces(list(enumerate(rows)), shards)), shards)
    return items, [DataFile(**entry) for entry in written]


def sample_split(job: Job, splits: list[Split], number: int) -> int:
    """Task: write a split's sampled rows with raw item ids.

    Returns:
        Number of rows.
    """
    split = splits[number]
    with reporting_errors(job, split):
        return _sample(job, split)


def _sample(job: Job, split: Split) -> int:
    known, counts = KnownIds(job), SplitCounts()
    # One generator per split: its draws depend only on the seed and the split's rows.
    rng = np.random.default_rng([job.seed, split.index])
    tables, users = [], []
    for table in split_tables(job, split, known, counts):
        item, feedback = table["item_id"].to_numpy(), feedback_bits(job, table)
        clicked = feedback >= CLICKED
        counts.add_rows(job, table, feedback)
        is_known = known.has_items(item)
        row = _sampled(clicked, is_known, job.unclicked_per_click, rng)
        user, index = statistics.distinct(table["user_id"].to_numpy())
        in_all, n_rows, n_clicks = (
            np.bincount(index[rows], minlength=len(user)) for rows in (clicked, row, row[clicked[row]])
        )
        users.append(np.stack([user, in_all, n_rows, n_clicks], axis=1))
        category = counts.category_codes(table["category"].combine_chunks()) + 1
        history = np.stack([table[name].to_numpy()[row] for name in job.scenario.history], axis=1)
        if known.items is not None:  # items unknown to the other dataset become 0 in the history
            history[~np.isin(history, known.items)] = 0
        split_name = np.searchsorted([TRAIN_SHARE, TRAIN_SHARE + VALID_SHARE], rng.random(len(row)), side="right")
        profile = {name: table[name].fill_null(UNKNOWN).to_numpy()[row].astype(np.int8) for name in ("gender", "age")}
        columns: dict[str, Any] = {"user_id": table["user_id"].to_numpy()[row], "item": item[row]}
        columns |= {"packed": feedback[row] | category[row] << CATEGORY_SHIFT, **profile}
        columns |= {"split": split_name.astype(np.int8), "watching": table["watching_times"].to_numpy()[row]}
        columns |= {f"history_{index}": history[:, index] for index in range(history.shape[1])}
        tables.append(pa.table(columns))
    write_array(job.work("rows_of_users", split.index, "npy"), statistics.sum_by_id(users, 3))
    if tables:
        write_work_table(job.work("sampled", split.index, "parquet"), pa.concat_tables(tables))
    return sum(len(table) for table in tables)


def _sampled(clicked: Any, is_known: Any, unclicked_per_click: int | None, rng: np.random.Generator) -> Any:
    """Sorted indices of the clicked rows and of sampled unclicked ones for each (all, if there are fewer)."""
    useful = np.ones(len(clicked), bool) if is_known is None else is_known
    click, rest = np.flatnonzero(clicked & useful), np.flatnonzero(~clicked & useful)
    n_unclicked = len(rest) if unclicked_per_click is None else min(len(rest), unclicked_per_click * len(click))
    return np.sort(np.concatenate([click, rng.choice(rest, n_unclicked, replace=False)]))


def count_split(job: Job, number: int) -> int:
    """Task: replace a split's category codes by global codes, and count its items.

    Returns:
        Number of rows.
    """
    path = job.work("sampled", number, "parquet")
    return _count(job, number, pq.read_table(path)) if path.exists() else 0


def _count(job: Job, number: int, rows: pa.Table) -> int:
    packed = global_categories(job, rows["packed"].to_numpy(), np.full(len(rows), number))
    rows = rows.set_column(rows.schema.get_field_index("packed"), "packed", pa.array(packed))
    feedback, item = packed & 0xFF, rows["item"].to_numpy()
    click = feedback >= CLICKED
    # Items that occur only in histories are in the item table too: models embed them.
    history = np.concatenate([rows[f"history_{k}"].to_numpy() for k in range(len(job.scenario.history))])
    history = np.unique(history[history != 0])
    train = click & (rows["split"].to_numpy() == 0)
    write_items(job, number, item, packed >> CATEGORY_SHIFT, click, train, also=history)
    write_work_table(job.work("counted", number, "parquet"), rows)
    record = {"counts": statistics.count_rows(feedback, job.scenario.actions, rows["watching"].to_numpy())}
    write_record(job.work("kept", number, "json"), record)
    return len(rows)


def _count_users(job: Job) -> None:
    """Write user counts for the statistics."""
    paths = sorted(job.work_folder("rows_of_users").glob("[0-9]*.npy"))
    users = statistics.sum_by_id((np.load(path) for path in paths), 3)
    retained = users[users[:, 2] > 0]
    write_array(job.work("raw_clicks_per_user", 0, "npy"), np.array(statistics.histogram(users[:, 1])))
    counts: dict[str, int] = {}
    for record in read_records(job.work_folder("kept")):
        counts = {name: counts.get(name, 0) + value for name, value in record["counts"].items()}
    summary = {"sessions": len(retained), "counts": counts, "clicks_per_user": statistics.histogram(retained[:, 3])}
    write_record(job.work("cut", 0, "json"), summary)


def write_shard(job: Job, shards: list[Pieces], shard: int) -> dict[str, Any]:
    """Task: write a file of rows.

    Returns:
        The file's manifest entry.
    """
    dense, names = read_lookup(job), pa.array(all_categories(job), pa.string())
    pieces = [ROWS_SCHEMA.empty_table()]
    for number, begin, rows in shards[shard]:
        pieces.append(_final(job, read_rows(job.work("counted", number, "parquet"), begin, rows), dense, names))
    name = f"{ROWS_FOLDER}/part-{shard:05d}.parquet"
    table = pa.concat_tables(pieces)
    write_table(Path(job.folder) / name, table, row_group_size=ROWS_PER_GROUP)
    return dataclasses.asdict(describe_file(Path(job.folder), name, len(table)))


def _final(job: Job, rows: pa.Table, dense: Any, names: pa.Array) -> pa.Table:
    packed = rows["packed"].to_numpy()
    code = packed >> CATEGORY_SHIFT
    length = len(job.scenario.history)
    raw = np.stack([rows[f"history_{k}"].to_numpy() for k in range(length)], axis=1).reshape(-1)
    history = np.zeros(len(raw), np.int32)
    history[raw != 0] = dense(raw[raw != 0])
    offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * length)
    columns = {
        "user_id": rows["user_id"],
        "item": pa.array(dense(rows["item"].to_numpy()), pa.int32()),
        "category": names.take(pa.array(code - 1, mask=code == 0)),
        "gender": rows["gender"],
        "age": rows["age"],
        "history": pa.ListArray.from_arrays(offsets, pa.array(history)),
    }
    for action in ("click", "like", "share", "follow"):
        columns[action] = pa.array(((packed >> FEEDBACK_BIT[action]) & 1).astype(np.int8))
    columns["split"] = pc.take(pa.array(SPLITS), rows["split"].combine_chunks())
    return pa.table(columns).cast(ROWS_SCHEMA)
