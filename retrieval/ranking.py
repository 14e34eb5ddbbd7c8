"""Ranking the targets of a split by the model and by the baselines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from etl.contract import Dataset
from etl.folder import InputError
from retrieval.baselines import Popularity
from retrieval.bundle import Bundle, Queries
from retrieval.config import RetrievalConfig
from retrieval.exact import rescore
from retrieval.index import Index
from retrieval.metrics import MISS, RankingSums, rank_among
from retrieval.neighbours import Neighbours, Scores, TrainSessions, item_knn, markov, v_sknn

SEGMENTS = ((3, 4), (5, 9), (10, 14), (15, 29), (30, None))
"""Kept clicks of a session, both ends in; the last one is open."""
MODEL = "model"
"""Name of the trained model among the rankers of `ranks.parquet`."""
CLICKS_AFTER_QUERY = {"valid": 2, "test": 1}


class Ranker(Protocol):
    """A model or a baseline: the ranks of a batch's targets, and its top lists (dense ids, 0 = none)."""

    def __call__(self, queries: Queries) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.integer]]:
        """Rank a batch."""
        ...


@dataclass
class RankingResult:
    """Sums over all queries and by session length, and which items were ever recommended."""

    cutoffs: list[int]
    n_items: int
    n_candidates: int
    total: RankingSums = field(init=False)
    segments: dict[str, RankingSums] = field(init=False)
    shown: npt.NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.total = RankingSums(self.cutoffs)
        self.segments = defaultdict(lambda: RankingSums(self.cutoffs))
        self.shown = np.zeros((len(self.cutoffs), self.n_items + 1), bool)

    def add(self, queries: Queries, clicks_after: int, rank: npt.NDArray[np.int64], lists: Any) -> None:
        """Add a batch: the ranks of its targets and its top lists."""
        repeat = queries.is_repeat
        self.total.add(rank, repeat)
        kept = queries.n_seen + clicks_after
        for low, high in SEGMENTS:
            inside = (kept >= low) & (kept <= (high or kept))
            if inside.any():
                self.segments[f"{low}-{high}" if high else f"{low}+"].add(rank[inside], repeat[inside])
        for place, cutoff in enumerate(self.cutoffs):
            self.shown[place, lists[:, :cutoff].ravel()] = True

    def metrics(self) -> dict[str, Any]:
        """The numbers of `metrics.json` for one split."""
        out: dict[str, Any] = dict(self.total.averages())
        for place, cutoff in enumerate(self.cutoffs):
            out[f"coverage@{cutoff}"] = int(self.shown[place, 1:].sum()) / self.n_candidates
        out["queries"] = self.total.queries
        out["repeat_share"] = self.total.repeats / self.total.queries if self.total.queries else None
        out["session_length"] = {
            name: {"queries": sums.queries, **sums.averages()}
            for name, sums in sorted(self.segments.items(), key=lambda pair: int(pair[0].split("-")[0].rstrip("+")))
        }
        return out


class RankWriter:
    """`ranks.parquet`: every ranked target, for tests of significance and for whoever wants other metrics.

    Args:
        path: of the file.
        deepest: ranks beyond it are written as `deepest + 1`, since nothing more is known of most.
    """

    SCHEMA = pa.schema(
        [
            ("ranker", pa.dictionary(pa.int8(), pa.string())),
            ("split", pa.dictionary(pa.int8(), pa.string())),
            ("user_id", pa.int64()),
            ("target", pa.int32()),
            ("rank", pa.int32()),
        ]
    )

    def __init__(self, path: Path, deepest: int) -> None:
        self.writer, self.deepest = pq.ParquetWriter(path, self.SCHEMA, compression="zstd"), deepest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.close()

    def add(self, ranker: str, split: str, queries: Queries, rank_Q: npt.NDArray[np.int64]) -> None:
        """Write a batch."""
        same = [pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(queries), np.int8)), [x]) for x in (ranker, split)]
        rank = np.minimum(rank_Q, self.deepest + 1).astype(np.int32)
        columns = [*same, pa.array(queries.user_id), pa.array(queries.target), pa.array(rank)]
        self.writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self.SCHEMA))


def read_ranks(path: Path, split: str = "test") -> dict[str, pa.Table]:
    """`ranks.parquet` of a split by ranker: tables of `user_id`, `target`, `rank`, by user."""
    table = pq.read_table(path, filters=[("split", "=", split)]).unify_dictionaries()
    names = pa.compute.unique(table["ranker"]).to_pylist()
    columns = ["user_id", "target", "rank"]
    return {n: table.filter(pa.compute.equal(table["ranker"], n)).select(columns).sort_by("user_id") for n in names}


def evaluate_queries(
    bundle: Bundle, dataset: Dataset, index: Index, config: RetrievalConfig, result: dict[str, Any], ranks: RankWriter
) -> None:
    """Rank the targets of valid and test by the model and by each baseline."""
    rankers = {"": model_ranker(index, config), **baseline_rankers(dataset, index, config)}
    for split in ("valid", "test"):
        total = bundle.n_queries(split)
        if not total:
            continue
        sums = {
            name: RankingResult(config.cutoffs, dataset.manifest.n_items, len(index.catalogue.item)) for name in rankers
        }
        every, begin, seconds = -(-total // config.baseline_queries), 0, dict.fromkeys(rankers, 0.0)
        for queries in bundle.queries(split):
            check_targets(queries)
            sample = queries
            if every > 1:
                sample = queries.take(np.flatnonzero((np.arange(len(queries)) + begin) % every == 0))
            begin += len(queries)
            for name, ranker in rankers.items():
                asked = queries if name in ("", "popularity") else sample
                if not len(asked):
                    continue
                started = perf_counter()
                rank, lists = ranker(asked)
                seconds[name] += perf_counter() - started
                sums[name].add(asked, CLICKS_AFTER_QUERY[split], rank, lists)
                ranks.add(name or MODEL, split, asked, rank)
        found = {name: each.metrics() | {"ranking_seconds": seconds[name]} for name, each in sums.items()}
        result[split] |= found.pop("")
        for name, metrics in found.items():
            result["baselines"].setdefault(name, {})[split] = metrics


def model_ranker(index: Index, config: RetrievalConfig) -> Ranker:
    """The trained model."""

    def rank(queries: Queries) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.integer]]:
        return rank_by_index(index, queries, config.deepest, mask_seen=config.mask_seen)

    return rank


def baseline_rankers(dataset: Dataset, index: Index, config: RetrievalConfig) -> dict[str, Ranker]:
    """Popularity, and the others that are asked for."""
    train_clicks = dataset.items(["train_clicks"])["train_clicks"].to_numpy()
    popularity = Popularity(index.catalogue.item, train_clicks[index.catalogue.item - 1])

    def by_popularity(queries: Queries) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.integer]]:
        lists = popularity.lists(queries, config.deepest, mask_seen=config.mask_seen)
        return popularity.ranks(queries, mask_seen=config.mask_seen), lists

    rankers: dict[str, Ranker] = {"popularity": by_popularity}
    wanted = [name for name in config.baselines if name != "popularity"]
    if wanted:
        sessions = TrainSessions.of(dataset)
        makers: dict[str, Callable[[TrainSessions], Scores]]
        makers = {
            "markov": markov,
            "item_knn": partial(item_knn, neighbours=config.neighbours),
            "v_sknn": partial(v_sknn, neighbours=config.neighbours),
        }
        for name in wanted:
            found = Neighbours(makers[name](sessions), popularity)
            rankers[name] = partial(found.rank, k=config.deepest, mask_seen=config.mask_seen)
    return rankers


def check_targets(queries: Queries) -> None:
    """Raise `InputError` where a valid or test query has padding as its target."""
    if len(queries) and queries.target.min() < 1:
        raise InputError("targets that are items", "padding (0)", "export the bundle again")


def rank_by_index(
    index: Index, queries: Queries, deepest: int, *, mask_seen: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.integer]]:
    """Ranks of the targets and the top `deepest` candidates.

    One candidate more than the deepest cutoff decides every rank up to it, ties included; masked
    candidates are listed on top of these.
    """
    depth = deepest + 1 + (int(queries.n_seen.max(initial=0)) if mask_seen else 0)
    score, row = index.search(queries.vector, depth)
    listed = np.where(row >= 0, index.catalogue.item[row], 0)
    target_row = index.catalogue.rows_of(queries.target)
    target_score = rescore_targets(index, queries, target_row)
    if mask_seen:
        listed[seen_among(queries, listed)] = 0
    rank = rank_among(score, listed, queries.target, target_score)
    # A target that the index did not list stands behind all it listed: its own score may not lift it.
    lost = (listed != queries.target[:, None]).all(axis=1)
    rank[lost] = np.maximum(rank[lost], deepest + 1)
    rank[target_row < 0] = MISS
    if mask_seen:
        rank[queries.is_repeat] = MISS
    return rank, first_listed(listed, deepest)


def rescore_targets(index: Index, queries: Queries, target_row: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Float64 score of each target, -inf where it is no candidate."""
    return rescore(index.catalogue.vector, queries.vector, target_row[:, None])[:, 0]


def seen_among(queries: Queries, listed_QK: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Which of the listed items each query has seen."""
    query = np.repeat(np.arange(len(queries)), queries.n_seen)
    seen = query.astype(np.int64) << 32 | queries.seen
    listed = np.arange(len(queries), dtype=np.int64)[:, None] << 32 | listed_QK
    return np.isin(listed, seen)


def first_listed(listed_QK: npt.NDArray[np.integer], k: int) -> npt.NDArray[np.integer]:
    """The first `k` items that are not 0, in order; 0 where there are fewer."""
    order = np.argsort(listed_QK == 0, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(listed_QK, order, 1)
