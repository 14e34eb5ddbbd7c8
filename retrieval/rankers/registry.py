"""The rankers of an evaluation: the model and the baselines."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from etl.dataset import Dataset
from retrieval.bundle import Bundle
from retrieval.bundle_folder import SEARCH_FOLDER
from retrieval.config import RetrievalConfig
from retrieval.popularity import CategoryPopularity, Popularity
from retrieval.queries import Queries
from retrieval.rankers.index_ranker import rank_by_index
from retrieval.rankers.source_ranker import SourceRanker
from retrieval.search.index import Index
from retrieval.search.threads import search_threads
from retrieval.sources.scores import Scores, last_item
from retrieval.sources.store import COUNTED, SourceOptions, open_counted

MODEL = "model"
"""Name of the trained model among the rankers of `ranks.parquet`."""


class Ranker(Protocol):
    """A model or a baseline: the ranks of a batch's targets, and its top lists (dense ids, 0 = none)."""

    def __call__(self, queries: Queries) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.integer]]:
        """Rank a batch."""
        ...


def model_ranker(index: Index, config: RetrievalConfig) -> Ranker:
    """The trained model."""

    def rank(queries: Queries) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.integer]]:
        return rank_by_index(index, queries, config.deepest, mask_seen=config.mask_seen)

    return rank


def baseline_rankers(dataset: Dataset, bundle: Bundle, index: Index, config: RetrievalConfig) -> dict[str, Ranker]:
    """Popularity, and the other requested baselines."""
    popularity = Popularity.of(dataset, index.catalogue.item)

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
    options = source_options(config, bundle.held_out)
    scores |= open_counted(counted, dataset, sources_folder(bundle), options, search_threads())
    for name, source in scores.items():
        rankers[name] = partial(SourceRanker(source, popularity).rank, k=config.deepest, mask_seen=config.mask_seen)
    return rankers


def sources_folder(bundle: Bundle) -> Path:
    """The folder of counted sources: next to the indexes of the bundle's run."""
    return bundle.path.absolute().parent / SEARCH_FOLDER


def source_options(config: RetrievalConfig, held_out: int) -> SourceOptions:
    """The options of counted sources."""
    return SourceOptions(held_out, config.rules_per_item, config.rules_gaps, config.neighbours)
