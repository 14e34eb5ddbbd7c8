"""Computes the parts of an evaluation: ranks and metric sums of every ranker, or recommendations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from etl.dataset import HELD_OUT
from etl.runtime.files import atomic_folder, write_json
from etl.runtime.progress import ProgressLine
from retrieval.blend.ranker import BLEND, BlendRanker, Ranked
from retrieval.bundle import BATCH, lists_array
from retrieval.evaluation import Evaluation
from retrieval.item_lists import columns_of_listed
from retrieval.metrics.accumulators import RankingResult, Segments
from retrieval.parts import DONE, Part
from retrieval.queries import Queries, sample_index
from retrieval.rankers.index_ranker import check_targets, search_unseen
from retrieval.rankers.registry import MODEL
from retrieval.ranks_file import RankWriter
from retrieval.result_folder import RANKS, TOPK

RANKED_SPLITS = ("valid", "test")
"""Splits with targets."""
SECONDS = "seconds.json"
"""Seconds of each part of the blend."""
ALWAYS_ALL = (MODEL, "popularity")
"""Rankers that are cheap enough to rank all queries."""
TOPK_SCHEMA = pa.schema(
    [
        ("user_id", pa.int64()),
        ("items", pa.list_(pa.int32())),
        ("item_ids", pa.list_(pa.int64())),
        ("scores", pa.list_(pa.float32())),
    ]
)


class PartResults:
    """The sums and ranks of one part by ranker."""

    def __init__(self, evaluation: Evaluation, part: Part, names: list[str], ranks: RankWriter) -> None:
        config = evaluation.config
        self.results = {name: RankingResult(config.cutoffs, evaluation.dataset.manifest.n_items) for name in names}
        self.attributes, self.split, self.ranks = evaluation.attributes, part.split, ranks

    def add(self, name: str, queries: Queries, ranked: Ranked, seconds: float, more: Segments = ()) -> None:
        """Add a ranker's ranks and lists of a batch; ranks of blend variants are not written individually."""
        results = self.results[name]
        results.seconds += seconds
        results.add(queries, HELD_OUT[self.split], *ranked, self.attributes, more)
        if not name.startswith(f"{BLEND}-"):
            self.ranks.add(name, self.split, queries, ranked[0])


def rank_part(evaluation: Evaluation, part: Part, folder: Path, blend: BlendRanker | None) -> None:
    """Rank the targets of a part by every ranker."""
    config = evaluation.config
    ranked = evaluation.n_ranked(part.split)
    n_sampled = min(ranked, config.baseline_queries)
    names = [*evaluation.rankers, *(blend.names if blend else ())]
    with RankWriter(folder / RANKS, config.deepest) as writer:
        results = PartResults(evaluation, part, names, writer)
        for number, queries in ranked_batches(evaluation, part):
            check_targets(queries)
            sampled = sample_index(number, ranked, n_sampled) >= 0
            sample = queries.take(np.flatnonzero(sampled))
            for name, ranker in evaluation.rankers.items():
                queries_of_ranker = queries if name in ALWAYS_ALL else sample
                if len(queries_of_ranker):
                    started = perf_counter()
                    ranks_and_lists = ranker(queries_of_ranker)
                    seconds = perf_counter() - started
                    segments = _transitions(queries_of_ranker, blend)
                    results.add(name, queries_of_ranker, ranks_and_lists, seconds, segments)
            if blend:
                rank_by_blend(blend, results, sample, variants=True)
                rank_by_blend(blend, results, queries.take(np.flatnonzero(~sampled)), variants=False)
            evaluation.on_progress(len(queries))
    for name, result in results.results.items():
        result.write(folder / name)
    if blend:
        write_json(folder / SECONDS, blend.spent())


def ranked_batches(evaluation: Evaluation, part: Part) -> Iterator[tuple[npt.NDArray[np.int64], Queries]]:
    """The queries of a part to rank, and their numbers among those of the split that are ranked.

    Queries sampled from several batches are joined: a sparse product over millions of items costs tens of milliseconds
    even for few rows.
    """
    total, ranked, begin = evaluation.bundle.n_queries(part.split), evaluation.n_ranked(part.split), part.first
    numbers: list[npt.NDArray[np.int64]] = []
    waiting: list[Queries] = []
    for queries in evaluation.batches(part):
        number = np.arange(begin, begin + len(queries))
        begin += len(queries)
        if ranked == total:
            yield number, queries
            continue
        index = sample_index(number, total, ranked)
        row = np.flatnonzero(index >= 0)
        numbers.append(index[row])
        waiting.append(queries.take(row))
        if sum(map(len, waiting)) >= BATCH:
            yield np.concatenate(numbers), Queries.joined(waiting)
            numbers, waiting = [], []
    if waiting:
        yield np.concatenate(numbers), Queries.joined(waiting)


def rank_by_blend(blend: BlendRanker, results: PartResults, queries: Queries, *, variants: bool) -> None:
    """Add the blend's ranks, and optionally those of its variants."""
    if not len(queries):
        return
    started = perf_counter()
    ranked_by_name = blend.rank(queries, results.split, variants=variants)
    seconds = perf_counter() - started
    for name, ranked in ranked_by_name.items():
        results.add(name, queries, ranked, seconds if name == BLEND else 0.0, _transitions(queries, blend))


def _transitions(queries: Queries, blend: BlendRanker | None) -> Segments:
    """Segments of queries whose transition from last click to target was counted in train, and the others."""
    if blend is None:
        return ()
    counted = blend.candidate_features.counted(queries.seen[queries.seen_offset[1:] - 1], queries.target) > 0
    return (("transition", "counted", counted), ("transition", "new", ~counted))


def recommend_part(evaluation: Evaluation, part: Part, folder: Path, blend: BlendRanker | None) -> None:
    """Write a part's recommendations: the best unseen candidates after all clicks, by the blend if there is one."""
    k = evaluation.config.deepest
    with pq.ParquetWriter(folder / TOPK, TOPK_SCHEMA, compression="zstd") as writer:
        for queries in evaluation.batches(part):
            score, listed = blend.recommend(queries) if blend else search_unseen(evaluation.index, queries, k)
            order = columns_of_listed(listed, k)
            items, scores = np.take_along_axis(listed, order, 1), np.take_along_axis(score, order, 1)
            is_listed = items > 0
            offset = np.concatenate([[0], np.cumsum(is_listed.sum(axis=1))])
            raw = evaluation.item_id[items[is_listed]]
            columns = (items[is_listed].astype(np.int32), raw, scores[is_listed].astype(np.float32))
            arrays = [pa.array(queries.user_id), *(lists_array(offset, values) for values in columns)]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=TOPK_SCHEMA))
            evaluation.on_progress(len(queries))


def run_part(evaluation: Evaluation, part: Part, folder: Path) -> None:
    """Write `folder/PART` atomically; skip parts that exist."""
    path = folder / part.name
    if (path / DONE).is_file():
        return
    with atomic_folder(path) as writing:
        (recommend_part if part.split == "next" else rank_part)(evaluation, part, writing, evaluation.blend(folder))
        write_json(writing / DONE, {"rows": part.rows})


RunParts = Callable[[Evaluation, list[Part], Path], None]
"""Computes all parts in the folder."""


STEP_NAMES = {"valid": "ranking valid targets", "test": "ranking test targets", "next": "recommending"}
"""Progress label by split; the time per query differs between splits."""


def run_in_process(evaluation: Evaluation, parts: list[Part], folder: Path) -> None:
    """Compute all parts in this process, with progress."""
    line, done = ProgressLine(), 0
    for split, name in STEP_NAMES.items():
        of_split = [part for part in parts if part.split == split]
        left = [part for part in of_split if not (folder / part.name / DONE).is_file()]
        total = sum(map(evaluation.ranked, of_split))
        done = total - sum(map(evaluation.ranked, left))

        def on_progress(rows: int, name: str = name, total: int = total) -> None:
            nonlocal done
            done += rows
            line.update(name, done, total, "queries")

        evaluation.on_progress = on_progress
        for part in left:
            on_progress(0)
            run_part(evaluation, part, folder)
    line.close()
