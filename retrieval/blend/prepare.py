"""Prepares a blend: selects its sources, fits or loads it, opens it for ranking."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from etl.dataset import TRAIN_HOLDOUT, Dataset
from etl.runtime.errors import InputError
from retrieval.blend.context import CandidateFeatures
from retrieval.blend.fit import FIT_QUERIES, learn_blend
from retrieval.blend.fitted import FittedBlend
from retrieval.blend.pool import MIN_CANDIDATES, Pools
from retrieval.blend.ranker import BlendRanker
from retrieval.bundle import Bundle
from retrieval.config import RetrievalConfig
from retrieval.metrics.ranking import main_cutoff
from retrieval.popularity import CategoryPopularity, Popularity
from retrieval.rankers.registry import MODEL, source_options, sources_folder
from retrieval.search.index import Index
from retrieval.search.threads import search_threads
from retrieval.sources.scores import Scores, SuccessorScores, category_popularity, popularity, repeats
from retrieval.sources.store import COUNTED, open_counted


def source_names(config: RetrievalConfig, dataset: Dataset) -> list[str]:
    """The sources selected by the option `blend`; empty for `none`."""
    if config.blend == "none":
        return []
    if config.blend != "auto":
        return list(config.blend)
    names = [MODEL, *COUNTED, "popularity"]
    if dataset.category_codes().any():
        names.append("category_popularity")
    return names if config.mask_seen else [*names, "repeats"]


@dataclass(frozen=True)
class OpenedSources:
    """The opened sources of a blend, which build pools with or without seen items.

    Attributes:
        names: source names.
        counted: the counted sources, always including `markov`.
        index: index over the candidates.
        candidate_features: computes candidate features from session and item attributes.
        candidates: number of best items that each source adds to a pool.
    """

    names: list[str]
    counted: dict[str, Scores]
    index: Index
    candidate_features: CandidateFeatures
    candidates: int

    @classmethod
    def of(
        cls, names: list[str], dataset: Dataset, bundle: Bundle, index: Index, config: RetrievalConfig, held_out: int
    ) -> OpenedSources:
        """Open the sources, counted over all clicks but the last `held_out` of each session."""
        popular = Popularity.of(dataset, index.catalogue.item)
        requested = [name for name in COUNTED if name in names or name == "markov"]
        options = source_options(config, held_out)
        counted = open_counted(requested, dataset, sources_folder(bundle), options, search_threads())
        markov = counted["markov"]
        successors = markov.lists if isinstance(markov, SuccessorScores) else None
        features = CandidateFeatures(popular, dataset.category_codes(), successors)
        return cls(names, counted, index, features, max(MIN_CANDIDATES, config.deepest))

    def pools(self, *, mask_seen: bool, temperature: float = 1.0) -> Pools:
        """Pools of all sources."""
        popular, mask = self.candidate_features.popularity, {"mask_seen": mask_seen}
        sources: dict[str, Scores | None] = {}
        for name in self.names:
            if name == MODEL:
                sources[name] = None
            elif name in COUNTED:
                sources[name] = self.counted[name]
            elif name == "popularity":
                sources[name] = popularity(popular, self.candidates, **mask)
            elif name == "category_popularity":
                categories = CategoryPopularity(popular, self.candidate_features.category)
                sources[name] = category_popularity(categories, self.candidates, **mask)
            else:
                sources[name] = repeats(popular.n_items)
        return Pools(sources, self.index, popular, **mask, temperature=temperature, candidates=self.candidates)


def prepare_blend(
    dataset: Dataset, selected: Bundle, index: Index, config: RetrievalConfig, folder: Path
) -> FittedBlend | None:
    """Fit the blend and write it to `folder`, or read it if it exists; None if there is none to fit.

    Args:
        dataset: the bundle's dataset.
        selected: the bundle with valid queries; for a refit model, that of the model before the refit.
        index: index over the selected bundle's candidates.
        config: options of the evaluation, with `mask_seen` resolved.
        folder: folder of the part files.

    Raises:
        InputError: sources were requested, but there are no queries to fit on.
    """
    names = source_names(config, dataset)
    if not names:
        return None
    learned = FittedBlend.read(folder)
    if learned is None:
        opened = OpenedSources.of(names, dataset, selected, index, config, TRAIN_HOLDOUT)
        pools = opened.pools(mask_seen=bool(config.mask_seen))
        learned = learn_blend(
            pools,
            opened.candidate_features,
            selected.sample_queries("valid", FIT_QUERIES),
            main_cutoff(config.cutoffs),
            search_threads(),
        )
    if learned is None:
        if config.blend != "auto":
            raise InputError("valid targets among the sources' candidates", "none", "set blend=none")
        print("warning: no blend: no valid target is among the sources' candidates", file=sys.stderr, flush=True)
        return None
    learned.write(folder)
    return learned


def open_blend(
    dataset: Dataset, bundle: Bundle, index: Index, config: RetrievalConfig, folder: Path
) -> BlendRanker | None:
    """Open the blend in `folder` over a bundle; for a refit model sources count the valid clicks too."""
    learned = FittedBlend.read(folder) if config.blend != "none" else None
    if learned is None:
        return None
    opened = OpenedSources.of(learned.names, dataset, bundle, index, config, bundle.held_out)
    ranked, listed = (
        opened.pools(mask_seen=mask, temperature=learned.temperature) for mask in (bool(config.mask_seen), True)
    )
    return BlendRanker(learned, ranked, listed, opened.candidate_features, config.deepest, search_threads())
