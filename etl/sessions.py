"""The whole job on one page: CSV logs → a dataset folder of sessions."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from etl import tenrec
from etl.combine import PARTIAL_USERS, combine_splits
from etl.config import EtlConfig, protocol_record
from etl.contract import (
    ITEMS,
    MANIFEST,
    QUARANTINE_FOLDER,
    SCHEMA_VERSION,
    SESSIONS_FOLDER,
    SESSIONS_SCHEMA,
    STATISTICS,
    DataFile,
    Manifest,
    Source,
    describe_file,
    open_dataset,
)
from etl.folder import fingerprint_of, write_json
from etl.gather import PARTITION, cut_filtered_users, gather_users
from etl.items import allow_items, number_items, raw_clicks_per_item, read_lookup
from etl.job import Job, Pieces, check_rows, read_records, read_rows, shard_pieces, write_array, write_table
from etl.progress import reporting
from etl.remote import published, refuse_output
from etl.rows import make_rows
from etl.spark import numbered, run, spark_session
from etl.table_one import histogram, table

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

PARTITION_BYTES = 128 << 20
"""Log that makes one partition of users: a task holds all its rows in memory."""
CLICKS_PARTITION_BYTES = 4 * PARTITION_BYTES
"""The same where only the clicks of the log travel."""
ROWS_PER_GROUP = 8_192


def build(config: EtlConfig) -> Manifest:
    """Make the dataset folder `config.output`, whole or not at all.

    Raises:
        InputError: inputs, options or output that the user must mend.
    """
    given: dict[str, Any] = {"overwrite": config.overwrite, "is_whole": is_dataset, "last": MANIFEST}
    refuse_output(config.output, **given)
    scenario = tenrec.SCENARIOS[config.scenario]
    files = tenrec.open_logs(config.inputs, scenario)
    if config.protocol.first_rows is not None:
        files = tenrec.first_rows(files, config.protocol.first_rows)
    known = open_dataset(config.items_from).items() if config.items_from else None
    splits = tenrec.make_splits(files)
    with published(config.output, **given) as folder:
        log_bytes = sum(split.end - split.begin for split in splits)
        job = make_job(config, folder, log_bytes)
        scratch = folder / "_spark"
        if known is not None:
            write_array(job.work("known_items", 0, "npy"), np.sort(known["item_id"].to_numpy()))
        with (
            spark_session(config.spark, scratch, log_bytes) as spark,
            reporting(job, len(splits), config.shards),
        ):
            if job.scenario.history:
                items, shards = make_rows(spark, job, splits, known, config.shards)
            else:
                partitions = sessionize(spark, job, splits)
                items = number_items(job, known)
                shards = write_sessions(spark, job, partitions, config.shards)
        return finish(config, job, files, items, shards)


def is_dataset(path: Path) -> bool:
    """Whether a folder is one that this job finished."""
    return (path / MANIFEST).is_file() and (path / ITEMS).is_file()


def make_job(config: EtlConfig, folder: Path, log_bytes: int) -> Job:
    """What tasks need to know.

    The number of partitions follows from input and options alone, so that the result does not depend
    on the cluster.
    """
    protocol = config.protocol
    all_rows = config.exposures or protocol.first_users is not None
    return Job(
        folder=str(folder),
        partitions=max(1, -(-log_bytes // (PARTITION_BYTES if all_rows else CLICKS_PARTITION_BYTES))),
        scenario_name=config.scenario,
        dedupe=protocol.dedupe,
        min_item_clicks=protocol.min_item_clicks,
        max_item_clicks=protocol.max_item_clicks,
        first_users=protocol.first_users,
        min_clicks=protocol.min_clicks,
        max_clicks=protocol.max_clicks,
        exposures=config.exposures,
        known_items=config.items_from is not None,
        strict=config.strict,
        seed=config.seed,
    )


def sessionize(spark: SparkSession, job: Job, splits: list[tenrec.Split]) -> list[tuple[int, int]]:
    """Read, combine, shuffle by user and cut.

    Returns:
        `(partition, sessions)` in the order of partitions.
    """
    tasks = numbered(spark, len(splits))
    partial_users = tasks.mapInArrow(partial(combine_splits, job, splits), PARTIAL_USERS)
    by_user = partial_users.repartitionById(job.partitions, "partition")
    done = run(job, by_user.mapInArrow(partial(gather_users, job), PARTITION))
    check_rows(job)
    if not job.truncates_early:
        allow_items(job)
        done = run(job, numbered(spark, job.partitions).mapInArrow(partial(cut_filtered_users, job), PARTITION))
    return sorted(done)


def write_sessions(spark: SparkSession, job: Job, partitions: list[tuple[int, int]], shards: int) -> list[DataFile]:
    """Write the final files with dense ids.

    The partitions' sessions, one after another, are cut into `shards` files of equal rows.
    """
    written = run_shards(spark, job, shard_pieces(partitions, shards))
    return sorted((DataFile(**json.loads(text)) for (text,) in written), key=lambda f: f.path)


def run_shards(spark: SparkSession, job: Job, shards: list[Pieces]) -> list[Any]:
    """Run `write_shards` on Spark."""
    # A file is a pure function of its pieces: how many share a task is the cluster's to say.
    n_tasks = min(len(shards), 4 * spark.sparkContext.defaultParallelism)
    return run(job, numbered(spark, len(shards), n_tasks).mapInArrow(partial(write_shards, job, shards), "file string"))


def write_shards(job: Job, shards: list[Pieces], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Spark task: numbers of shards in, their entries in the manifest out; writes the session files."""
    dense = read_lookup(job)
    for batch in batches:
        for shard in batch.column(0).to_pylist():
            tables = [
                read_rows(job.work("cut", number, "parquet"), begin, rows) for number, begin, rows in shards[shard]
            ]
            whole = pa.concat_tables(tables) if tables else SESSIONS_SCHEMA.empty_table()
            for name in ("items", "exposure_items"):
                column = whole[name].combine_chunks()
                values = dense(column.flatten().to_numpy())
                offset = column.offsets.to_numpy() - (column.offsets[0].as_py() if len(column) else 0)
                lists = pa.ListArray.from_arrays(pa.array(offset, pa.int32()), pa.array(values, pa.int32()))
                whole = whole.set_column(whole.schema.get_field_index(name), name, lists)
            name = f"{SESSIONS_FOLDER}/part-{shard:05d}.parquet"
            write_table(Path(job.folder) / name, whole.cast(SESSIONS_SCHEMA), row_group_size=ROWS_PER_GROUP)
            entry = dataclasses.asdict(describe_file(Path(job.folder), name, len(whole)))
            yield pa.RecordBatch.from_arrays([pa.array([json.dumps(entry)])], ["file"])


def finish(
    config: EtlConfig, job: Job, files: list[tenrec.LogFile], items: pa.Table, shards: list[DataFile]
) -> Manifest:
    """Write item table, statistics, quarantine and, last, the manifest."""
    folder = Path(job.folder)
    pq.write_table(items, folder / ITEMS, compression="zstd")
    splits = read_records(job.work_folder("splits"))
    statistics = make_statistics(job, splits, items)
    write_json(folder / STATISTICS, statistics)
    quarantine = folder / QUARANTINE_FOLDER
    quarantine.mkdir()
    lines = [json.dumps(row) for split in splits for row in split["sample"]]
    (quarantine / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    kept = statistics["kept"]
    entries = [
        *shards,
        describe_file(folder, ITEMS, len(items)),
        describe_file(folder, STATISTICS, 1),
        describe_file(folder, f"{QUARANTINE_FOLDER}/rows.jsonl", len(lines)),
    ]
    source = [
        Source(f.name, f.bytes, fingerprint_of([s["fingerprint"] for s in splits if s["file"] == f.uri])) for f in files
    ]
    protocol = protocol_record(config)
    manifest = Manifest(
        scenario=config.scenario,
        protocol=protocol,
        source=source,
        fingerprint=fingerprint_of(
            [SCHEMA_VERSION, config.scenario, protocol, [dataclasses.asdict(e) for e in entries]]
        ),
        counts={
            "sessions": kept["users"],
            "items": len(items),
            "clicks": kept["clicks"],
            "exposures": kept["exposures"],
            "rows_read": statistics["rows_read"],
        },
        files=entries,
    )
    for leftover in ("_work", "_spark"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    write_json(folder / MANIFEST, manifest.to_json())
    return manifest


def make_statistics(job: Job, splits: list[dict[str, Any]], items: pa.Table) -> dict[str, Any]:
    """`statistics.json`: the raw log and what was kept of it, side by side."""
    actions = job.scenario.actions
    raw: Counter[str] = sum((Counter(split["counts"]) for split in splits), Counter())
    reasons: Counter[str] = sum((Counter(split["reasons"]) for split in splits), Counter())
    raw_items = raw_clicks_per_item(job)
    raw_users = np.concatenate([np.load(p) for p in sorted(job.work_folder("raw_clicks_per_user").glob("*.npy"))])
    cuts = read_records(job.work_folder("cut"))
    kept: Counter[str] = sum((Counter(cut["counts"]) for cut in cuts), Counter())
    kept_users = np.array([pair for cut in cuts for pair in cut["clicks_per_user"]], np.int64).reshape(-1, 2)
    clicks = np.array(histogram(items["clicks"].to_numpy()), np.int64).reshape(-1, 2)
    per_item = np.array(histogram(raw_items[:, 1]), np.int64).reshape(-1, 2)
    return {
        "raw": table(
            raw,
            users=int(raw_users[:, 1].sum()),
            items=len(raw_items),
            actions=actions,
            per_user=raw_users,
            per_item=per_item,
        ),
        "kept": table(
            kept,
            users=sum(cut["sessions"] for cut in cuts),
            items=len(items),
            actions=actions,
            per_user=kept_users,
            per_item=clicks,
        ),
        "rows_read": raw["exposures"] + sum(reasons.values()),
        "rows_quarantined": dict(sorted(reasons.items())),
        "rows_of_unknown_items": sum(split["unknown"] for split in splits),
    }


def summary(manifest: Manifest, seconds: float) -> str:
    """One line for the person who ran the job."""
    counts = manifest.counts
    return (
        f"{counts['rows_read']:,} rows → {counts['sessions']:,} sessions, {counts['clicks']:,} clicks, "
        f"{counts['items']:,} items in {seconds:.1f} s"
    )


def timed_build(config: EtlConfig) -> str:
    """Build and say what came out."""
    begin = time.monotonic()
    return summary(build(config), time.monotonic() - begin)
