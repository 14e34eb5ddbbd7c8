"""Bundle export: each worker exports its share of the data files; the first worker completes the bundle."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from etl.dataset import HELD_OUT, SPLITS, Dataset, feedback_labels
from etl.runtime.arrays import IntArray
from retrieval.bundle import (
    FEEDBACK_SCHEMA,
    ITEMS,
    TRANSITIONS,
    finish_bundle,
    items_schema,
    lists_array,
    queries_schema,
    vectors_array,
)
from trainer.data.batch import feedback_rows
from trainer.data.ragged import Ragged
from trainer.data.ranking_rows import ROW_COLUMNS, block_rows, flat_rows
from trainer.data.reader import Sessions, session_columns
from trainer.distributed.world import World
from trainer.inference.scorer import RankScorer, Scores, SessionScorer
from trainer.run.run_folder import RunFolder
from trainer.training.objective import ITEM

SESSIONS_PER_BATCH = 512
ROWS_PER_BATCH = 16_384
ITEMS_PER_BATCH = 1 << 18
FEEDBACK_STATES = {"valid": ("valid",), "test": ("test", "next")}
"""Query splits whose states score a split's feedback rows; test includes rows shown after the last click."""

Tables = Iterator[tuple[str, pa.Table]]
"""Tables with the bundle folder that each belongs to."""


@dataclass(frozen=True)
class FeedbackPass:
    """Feedback tasks that are scored with another checkpoint than the queries.

    Attributes:
        tasks: names.
        load: loads that checkpoint in place, on every worker; returns its scorer.
    """

    tasks: list[str]
    load: Callable[[], SessionScorer | RankScorer]


def export(
    output: RunFolder,
    scorer: SessionScorer | RankScorer,
    dataset: Dataset,
    world: World,
    *,
    model: str,
    refit: bool,
    passes: Sequence[FeedbackPass] = (),
) -> None:
    """Write the bundle folder `output`; it is renamed into place once all workers have written their files.

    Args:
        output: folder to create; the rest of a killed export is removed first. For a run in an object store, workers
            send their files through the store.
        scorer: the trained model.
        dataset: sessions or rows to export.
        world: the workers.
        model: name for the manifest.
        refit: the model was trained on the valid clicks, so valid files are left out.
        passes: feedback tasks scored with other checkpoints; the last one stays loaded.
    """
    shared = output.with_name(f".{output.path.name}.building")
    building = shared.path
    if world.is_first:
        for folder in (building, output.path):
            shutil.rmtree(folder, ignore_errors=True)
        building.mkdir(parents=True)
        world.report("writing item vectors")
        if isinstance(scorer, SessionScorer):
            _write_items(building / ITEMS, scorer)
            if scorer.term is not None:
                from retrieval.transitions import write_transitions

                write_transitions(building / TRANSITIONS, scorer.term.transitions)
    _finish(scorer)
    world.barrier()
    splits = [split for split in HELD_OUT if not (refit and split == "valid")]
    tasks_of_later_passes = {task for later in passes for task in later.tasks}
    scorer = replace(scorer, only=set(scorer.model.feedback_tasks) - tasks_of_later_passes)
    mine = _score_files(building, scorer, dataset, world, splits, _schemas(scorer, splits), number=0)
    for number, later in enumerate(passes, 1):
        world.barrier()  # others may still read the parameters
        scorer = replace(later.load(), only=later.tasks)
        schemas = {kind: schema for kind, schema in _schemas(scorer, splits).items() if kind.startswith("feedback")}
        mine += _score_files(building, scorer, dataset, world, splits, schemas, number=number)
    if not world.is_first:
        shared.send(*mine)
    world.barrier()
    if world.is_first:
        shared.collect(lambda name: name not in mine and name != ITEMS)
        finish_bundle(
            building,
            dataset=dataset.manifest.fingerprint,
            refit=refit,
            n_items=dataset.manifest.n_items,
            dimension=_dimension(scorer),
            model=model,
            transition_terms=_terms(scorer),
        )
        building.rename(output.path)
    world.barrier()


def _score_files(
    building: Path,
    scorer: SessionScorer | RankScorer,
    dataset: Dataset,
    world: World,
    splits: list[str],
    schemas: dict[str, pa.Schema],
    *,
    number: int,
) -> list[str]:
    """Score this worker's data files in pass `number`; returns the names of the files written."""
    files, written = dataset.session_files or dataset.row_files, list[str]()
    mine = list(range(world.global_rank, len(files), world.size))
    total, unit = sum(files[index].rows for index in mine), "sessions" if dataset.session_files else "rows"
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        world.report("scoring for the bundle", done, total, unit)

    for index in mine:
        tables = _score_file(dataset.file(files[index].path), scorer, splits, count, exposures=dataset.shows_exposures)
        written += _write_tables(building, number * len(files) + index, schemas, tables)
    _finish(scorer)
    return written


def _finish(scorer: SessionScorer | RankScorer) -> None:
    """Serve other workers that still read a sharded table."""
    if isinstance(scorer, SessionScorer):
        scorer.finish()


def _dimension(scorer: SessionScorer | RankScorer) -> int:
    return scorer.dimension if isinstance(scorer, SessionScorer) else 0


def _terms(scorer: SessionScorer | RankScorer) -> int:
    """Number of transition terms in the score."""
    term = scorer.term if isinstance(scorer, SessionScorer) else None
    return 0 if term is None else len(term.all_users.bias)


def _write_items(path: Path, scorer: SessionScorer) -> None:
    """Write `items.parquet` in blocks, to avoid a second copy of a large table."""
    n, schema = scorer.tables[ITEM].n_rows - 1, items_schema(scorer.dimension)
    with pq.ParquetWriter(path, schema) as writer:
        for begin in range(1, n + 1, ITEMS_PER_BATCH):
            item = torch.arange(begin, min(begin + ITEMS_PER_BATCH, n + 1))
            vectors = scorer.item_vectors(item.to(scorer.device)).cpu().numpy()
            columns = [pa.array(item.numpy().astype(np.int32)), vectors_array(vectors)]
            writer.write_table(pa.table(columns, schema=schema))


def _schemas(scorer: SessionScorer | RankScorer, splits: list[str]) -> dict[str, pa.Schema]:
    """Schemas of the bundle's folders for these splits."""
    schemas = {}
    if isinstance(scorer, SessionScorer):
        schemas = {f"queries-{split}": queries_schema(_dimension(scorer), _terms(scorer)) for split in splits}
    if scorer.feedback_tasks:
        schemas |= {f"feedback-{split}": FEEDBACK_SCHEMA for split in splits if split != "next"}
    return schemas


def _write_tables(folder: Path, number: int, schemas: dict[str, pa.Schema], tables: Tables) -> list[str]:
    """Write one file per folder and return their names."""
    writers, names = {}, {kind: f"{kind}/part-{number:05d}.parquet" for kind in schemas}
    for kind, schema in schemas.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        writers[kind] = pq.ParquetWriter(folder / names[kind], schema, compression="zstd")
    for kind, table in tables:
        if kind in writers:
            writers[kind].write_table(table)
    for writer in writers.values():
        writer.close()
    return list(names.values())


def _score_file(
    path: Path,
    scorer: SessionScorer | RankScorer,
    splits: list[str],
    count: Callable[[int], None],
    *,
    exposures: bool,
) -> Tables:
    """Score the sessions or rows of a file; `count` is called with the number of each batch when it is done."""
    actions = isinstance(scorer, SessionScorer) and scorer.model.reads_actions
    columns = session_columns(exposures=exposures, actions=actions)
    with pq.ParquetFile(path) as file:
        if "split" in file.schema_arrow.names:
            assert isinstance(scorer, RankScorer)
            for batch in file.iter_batches(ROWS_PER_BATCH, columns=ROW_COLUMNS):
                yield from _rank_rows(pa.Table.from_batches([batch]), scorer, splits)
                count(len(batch))
            return
        for batch in file.iter_batches(SESSIONS_PER_BATCH, columns=columns):
            sessions = Sessions.of(pa.Table.from_batches([batch]))
            yield from score_sessions(sessions, scorer, splits, exposures=exposures)
            count(len(batch))


def score_sessions(
    sessions: Sessions, scorer: SessionScorer | RankScorer, splits: list[str], *, exposures: bool
) -> Tables:
    """Queries and feedback rows of some sessions.

    Args:
        sessions: at least three clicks each.
        scorer: the trained model; a ranking model yields no queries.
        splits: from `HELD_OUT`; `test` requires `next`.
        exposures: whether feedback rows are the exposures, or the retained clicks only.
    """
    if isinstance(scorer, RankScorer):
        yield from _rank_blocks(sessions, scorer, splits, exposures=exposures)
        return
    n = sessions.items.lengths
    visible = np.stack([n - HELD_OUT[split] for split in splits], axis=1)
    states = scorer.states(sessions, visible)  # one pass gives the states of all splits
    rows = feedback_rows(sessions, exposures=exposures) if scorer.feedback_tasks else None
    for column, split in enumerate(splits):
        seen, state = visible[:, column], states[:, column]
        target = np.zeros(len(n), np.int32)
        if split != "next":
            target = sessions.items.values[sessions.items.offset[:-1] + seen]
        weight = scorer.transition_weights(sessions, seen, split)
        yield f"queries-{split}", _queries(sessions, seen, target, scorer.queries(state).cpu().numpy(), weight)
        if rows is None:
            continue
        for after in FEEDBACK_STATES.get(split, ()):
            number = splits.index(after)
            block = rows.select(rows.position == visible[:, number][rows.session])
            scores = scorer.feedback(states[:, number], block)
            yield from _feedback(split, sessions.user_id[block.session], block.item, block.feedback, scores)


def _rank_blocks(sessions: Sessions, scorer: RankScorer, splits: list[str], *, exposures: bool) -> Tables:
    rows = feedback_rows(sessions, exposures=exposures)
    for split in splits:
        for after in FEEDBACK_STATES.get(split, ()):
            seen = sessions.items.lengths - HELD_OUT[after]
            block = block_rows(sessions, rows.select(rows.position == seen[rows.session]))
            scores = scorer.feedback(scorer.features(block))
            yield from _feedback(split, block.user_id, block.item, block.feedback, scores)


def _rank_rows(table: pa.Table, scorer: RankScorer, splits: list[str]) -> Tables:
    rows = flat_rows(table)
    for split in splits:
        if split != "next":
            part = rows.take(np.flatnonzero(rows.split == SPLITS.index(split)))
            scores = scorer.feedback(scorer.features(part))
            yield from _feedback(split, part.user_id, part.item, part.feedback, scores)


def _feedback(split: str, user_F: IntArray, item_F: IntArray, feedback_F: Any, scores: Scores) -> Tables:
    for task, score in scores.items():
        columns = [
            pa.array([task] * len(score), pa.string()),
            pa.array(user_F),
            pa.array(item_F.astype(np.int32)),
            pa.array(feedback_labels(feedback_F, "click") == 1),
            pa.array(feedback_labels(feedback_F, task).astype(np.uint8)),
            pa.array(score),
        ]
        yield f"feedback-{split}", pa.table(columns, schema=FEEDBACK_SCHEMA)


def _queries(sessions: Sessions, visible: Any, target: Any, vectors: Any, transition_weight: Any) -> pa.Table:
    items = sessions.items
    keep = items.index_in_row < np.repeat(visible, items.lengths)
    seen = Ragged(np.concatenate([[0], np.cumsum(visible)]), items.values[keep])
    columns = [
        pa.array(sessions.user_id),
        pa.array(target.astype(np.int32)),
        lists_array(seen.offset, seen.values),
        pa.array(sessions.n_clicks),
        vectors_array(vectors),
    ]
    terms = transition_weight.shape[1]
    columns += [vectors_array(transition_weight)] if terms else []
    return pa.table(columns, schema=queries_schema(vectors.shape[1], terms))
