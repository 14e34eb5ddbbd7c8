"""The sessions job without Spark: the same tasks, called one after another in this process.

It makes whole datasets in milliseconds, so that hundreds of random inputs can be tried and the other
programs' tests need no JVM. The tests of the job itself run on Spark.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pyarrow as pa

from etl import sessions
from etl.combine import combine_splits
from etl.config import load
from etl.contract import Dataset, open_dataset
from etl.gather import cut_filtered_users, gather_partition
from etl.items import allow_items
from etl.job import Job


def build(options: Sequence[str], *, split_bytes: int = 64 << 20, partitions: int = 2) -> Dataset:
    """Make a dataset from the options of `python -m etl`."""
    config = load(options)

    def sessionize(_: object, job: Job, splits: list) -> list[tuple[int, int]]:
        described = [json.dumps(dataclasses.asdict(split)) for split in splits]
        batch = pa.record_batch([pa.array(described, pa.string())], ["split"])
        partial = pa.Table.from_batches(list(combine_splits(job, iter([batch]))), schema=SCHEMA)
        sessions.check_rows(job)
        partial = partial.sort_by([("user_id", "ascending"), ("part", "ascending")])
        user = partial["user_id"].to_numpy()
        done = [
            (
                p,
                gather_partition(
                    job, p, iter(partial.filter(pa.array(user % partitions == p)).combine_chunks().to_batches())
                ),
            )
            for p in range(partitions)
        ]
        if not job.truncates_early:
            allow_items(job)
            table = pa.record_batch([pa.array([p for p, _ in done])], ["partition"])
            done = [tuple(r.values()) for b in cut_filtered_users(job, iter([table])) for r in b.to_pylist()]
        return sorted(done)

    def run(job: Job, tasks: list) -> list[tuple[str]]:
        batch = pa.record_batch([pa.array([t[0] for t in tasks])], ["shard"])
        return [(text,) for b in sessions.write_shards(job, iter([batch])) for text in b.column(0).to_pylist()]

    with (
        mock.patch.object(sessions, "spark_session", mock.MagicMock()),
        mock.patch.object(sessions, "sessionize", sessionize),
        mock.patch.object(sessions, "run_shards", lambda spark, job, tasks: run(job, tasks)),
        mock.patch("etl.tenrec.SPLIT_BYTES", split_bytes),
    ):
        sessions.build(config)
    return open_dataset(config.output)


SCHEMA = pa.schema(
    [
        ("user_id", pa.int64()),
        ("part", pa.int64()),
        ("raw_clicks", pa.int64()),
        ("clicks", pa.int64()),
        ("gender", pa.int16()),
        ("age", pa.int16()),
        ("rows", pa.binary()),
    ]
)


def write_log(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    """A `qb_video` log from rows in the order of its header."""
    header = "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age"
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path
