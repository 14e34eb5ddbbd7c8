"""Writing the bundle: each worker exports its share of the session files, the first one finishes it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from etl.contract import Dataset, feedback_labels
from retrieval.bundle import (
    FEEDBACK_SCHEMA,
    ITEMS,
    finish_bundle,
    items_schema,
    lists_array,
    queries_schema,
    vectors_array,
)
from trainer.data.batch import feedback_rows
from trainer.data.reader import EXPOSURE_COLUMNS, SESSION_COLUMNS, Ragged, Sessions
from trainer.scoring import Scorer
from trainer.world import World

SESSIONS_PER_BATCH = 512
HELD_OUT = {"valid": 2, "test": 1, "next": 0}
"""Kept clicks at the end that the query of a split does not see."""


def export(
    output: Path, scorer: Scorer, dataset: Dataset, world: World, *, model: str, refit: bool, exposures: bool
) -> None:
    """Write the bundle folder `output`; it is whole once all workers have done their files.

    Args:
        output: folder to make; one that a killed export left is removed first.
        scorer: the trained model.
        dataset: sessions to export.
        world: the workers.
        model: name for the manifest.
        refit: the model saw the valid clicks, so valid parts are left out.
        exposures: whether feedback rows are what was shown.
    """
    building = output.with_name(f".{output.name}.building")
    if world.is_first:
        for folder in (building, output):
            shutil.rmtree(folder, ignore_errors=True)
        building.mkdir(parents=True)
        _write_items(building / ITEMS, scorer)
    world.barrier()
    splits = [split for split in HELD_OUT if not (refit and split == "valid")]
    for number, entry in enumerate(dataset.session_files):
        if number % world.size == world.global_rank:
            _export_file(building, number, dataset.file(entry.path), scorer, splits, exposures=exposures)
    world.barrier()
    if world.is_first:
        dimension = scorer.table.vector.shape[1] + 1
        finish_bundle(
            building,
            dataset=dataset.manifest.fingerprint,
            refit=refit,
            n_items=dataset.manifest.n_items,
            dimension=dimension,
            model=model,
        )
        building.rename(output)
    world.barrier()


def _write_items(path: Path, scorer: Scorer) -> None:
    vectors = scorer.item_vectors().cpu().numpy()
    item = pa.array(np.arange(1, len(vectors) + 1, dtype=np.int32))
    pq.write_table(pa.table([item, vectors_array(vectors)], schema=items_schema(vectors.shape[1])), path)


def _export_file(folder: Path, number: int, path: Path, scorer: Scorer, splits: list[str], *, exposures: bool) -> None:
    columns = SESSION_COLUMNS + (EXPOSURE_COLUMNS if exposures else [])
    dimension = scorer.table.vector.shape[1] + 1
    tasks = scorer.model.feedback_tasks
    schemas = {f"queries-{split}": queries_schema(dimension) for split in splits}
    if tasks:
        schemas |= {f"feedback-{split}": FEEDBACK_SCHEMA for split in splits if split != "next"}
    writers = {}
    for kind, schema in schemas.items():
        (folder / kind).mkdir(exist_ok=True)
        writers[kind] = pq.ParquetWriter(folder / kind / f"part-{number:05d}.parquet", schema, compression="zstd")
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(SESSIONS_PER_BATCH, columns=columns):
            sessions = Sessions.of(pa.Table.from_batches([batch]))
            for kind, table in _score(sessions, scorer, splits, exposures=exposures):
                writers[kind].write_table(table)
    for writer in writers.values():
        writer.close()


def _score(sessions: Sessions, scorer: Scorer, splits: list[str], *, exposures: bool) -> Iterator[tuple[str, pa.Table]]:
    n = sessions.items.lengths
    state = scorer.states(sessions, n)  # one pass: the states of all splits lie on the way to the last click
    rows = feedback_rows(sessions, exposures=exposures) if scorer.model.feedback_tasks else None
    for split in splits:
        visible = n - HELD_OUT[split]
        last = state[torch.arange(len(n)), torch.from_numpy(visible - 1)]
        target = np.zeros(len(n), np.int32)
        if split != "next":
            target = sessions.items.values[sessions.items.offset[:-1] + visible]
        vectors = scorer.queries(last).cpu().numpy()
        yield f"queries-{split}", _queries(sessions, visible, target, vectors)
        if rows is not None and split != "next":
            block = rows.select(rows.position == visible[rows.session])
            for task, score in scorer.feedback(state, block).items():
                columns = [
                    pa.array([task] * len(score), pa.string()),
                    pa.array(sessions.user_id[block.session]),
                    pa.array(block.item.astype(np.int32)),
                    pa.array(feedback_labels(block.feedback, "click") == 1),
                    pa.array(feedback_labels(block.feedback, task).astype(np.uint8)),
                    pa.array(score),
                ]
                yield f"feedback-{split}", pa.table(columns, schema=FEEDBACK_SCHEMA)


def _queries(sessions: Sessions, visible: Any, target: Any, vectors: Any) -> pa.Table:
    items = sessions.items
    keep = items.place < np.repeat(visible, items.lengths)
    seen = Ragged(np.concatenate([[0], np.cumsum(visible)]), items.values[keep])
    columns = [
        pa.array(sessions.user_id),
        pa.array(target.astype(np.int32)),
        lists_array(seen.offset, seen.values),
        pa.array(sessions.n_clicks),
        vectors_array(vectors),
    ]
    return pa.table(columns, schema=queries_schema(vectors.shape[1]))
