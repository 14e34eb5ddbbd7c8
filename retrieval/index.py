"""Nearest-neighbour indexes over the candidates' vectors, and how one is chosen."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from retrieval.exact import Ids, Vectors, rescore, search_exact

FIDELITY_K = 20
FLAT_UP_TO = 2e13
"""Multiplications up to which `auto` searches exactly: a few minutes on two cores."""


@dataclass
class Catalogue:
    """The candidates of a search.

    Attributes:
        item: int32 `[C]`, dense ids in rising order.
        vector: float32 `[C, D]`.
    """

    item: npt.NDArray[np.int32]
    vector: Vectors

    def rows_of(self, item_N: npt.NDArray[np.integer]) -> Ids:
        """Rows of items, -1 for an item that is no candidate."""
        row = np.minimum(np.searchsorted(self.item, item_N), len(self.item) - 1)
        return np.where(self.item[row] == item_N, row, -1)


@dataclass
class Index:
    """A searchable index; `effort` is the number of lists probed, where the kind has it."""

    kind: str
    catalogue: Catalogue
    faiss_index: Any = field(repr=False)
    build_seconds: float
    effort: int | None = None
    parameters: dict[str, int] = field(default_factory=dict)

    def search(self, query_QD: Vectors, k: int) -> tuple[npt.NDArray[np.float64], Ids]:
        """The best `k` candidates: float64 scores and rows `[Q, k]`, best first, equal ones by rising id.

        Rows are -1 (score -inf) where the index found fewer.
        """
        if self.faiss_index is None:
            _, row = search_exact(self.catalogue.vector, query_QD, min(k, len(self.catalogue.item)))
        else:
            _, row = self.faiss_index.search(query_QD, k)
        score = rescore(self.catalogue.vector, query_QD, row)
        order = np.lexsort((np.where(row < 0, np.iinfo(np.int64).max, row), -score), axis=1)
        return np.take_along_axis(score, order, 1), np.take_along_axis(row, order, 1)

    def set_effort(self, lists: int) -> None:
        """Probe so many lists."""
        self.effort = self.parameters["nprobe"] = lists
        self.faiss_index.nprobe = lists


def build_index(kind: str, catalogue: Catalogue) -> Index:
    """Build an index of a kind over the candidates."""
    begin = time.perf_counter()
    if kind == "flat":
        return Index("flat", catalogue, None, 0.0)
    lists = max(1, min(int(4 * math.sqrt(len(catalogue.item))), len(catalogue.item) // 39 or 1))
    dimension = catalogue.vector.shape[1]
    quantizer = faiss.IndexFlatIP(dimension)
    index = faiss.IndexIVFFlat(quantizer, dimension, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = 0
    index.cp.min_points_per_centroid = 1
    index.train(catalogue.vector)
    index.add(catalogue.vector)
    built = Index("ivf_flat", catalogue, index, time.perf_counter() - begin, parameters={"nlist": lists})
    built.set_effort(1)
    return built


def choose_kind(wanted: str, n_candidates: int, n_queries: int, dimension: int) -> str:
    """The index that `auto` stands for: exact search as long as it is a matter of minutes."""
    if wanted != "auto":
        return wanted
    return "flat" if float(n_candidates) * n_queries * dimension <= FLAT_UP_TO else "ivf_flat"


@dataclass(frozen=True)
class Fidelity:
    """What an index keeps of exact search on a sample of queries.

    Attributes:
        recall: share of the exact 20 nearest neighbours that the index lists too.
        hr_ratio: HR@20 through the index over HR@20 of exact search; None where that is 0.
    """

    recall: float
    hr_ratio: float | None
    queries: int
    queries_per_second: float
    exact_queries_per_second: float

    def reaches(self, wanted: float) -> bool:
        """Whether both shares reach `wanted`."""
        return self.recall >= wanted and (self.hr_ratio is None or self.hr_ratio >= wanted)


def measure(index: Index, query_QD: Vectors, target_Q: npt.NDArray[np.integer]) -> Fidelity:
    """Compare an index with exact search on queries and their targets (dense ids)."""
    k = min(FIDELITY_K, len(index.catalogue.item))
    begin = time.perf_counter()
    _, exact = search_exact(index.catalogue.vector, query_QD, k)
    middle = time.perf_counter()
    _, found = index.search(query_QD, k)
    end = time.perf_counter()
    target = index.catalogue.rows_of(target_Q)[:, None]
    shared = sum(len(np.intersect1d(a, b)) for a, b in zip(exact, found, strict=True))
    hits, exact_hits = (int(((rows == target) & (target >= 0)).sum()) for rows in (found, exact))
    return Fidelity(
        recall=shared / max(exact.size, 1),
        hr_ratio=hits / exact_hits if exact_hits else None,
        queries=len(query_QD),
        queries_per_second=len(query_QD) / max(end - middle, 1e-9),
        exact_queries_per_second=len(query_QD) / max(middle - begin, 1e-9),
    )


def tune(
    index: Index, query_QD: Vectors, target_Q: npt.NDArray[np.integer], wanted: float
) -> Iterator[tuple[int, Fidelity]]:
    """Raise the effort until valid queries keep the wanted fidelity; yields `(effort, fidelity)` tried.

    With every list probed the search is exact, so it always ends.
    """
    lists = index.parameters["nlist"]
    effort = 1
    while True:
        index.set_effort(min(effort, lists))
        found = measure(index, query_QD, target_Q)
        yield min(effort, lists), found
        if found.reaches(wanted) or effort >= lists:
            return
        effort *= 2
