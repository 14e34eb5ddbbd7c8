"""The sessions job: CSV logs → a dataset folder of sessions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from etl.config import EtlConfig, protocol_record
from etl.dataset import (
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
from etl.engines.engine import Engine, log_bytes, open_engine, runs_locally
from etl.logs import tenrec
from etl.logs.distinct_ids import distinct_users
from etl.logs.splits import LogFile, Split, first_rows, make_splits
from etl.messages import QUARANTINE, refuse_empty, summary, warnings
from etl.runtime.dataset_folder import DATASET, ITEMS, MANIFEST
from etl.runtime.files import fingerprint_of, write_json
from etl.runtime.object_store import local_path, refuse_output, staged_output
from etl.stages.assemble_users import assemble_partition, cut_filtered_partition
from etl.stages.ctr_rows import make_rows
from etl.stages.item_ids import allow_items, number_items, raw_clicks_per_item, read_lookup
from etl.stages.job_progress import reporting
from etl.stages.read_split import map_split
from etl.stages.task_files import (
    Job,
    Pieces,
    check_rows,
    count_shards,
    read_records,
    read_rows,
    shard_pieces,
    write_array,
    write_table,
)
from etl.statistics import histogram, table
from etl.transitions import diagnose

SPLITS_PER_PARTITION = 2
"""Log splits per partition of users; a task holds all rows of a partition in memory."""
CLICKS_SPLITS_PER_PARTITION = 4 * SPLITS_PER_PARTITION
"""The same if only clicks are shuffled."""
ROWS_PER_GROUP = 8_192
SESSIONS_PER_SHARD = 4_096


def build(config: EtlConfig) -> Manifest:
    """Write the dataset folder `config.output` atomically.

    Raises:
        InputError: inputs, options or output that the user must fix.
    """
    refuse_output(config.output, DATASET, overwrite=config.overwrite)
    scenario = tenrec.SCENARIOS[config.scenario]
    files = tenrec.open_logs(config.inputs, scenario)
    if config.protocol.first_rows is not None:
        files = first_rows(files, config.protocol.first_rows)
    known = open_dataset(config.items_from).items() if config.items_from else None
    splits = make_splits(files, config.split_bytes)
    users = distinct_users(config.user_logs) if config.user_logs else None
    read = [*(file.uri for file in files), *config.user_logs, *filter(None, [config.items_from])]
    with staged_output(config.output, DATASET, overwrite=config.overwrite, inputs=read) as folder:
        job = make_job(config, folder, log_bytes(splits))
        if known is not None:
            write_array(job.work("known_items", 0, "npy"), np.sort(known["item_id"].to_numpy()))
        if users is not None:
            write_array(job.work("known_users", 0, "npy"), users)
        starting = None if runs_locally(config, splits) else "starting Spark"
        with reporting(job, splits, starting) as stage, open_engine(config, job, splits) as engine:
            stage.started()
            if job.scenario.history:
                items, shards = make_rows(engine, job, splits, known, config.shards)
            else:
                sessions = sessionize(engine, job, splits)
                refuse_empty(job)
                items = number_items(job, known)
                shards = write_sessions(engine, job, sessions, config.shards)
        fingerprint = None if users is None else hashlib.sha256(users.astype("<i8").tobytes()).hexdigest()
        return finish(config, job, files, items, shards, fingerprint)


def make_job(config: EtlConfig, folder: Path, log_bytes: int) -> Job:
    """The job description for tasks.

    The number of partitions depends only on input and options, so that the result does not depend on
    the cluster.
    """
    protocol = config.protocol
    job = Job(
        folder=str(folder),
        partitions=1,
        scenario_name=config.scenario,
        dedupe=protocol.dedupe,
        min_item_clicks=protocol.min_item_clicks,
        max_item_clicks=protocol.max_item_clicks,
        first_users=protocol.first_users,
        clicked_only=protocol.clicked_only,
        min_clicks=protocol.min_clicks,
        max_clicks=protocol.max_clicks,
        exposures=config.exposures,
        known_items=config.items_from is not None,
        known_users=config.users_from is not None,
        unclicked_per_click=config.unclicked_per_click,
        strict=config.strict,
        seed=config.seed,
    )
    splits = SPLITS_PER_PARTITION if job.needs_unclicked else CLICKS_SPLITS_PER_PARTITION
    return dataclasses.replace(job, partitions=count_partitions(log_bytes, splits * config.split_bytes))


def count_partitions(log_bytes: int, partition_bytes: int) -> int:
    """Number of user partitions for a log."""
    return max(1, -(-log_bytes // partition_bytes))


def sessionize(engine: Engine, job: Job, splits: list[Split]) -> list[int]:
    """Read, combine, shuffle by user and cut.

    Returns:
        Number of sessions of each partition.
    """
    sessions = engine.map_reduce(partial(map_split, job, splits), len(splits), partial(assemble_partition, job))
    check_rows(job)
    if not job.truncates_early:
        allow_items(job)
        sessions = engine.map(partial(cut_filtered_partition, job), job.partitions)
    return sessions


def write_sessions(engine: Engine, job: Job, sessions: list[int], shards: int | None) -> list[DataFile]:
    """Write the final files with dense ids.

    The concatenated sessions of all partitions are cut into `shards` files of equal rows.
    """
    shards = shards or count_shards(sum(sessions), SESSIONS_PER_SHARD)
    written = engine.map(partial(write_shard, job, shard_pieces(list(enumerate(sessions)), shards)), shards)
    return [DataFile(**entry) for entry in written]


def write_shard(job: Job, shards: list[Pieces], shard: int) -> dict[str, Any]:
    """Task: write a file of sessions.

    Returns:
        The file's manifest entry.
    """
    dense = read_lookup(job)
    pieces = [read_rows(job.work("cut", number, "parquet"), begin, rows) for number, begin, rows in shards[shard]]
    table = pa.concat_tables(pieces) if pieces else SESSIONS_SCHEMA.empty_table()
    for name in ("items", "exposure_items"):
        column = table[name].combine_chunks()
        values = dense(column.flatten().to_numpy())
        offset = column.offsets.to_numpy() - (column.offsets[0].as_py() if len(column) else 0)
        lists = pa.ListArray.from_arrays(pa.array(offset, pa.int32()), pa.array(values, pa.int32()))
        table = table.set_column(table.schema.get_field_index(name), name, lists)
    name = f"{SESSIONS_FOLDER}/part-{shard:05d}.parquet"
    write_table(Path(job.folder) / name, table.cast(SESSIONS_SCHEMA), row_group_size=ROWS_PER_GROUP)
    return dataclasses.asdict(describe_file(Path(job.folder), name, len(table)))


def finish(
    config: EtlConfig, job: Job, files: list[LogFile], items: pa.Table, shards: list[DataFile], users: str | None
) -> Manifest:
    """Write item table, statistics, quarantine and, last, the manifest; `users` is as in `protocol_record`."""
    folder = Path(job.folder)
    pq.write_table(items, folder / ITEMS, compression="zstd")
    splits = read_records(job.work_folder("splits"))
    statistics = make_statistics(job, files, splits, items)
    if not job.scenario.history:
        statistics["transitions"] = diagnose([folder / shard.path for shard in shards])
    write_json(folder / STATISTICS, statistics)
    (folder / QUARANTINE).parent.mkdir()
    lines = [json.dumps(row) for split in splits for row in split["sample"]]
    (folder / QUARANTINE).write_text("".join(line + "\n" for line in lines))
    entries = [
        *shards,
        describe_file(folder, ITEMS, len(items)),
        describe_file(folder, STATISTICS, 1),
        describe_file(folder, QUARANTINE, len(lines)),
    ]
    source = [
        Source(f.name, f.bytes, fingerprint_of([s["fingerprint"] for s in splits if s["file"] == f.uri])) for f in files
    ]
    protocol = protocol_record(config, len(shards), users)
    manifest = make_manifest(config.scenario, protocol, source, statistics, entries)
    for leftover in ("_work", "_spark"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    write_json(folder / MANIFEST, manifest.to_json())
    return manifest


def make_manifest(
    scenario: str,
    protocol: dict[str, Any],
    source: list[Source],
    statistics: dict[str, Any],
    files: list[DataFile],
) -> Manifest:
    """Build the manifest of a dataset, with the fingerprint of its protocol and files."""
    kept = statistics["kept"]
    return Manifest(
        scenario=scenario,
        protocol=protocol,
        source=source,
        fingerprint=fingerprint_of([SCHEMA_VERSION, scenario, protocol, [dataclasses.asdict(f) for f in files]]),
        counts={
            "sessions": kept["users"],
            "items": kept["items"],
            "clicks": kept["clicks"],
            "exposures": kept["exposures"],
            "rows_read": statistics["rows_read"],
        },
        files=files,
    )


def make_statistics(job: Job, files: list[LogFile], splits: list[dict[str, Any]], items: pa.Table) -> dict[str, Any]:
    """Content of `statistics.json`: statistics of the raw log and of the retained part."""
    columns = set(job.scenario.columns) & {name for file in files for name in file.columns}
    raw: Counter[str] = sum((Counter(split["counts"]) for split in splits), Counter())
    reasons: Counter[str] = sum((Counter(split["reasons"]) for split in splits), Counter())
    of_other_users = sum(split["of_other_users"] for split in splits)
    raw_items = raw_clicks_per_item(job)
    raw_users = np.concatenate([np.load(p) for p in sorted(job.work_folder("raw_clicks_per_user").glob("*.npy"))])
    cuts = read_records(job.work_folder("cut"))
    kept: Counter[str] = sum((Counter(cut["counts"]) for cut in cuts), Counter())
    if cuts and not job.scenario.history:
        kept.update(dict.fromkeys(("before_first", "after_test"), 0))  # adding Counters drops zeros
    kept_users = np.array([pair for cut in cuts for pair in cut["clicks_per_user"]], np.int64).reshape(-1, 2)
    clicks = np.array(histogram(items["clicks"].to_numpy()), np.int64).reshape(-1, 2)
    per_item = np.array(histogram(raw_items[:, 1]), np.int64).reshape(-1, 2)
    return {
        "raw": table(
            raw,
            users=int(raw_users[:, 1].sum()),
            items=len(raw_items),
            columns=columns,
            per_user=raw_users,
            per_item=per_item,
        ),
        "kept": table(
            kept,
            users=sum(cut["sessions"] for cut in cuts),
            items=len(items),
            columns=columns,
            per_user=kept_users,
            per_item=clicks,
        ),
        "rows_read": raw["exposures"] + of_other_users + sum(reasons.values()),
        "rows_quarantined": dict(sorted(reasons.items())),
        # Only if requested: it changes the dataset's fingerprint, which determines the order of training.
        **({"rows_of_other_users": of_other_users} if job.known_users else {}),
        "rows_of_unknown_items": sum(split["unknown"] for split in splits),
        "absent_columns": tenrec.absent_columns(files, job.scenario),
    }


def timed_build(config: EtlConfig) -> list[str]:
    """Build the dataset; returns a summary line and lines on lost rows."""
    begin = time.monotonic()
    build(config)
    statistics = json.loads((local_path(config.output) / STATISTICS).read_text())
    done = f"{summary(statistics, time.monotonic() - begin)}: {config.output}"
    return [done, *warnings(statistics, config.output)]
