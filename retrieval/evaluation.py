"""The state of an evaluation, which all its parts share: inputs, index, rankers and blend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from etl.dataset import Dataset, open_dataset
from etl.runtime.errors import InputError
from retrieval.blend.prepare import open_blend
from retrieval.blend.ranker import BlendRanker
from retrieval.bundle import QUERY_SPLITS, Bundle, open_bundle
from retrieval.config import RetrievalConfig
from retrieval.metrics.accumulators import RankingResult, SegmentAttributes
from retrieval.parts import Part
from retrieval.queries import Queries
from retrieval.rankers.registry import MODEL, Ranker, baseline_rankers, model_ranker
from retrieval.search.index import Index


@dataclass
class Evaluation:
    """Shared state of all parts, opened once per process.

    Attributes:
        config: options of the evaluation.
        dataset, bundle: the opened inputs.
        index: index over the candidates, with tuned search effort.
        on_progress: progress callback, called with the number of queries of each completed batch.
    """

    config: RetrievalConfig
    dataset: Dataset
    bundle: Bundle
    index: Index
    on_progress: Callable[[int], None] = field(default=lambda done: None, repr=False)
    _blends: dict[Path, BlendRanker | None] = field(default_factory=dict, repr=False)

    @cached_property
    def attributes(self) -> SegmentAttributes:
        """Attributes that define query segments."""
        return SegmentAttributes.of(self.dataset)

    @cached_property
    def item_id(self) -> npt.NDArray[np.int64]:
        """Raw ids by dense id `[n_items + 1]`, 0 for padding."""
        return np.concatenate([[0], self.dataset.items(["item_id"])["item_id"].to_numpy()])

    @cached_property
    def rankers(self) -> dict[str, Ranker]:
        """The model and the baselines."""
        return {
            MODEL: model_ranker(self.index, self.config),
            **baseline_rankers(self.dataset, self.bundle, self.index, self.config),
        }

    @property
    def ranker_names(self) -> list[str]:
        """Names of model and baselines, without building them."""
        return [MODEL, *dict.fromkeys(["popularity", *self.config.baselines])]

    def parts(self) -> list[Part]:
        """All parts, in order: one file each, small files joined up to `part_queries`."""
        result: list[Part] = []
        for split in QUERY_SPLITS:
            first, part = 0, None
            for number, entry in enumerate(self.bundle.files_by_kind.get(f"queries-{split}", [])):
                if part and part.rows + entry.rows <= self.config.part_queries:
                    part = replace(part, files=part.files + 1, rows=part.rows + entry.rows)
                    result[-1] = part
                else:
                    part = Part(split, number, 1, first, entry.rows)
                    result.append(part)
                first += entry.rows
        return result

    def n_ranked(self, split: str) -> int:
        """Number of queries of a split that are ranked; they are evenly spaced."""
        total, limit = self.bundle.n_queries(split), self.config.max_queries
        return total if split == "next" or not limit else min(total, limit)

    def ranked(self, part: Part) -> int:
        """Number of queries of a part that are ranked."""
        total, n = self.bundle.n_queries(part.split), self.n_ranked(part.split)
        return (part.first + part.rows) * n // total - part.first * n // total

    def batches(self, part: Part) -> Iterator[Queries]:
        """The part's queries."""
        entries = self.bundle.files_by_kind[f"queries-{part.split}"]
        return self.bundle.queries_of(entries[part.number : part.number + part.files])

    def blend(self, folder: Path) -> BlendRanker | None:
        """Open the blend saved in the folder of the parts."""
        if folder not in self._blends:
            self._blends[folder] = open_blend(self.dataset, self.bundle, self.index, self.config, folder)
        return self._blends[folder]

    def merged(self, folder: Path, split: str) -> dict[str, dict[str, Any]]:
        """The metrics of a split by ranker, merged in the order of the parts."""
        parts, out = [part for part in self.parts() if part.split == split and part.rows], {}
        blend = self.blend(folder) if parts else None
        for name in [*self.ranker_names, *(blend.names if blend else ())] if parts else []:
            total = RankingResult(self.config.cutoffs, self.dataset.manifest.n_items)
            for part in parts:
                total.add_written(folder / part.name / name)
            out[name] = total.metrics(self.attributes.train_clicks, len(self.index.catalogue.item))
        return out


def open_inputs(config: RetrievalConfig, *, verify: bool = True) -> tuple[Dataset, Bundle]:
    """Open dataset and bundle, and set the search threads; `verify` hashes all files."""
    faiss.omp_set_num_threads(config.threads or faiss.omp_get_max_threads())
    dataset = open_dataset(config.data, verify=verify)
    bundle = open_bundle(config.bundle, dataset=dataset.manifest.fingerprint, verify=verify)
    needed = [split for split in QUERY_SPLITS if not (bundle.manifest.refit and split == "valid")]
    missing = [split for split in needed if bundle.has_vectors and not bundle.n_queries(split)]
    if missing:
        raise InputError(f"a bundle with {missing[0]} queries", "none", "export the bundle again")
    return dataset, bundle
