"""The sessions job without Spark: the same tasks, called one after another in this process.

It makes whole datasets in milliseconds, so that hundreds of random inputs can be tried and the other
programs' tests need no JVM. The tests of the job itself run on Spark.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.compute as pc

from etl import sessions
from etl.combine import combine_splits
from etl.config import EtlConfig, load
from etl.contract import Dataset, open_dataset
from etl.gather import cut_filtered_users, gather_partition
from etl.items import allow_items
from etl.job import Job


def build(options: Sequence[str] | EtlConfig, *, split_bytes: int = 64 << 20, partitions: int = 2) -> Dataset:
    """Make a dataset from the options of `python -m etl`, or from what these say (reading them takes the longest)."""
    config = options if isinstance(options, EtlConfig) else load(options)

    def sessionize(_: object, job: Job, splits: list) -> list[tuple[int, int]]:
        job = dataclasses.replace(job, partitions=partitions)
        batches = list(combine_splits(job, splits, numbers(len(splits))))
        sessions.check_rows(job)
        partial = pa.Table.from_batches(batches[::-1])  # no order may be relied on
        done = []
        for p in range(partitions):
            part = partial.filter(pc.equal(partial["partition"], p)).combine_chunks()
            done.append((p, gather_partition(job, p, iter(part.to_batches()))))
        if not job.truncates_early:
            allow_items(job)
            done = [tuple(r.values()) for b in cut_filtered_users(job, numbers(job.partitions)) for r in b.to_pylist()]
        return sorted(done)

    def run(job: Job, tasks: list) -> list[tuple[str]]:
        batches = sessions.write_shards(job, tasks, numbers(len(tasks)))
        return [(text,) for b in batches for text in b.column(0).to_pylist()]

    with (
        mock.patch.object(sessions, "spark_session", mock.MagicMock()),
        mock.patch.object(sessions, "sessionize", sessionize),
        mock.patch.object(sessions, "run_shards", lambda spark, job, tasks: run(job, tasks)),
        mock.patch("etl.tenrec.SPLIT_BYTES", split_bytes),
    ):
        sessions.build(config)
    return open_dataset(config.output)


def numbers(n: int) -> Iterator[pa.RecordBatch]:
    """What Spark hands to tasks."""
    return iter([pa.record_batch([pa.array(range(n), pa.int64())], ["id"])])


def write_log(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    """A `qb_video` log from rows in the order of its header."""
    header = "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age"
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path
