"""FAISS indexes over the candidates' vectors: kinds, construction, search effort."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from scipy import sparse

from retrieval.queries import Queries
from retrieval.search.exact import Ids, Vectors, rescore, search_ordered
from retrieval.sources.sparse_rows import entries_where
from retrieval.transitions import Transitions, add_to_lists, padded

FLAT_UP_TO = 2e13
"""Multiply-adds up to which `auto` searches exactly: a few minutes on two cores."""
SPACES = ("inner_product", "augmented")
"""Vector space of an index: the vectors themselves, or augmented to equal norms, where the nearest by distance
is the best by inner product (Bachrach et al. 2014)."""
SPACE_SAMPLE, SPACE_PROBES = 100_000, (1, 4, 16)
"""Sample size and nprobe values for comparing the two."""
MAX_LISTS = 4_096
"""Maximum IVF lists: adding a vector compares it with all centroids, so more would make building dominate."""
POINTS_PER_LIST = 64
"""Training vectors per list for k-means."""
MIN_FOR_CODES = 624
"""Product quantisation needs 39 training vectors for each of 16 centroids; with fewer, scalar quantisation is used."""
HNSW_LINKS = 32
WIDTH = 8
"""Vectors are zero-padded to a multiple of this dimension, for SIMD."""


@dataclass
class Catalogue:
    """The candidates of a search.

    Attributes:
        item: int32 `[C]`, dense ids, sorted.
        vector: float32 `[C, D]`.
        transitions: the sparse term of the model's score; None = not used.
    """

    item: npt.NDArray[np.int32]
    vector: Vectors
    transitions: Transitions | None = None

    def rows_of(self, item_N: npt.NDArray[np.integer]) -> Ids:
        """Rows of items (dense ids, 0 for padding), -1 for items that are not candidates."""
        return self._row_of_item[np.minimum(item_N, len(self._row_of_item) - 1)].astype(np.int64)

    def transition_term(self, queries: Queries) -> sparse.csr_matrix | None:
        """The sparse term of the candidates' scores, float64 `[Q, n_items + 1]`; None = not used.

        Cached per batch: needed for lists, targets and the exact scores of other candidates.
        """
        if self.transitions is None:
            return None
        known, term = queries.computed.get("transition_term", (None, None))
        if known is not self:
            term = self.transitions.scores_of(queries)
            term = entries_where(term, self.rows_of(term.indices) >= 0)
            queries.computed["transition_term"] = self, term
        return term

    def join_term(
        self,
        term: sparse.csr_matrix,
        query_QD: Vectors,
        score_QK: npt.NDArray[np.float64],
        item_QK: npt.NDArray[np.integer],
        k: int,
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.integer]]:
        """`add_to_lists` with the inner products of the term's items."""
        listed = padded(self.rows_of(term.indices), np.diff(term.indptr), -1)
        return add_to_lists(term, score_QK, item_QK, rescore(self.vector, query_QD, listed), k)

    @cached_property
    def _row_of_item(self) -> npt.NDArray[np.int32]:
        # Lookup table: binary search over millions of candidates took a fifth of the ranking time.
        row = np.full(int(self.item[-1]) + 2 if len(self.item) else 1, -1, np.int32)
        row[self.item] = np.arange(len(self.item), dtype=np.int32)
        return row


@dataclass(frozen=True)
class IndexType:
    """An index type.

    Attributes:
        effort_parameter: name of the search effort: lists probed (nprobe), or candidates kept in the graph search.
        first: initial effort for tuning.
        refine: candidates to rescore exactly per requested one, since quantised scores are approximate.
        bytes_per_vector: index bytes per vector, by dimension.
    """

    effort_parameter: str
    first: int
    refine: int
    bytes_per_vector: Any


KINDS = {
    "ivf_flat": IndexType("nprobe", 1, 1, lambda width: 4 * width + 8),
    "ivf_sq8": IndexType("nprobe", 1, 2, lambda width: width + 8),
    "ivf_pq_refine": IndexType("nprobe", 1, 8, lambda width: width // 4 + 8),
    "hnsw": IndexType("efSearch", 16, 1, lambda width: 4 * width + 8 * HNSW_LINKS + 16),
}
"""Index types by name; `flat` is exact search without an index."""


@dataclass
class Index:
    """A searchable index; exact search if `faiss_index` is None."""

    kind: str
    catalogue: Catalogue
    faiss_index: Any = field(repr=False)
    build_seconds: float
    space: str = SPACES[0]
    search_effort: int | None = None
    refine: int = 1
    parameters: dict[str, Any] = field(default_factory=dict)

    def search(self, query_QD: Vectors, k: int) -> tuple[npt.NDArray[np.float64], Ids]:
        """The best `k` candidates: float64 scores and rows `[Q, k]`, best first, ties by ascending id.

        Padded with row -1 (score -inf) if the index returned fewer.
        """
        size = len(self.catalogue.item)
        if self.faiss_index is None:
            return search_ordered(self.catalogue.vector, query_QD, min(k, size))
        _, row = self.faiss_index.search(to_index_space(query_QD, self.space, None), min(k * self.refine, max(k, size)))
        score = rescore(self.catalogue.vector, query_QD, row)
        order = np.lexsort((np.where(row < 0, np.iinfo(np.int64).max, row), -score), axis=1)[:, :k]
        return np.take_along_axis(score, order, 1), np.take_along_axis(row, order, 1)

    @property
    def max_search_effort(self) -> int:
        """Maximum useful search effort."""
        return int(self.parameters.get("nlist", len(self.catalogue.item)))

    def set_search_effort(self, effort: int, refine: int | None = None) -> None:
        """Set nprobe or efSearch; rescore `refine` candidates per requested one."""
        self.search_effort, self.refine = effort, refine or self.refine
        name = KINDS[self.kind].effort_parameter
        self.parameters |= {name: effort, "refine": self.refine}
        if self.kind == "hnsw":
            self.faiss_index.hnsw.efSearch = effort
        else:
            self.faiss_index.nprobe = effort


def to_index_space(vector_ND: Vectors, space: str, longest: float | None) -> Vectors:
    """Map vectors to an index space, zero-padded to a multiple of `WIDTH`.

    Args:
        vector_ND: items or queries.
        space: one of `SPACES`. The augmented space appends √(longest² − |v|²) to items, so that all norms are equal,
            and 0 to queries: |q − v|² = |q|² + longest² − 2 q·v then orders items as q·v does.
        longest: largest norm of the items; None for queries.
    """
    n, dimension = vector_ND.shape
    width = -(-(dimension + (space == "augmented")) // WIDTH) * WIDTH
    out = np.zeros((n, width), np.float32)
    out[:, :dimension] = vector_ND
    if space == "augmented" and longest is not None:
        norm = np.einsum("nd,nd->n", vector_ND, vector_ND, dtype=np.float64)
        out[:, dimension] = np.sqrt(np.maximum(longest**2 - norm, 0.0))
    return out


def norms(vector_ND: Vectors) -> npt.NDArray[np.float64]:
    """Euclidean norms `[N]`."""
    return np.sqrt(np.einsum("nd,nd->n", vector_ND, vector_ND, dtype=np.float64))


def build_index(kind: str, catalogue: Catalogue, space: str = SPACES[0]) -> Index:
    """Build an index over the candidates."""
    begin = time.perf_counter()
    if kind == "flat":
        return Index("flat", catalogue, None, 0.0)
    vectors = to_index_space(catalogue.vector, space, float(norms(catalogue.vector).max(initial=0.0)))
    index, parameters = _empty(kind, vectors, faiss.METRIC_L2 if space == "augmented" else faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(vectors)
    index.add(vectors)
    built = Index(kind, catalogue, index, time.perf_counter() - begin, space, parameters=parameters)
    built.set_search_effort(min(KINDS[kind].first, built.max_search_effort), KINDS[kind].refine)
    return built


def _empty(kind: str, vectors: Vectors, metric: int) -> tuple[Any, dict[str, Any]]:
    """An empty index and its parameters."""
    n, width = vectors.shape
    if kind == "hnsw":
        graph = faiss.IndexHNSWFlat(width, HNSW_LINKS, metric)
        return graph, {"links": HNSW_LINKS}
    lists = max(1, min(int(4 * math.sqrt(n)), MAX_LISTS, n // 39 or 1))
    quantizer = faiss.IndexFlat(width, metric)
    if kind == "ivf_flat":
        index: Any = faiss.IndexIVFFlat(quantizer, width, lists, metric)
    elif kind == "ivf_sq8" or n < MIN_FOR_CODES:
        index = faiss.IndexIVFScalarQuantizer(quantizer, width, lists, faiss.ScalarQuantizer.QT_8bit, metric)
    else:
        index = faiss.IndexIVFPQFastScan(quantizer, width, lists, width // 2, 4, metric)
    index.cp.seed, index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 0, 1, POINTS_PER_LIST
    return index, {"nlist": lists}


def choose_kind(requested: str, n_candidates: int, n_queries: int, dimension: int, memory_gib: float = 4.0) -> str:
    """The index type for `index=auto`.

    Exact search if it takes minutes, else the least compressed IVF index that fits into memory.
    """
    if requested != "auto":
        return requested
    if float(n_candidates) * n_queries * dimension <= FLAT_UP_TO:
        return "flat"
    for kind in ("ivf_flat", "ivf_sq8"):
        if KINDS[kind].bytes_per_vector(dimension + WIDTH) * n_candidates <= memory_gib * 2**30:
            return kind
    return "ivf_pq_refine"


def recalled_neighbours(score_QK: npt.NDArray[np.float64], exact_QK: npt.NDArray[np.float64]) -> Ids:
    """Number of exact neighbours that an index found for each query `[Q]`, by the scores of both lists.

    Ties with the last exact neighbour are interchangeable.

    >>> recalled_neighbours(np.array([[3.0, 1, 1]]), np.array([[3.0, 2, 1]])).tolist()
    [2]
    """
    last = exact_QK.min(axis=1, keepdims=True)
    tied = np.minimum(*((score == last).sum(axis=1) for score in (score_QK, exact_QK)))
    return np.minimum((score_QK > last).sum(axis=1) + tied, exact_QK.shape[1])
