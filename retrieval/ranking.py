"""Ranking the targets of a batch of queries, by the model and by each baseline."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Protocol, Self

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from etl.contract import Dataset
from etl.folder import InputError
from retrieval.baselines import HELD_OUT, CategoryPopularity, Popularity
from retrieval.bundle import Bundle, Queries
from retrieval.config import RetrievalConfig
from retrieval.exact import rescore
from retrieval.index import Index
from retrieval.lists import first_listed, seen_among
from retrieval.metrics import MISS, rank_among
from retrieval.neighbours import Neighbours
from retrieval.sources.scores import Scores, last_item
from retrieval.sources.store import COUNTED, FOLDER, SourceOptions, open_counted

MODEL = "model"
"""Name of the trained model among the rankers of `ranks.parquet`."""


class Ranker(Protocol):
    """A model or a baseline: the ranks of a batch's targets, and its top lists (dense ids, 0 = none)."""

    def __call__(self, queries: Queries) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.integer]]:
        """Rank a batch."""
        ...


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


def model_ranker(index: Index, config: RetrievalConfig) -> Ranker:
    """The trained model."""

    def rank(queries: Queries) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.integer]]:
        return rank_by_index(index, queries, config.deepest, mask_seen=config.mask_seen)

    return rank


def baseline_rankers(dataset: Dataset, bundle: Bundle, index: Index, config: RetrievalConfig) -> dict[str, Ranker]:
    """Popularity, and the others that are asked for."""
    train_clicks = dataset.items(["train_clicks"])["train_clicks"].to_numpy()
    popularity = Popularity(index.catalogue.item, train_clicks[index.catalogue.item - 1], dataset.manifest.n_items)

    def by_popularity(queries: Queries) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.integer]]:
        lists = popularity.lists(queries, config.deepest, mask_seen=config.mask_seen)
        return popularity.ranks(queries, mask_seen=config.mask_seen), lists

    rankers: dict[str, Ranker] = {"popularity": by_popularity}
    if "category_popularity" in config.baselines:
        rankers["category_popularity"] = partial(
            CategoryPopularity(popularity, dataset.category_codes()).rank, k=config.deepest, mask_seen=config.mask_seen
        )
    scores: dict[str, Scores] = {}
    if "last_item" in config.baselines:
        scores["last_item"] = last_item(dataset.manifest.n_items)
    counted = [name for name in COUNTED if name in config.baselines]
    scores |= open_counted(counted, dataset, sources_folder(bundle), source_options(config, HELD_OUT), search_threads())
    for name, source in scores.items():
        rankers[name] = partial(Neighbours(source, popularity).rank, k=config.deepest, mask_seen=config.mask_seen)
    return rankers


def sources_folder(bundle: Bundle) -> Path:
    """Where counted sources are stored: beside the indexes of the bundle's run."""
    return bundle.path.absolute().parent / FOLDER


def source_options(config: RetrievalConfig, held_out: int) -> SourceOptions:
    """What the options say of counted sources."""
    return SourceOptions(held_out, config.rules_per_item, config.rules_gaps, config.neighbours)


def search_threads() -> int:
    """Threads that searches and counts run on."""
    return int(faiss.omp_get_max_threads())


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
    score, listed = (
        search_unseen(index, queries, deepest + 1) if mask_seen else search_items(index, queries, deepest + 1)
    )
    target_row = index.catalogue.rows_of(queries.target)
    target_score = rescore_targets(index, queries, target_row)
    rank = rank_among(score, listed, queries.target, target_score)
    # A target that the index did not list stands behind all it listed: its own score may not lift it.
    lost = (listed != queries.target[:, None]).all(axis=1)
    rank[lost] = np.maximum(rank[lost], deepest + 1)
    rank[target_row < 0] = MISS
    if mask_seen:
        rank[queries.is_repeat] = MISS
    return rank, first_listed(listed, deepest)


def search_items(index: Index, queries: Queries, k: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.integer]]:
    """The `k` best candidates of each query: float64 scores and dense ids `[Q, k]`, 0 where there are fewer."""
    score, row = index.search(queries.vector, k)
    return score, np.where(row >= 0, index.catalogue.item[row], 0)


def search_unseen(index: Index, queries: Queries, k: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.integer]]:
    """The candidates that a query has not seen, best first, at least `k` of them where there are so many.

    As many more are searched for as the longest session has items: of the best k + n at most n can be seen ones, so
    none that belongs in the list is missed. An index that lists fewer than it was asked for breaks that; queries left
    with fewer than k although the catalogue has them are searched again exactly.
    """
    most = int(queries.n_seen.max(initial=0))
    score, listed = search_items(index, queries, k + most)
    listed[seen_among(queries, listed)] = 0
    if index.faiss_index is not None:
        unseen = np.count_nonzero(listed, axis=1)
        short = np.flatnonzero((unseen < k) & (unseen < len(index.catalogue.item) - queries.n_seen))
        if len(short):
            again = queries.take(short)
            exact = Index("flat", index.catalogue, None, 0.0)
            found_score, found = search_items(exact, again, k + most)
            found[seen_among(again, found)] = 0
            score[short], listed[short] = -np.inf, 0
            score[short, : found.shape[1]], listed[short, : found.shape[1]] = found_score, found
    return score, listed


def rescore_targets(index: Index, queries: Queries, target_row: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Float64 score of each target, -inf where it is no candidate."""
    return rescore(index.catalogue.vector, queries.vector, target_row[:, None])[:, 0]
