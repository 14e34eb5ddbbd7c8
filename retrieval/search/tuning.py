"""Tunes the search effort to reach a fidelity, measured against exact search."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from retrieval.metrics.significance import interval
from retrieval.search.exact import Ids, Vectors, rescore, search_exact
from retrieval.search.index import (
    KINDS,
    SPACE_PROBES,
    SPACE_SAMPLE,
    SPACES,
    Catalogue,
    Index,
    build_index,
    recalled_neighbours,
)
from retrieval.sources.sparse_rows import entries_at

FIDELITY_K = 20


def compare_spaces(catalogue: Catalogue, query_QD: Vectors) -> dict[str, float]:
    """Mean recall of IVF over a sample of the candidates, by vector space, at the same nprobe values.

    If norms follow popularity, many queries are drawn to few long vectors: so the better space is measured.
    """
    step = max(1, len(catalogue.item) // SPACE_SAMPLE)
    sample = Catalogue(catalogue.item[::step], np.ascontiguousarray(catalogue.vector[::step]))
    k = min(FIDELITY_K, len(sample.item))
    _, exact = search_exact(sample.vector, query_QD, k)
    result = {}
    for space in SPACES:
        index, recalls = build_index("ivf_flat", sample, space), []
        for probes in SPACE_PROBES:
            index.set_search_effort(min(probes, index.max_search_effort))
            recalls.append(shared(exact, index.search(query_QD, k)[1]) / max(exact.size, 1))
        result[space] = float(np.mean(recalls))
    return result


def shared(a_QK: Ids, b_QK: Ids) -> int:
    """Total number of rows that are in both lists of a query."""
    query = np.arange(len(a_QK), dtype=np.int64)[:, None] << 40
    return int(np.isin(query | a_QK, (query | b_QK)[b_QK >= 0]).sum())


@dataclass(frozen=True)
class Fidelity:
    """Fidelity of an index to exact search on a sample of queries.

    Attributes:
        recall: share of the exact 20 nearest neighbours that the index finds; ties with the last one are
            interchangeable.
        recall_low, recall_high: its 95 % bootstrap interval over queries.
        hr_ratio: HR@20 through the index, with transitions if any, divided by that of exact search; None if the
            latter is 0.
        hr_ratio_low: its lower 95 % bound over the exact hits (Wilson); None without hits.
        exact_hits: number of queries whose target exact search finds.
    """

    recall: float
    recall_low: float
    recall_high: float
    hr_ratio: float | None
    hr_ratio_low: float | None
    exact_hits: int
    queries: int
    queries_per_second: float
    exact_queries_per_second: float

    def reaches(self, requested: float) -> bool:
        """Whether both shares reach `requested`."""
        return self.recall >= requested and (self.hr_ratio is None or self.hr_ratio >= requested)

    @property
    def is_slower(self) -> bool:
        """Whether exact search has the higher throughput."""
        return self.queries_per_second < self.exact_queries_per_second


def wilson_low(successes: int, trials: int, z: float = 1.959964) -> float | None:
    """Lower bound of the Wilson 95 % interval of a proportion."""
    if not trials:
        return None
    share = successes / trials
    middle, spread = share + z**2 / (2 * trials), z * math.sqrt((share * (1 - share) + z**2 / (4 * trials)) / trials)
    return (middle - spread) / (1 + z**2 / trials)


@dataclass(frozen=True)
class ExactReference:
    """Queries with targets (dense ids) and exact search results.

    Attributes:
        query: float32 `[Q, D]`.
        target: `[Q]`.
        exact: rows of the k nearest candidates, int64 `[Q, k]`.
        score: their inner products, float64 `[Q, k]`.
        own: complete score of the target, float64 `[Q]`; -inf if it is not a candidate.
        kth_score: complete score of the k-th best candidate, float64 `[Q]`.
        counted: whether the target has a transition term, so that it is scored whatever the index returns.
        seconds: duration of the exact search.
    """

    query: Vectors
    target: npt.NDArray[np.integer]
    exact: Ids
    score: npt.NDArray[np.float64]
    own: npt.NDArray[np.float64]
    kth_score: npt.NDArray[np.float64]
    counted: npt.NDArray[np.bool_]
    seconds: float

    @classmethod
    def of(
        cls,
        catalogue: Catalogue,
        query_QD: Vectors,
        target_Q: npt.NDArray[np.integer],
        term: sparse.csr_matrix | None = None,
    ) -> ExactReference:
        """Run and time an exact search.

        Args:
            catalogue: the candidates.
            query_QD, target_Q: the queries.
            term: the sparse term of a model with transitions, `[Q, n_items + 1]`, for candidates only.
        """
        begin = time.perf_counter()
        k = min(FIDELITY_K, len(catalogue.item))
        _, exact = search_exact(catalogue.vector, query_QD, k)
        seconds = time.perf_counter() - begin
        score = rescore(catalogue.vector, query_QD, exact)
        own = rescore(catalogue.vector, query_QD, catalogue.rows_of(target_Q)[:, None])[:, 0]
        if term is None:
            none = np.zeros(len(target_Q), bool)
            return cls(query_QD, target_Q, exact, score, own, score.min(axis=1), none, seconds)
        best, _ = catalogue.join_term(term, query_QD, score, catalogue.item[exact], k)
        of_target = entries_at(term, np.arange(len(target_Q)), target_Q)
        return cls(query_QD, target_Q, exact, score, own + of_target, best.min(axis=1), of_target > 0, seconds)


def measure(index: Index, reference: ExactReference) -> Fidelity:
    """Compare an index with exact search. Ties at the end of the list are interchangeable."""
    k, catalogue = reference.exact.shape[1], index.catalogue
    begin = time.perf_counter()
    score, row = index.search(reference.query, k)
    seconds = time.perf_counter() - begin
    recall = recalled_neighbours(score, reference.score) / k
    target, own = catalogue.rows_of(reference.target), reference.own
    exact_hit = (target >= 0) & (own >= reference.kth_score)
    listed = reference.counted | (row == target[:, None]).any(axis=1)
    hit = exact_hit & (listed | (score[:, -1] >= own))
    hits, exact_hits = int(hit.sum()), int(exact_hit.sum())
    low, high = interval(recall)
    return Fidelity(
        recall=float(recall.mean()),
        recall_low=low,
        recall_high=high,
        hr_ratio=hits / exact_hits if exact_hits else None,
        hr_ratio_low=wilson_low(hits, exact_hits),
        exact_hits=exact_hits,
        queries=len(reference.query),
        queries_per_second=len(reference.query) / max(seconds, 1e-9),
        exact_queries_per_second=len(reference.query) / max(reference.seconds, 1e-9),
    )


def tune(index: Index, reference: ExactReference, requested: float) -> Iterator[tuple[dict[str, int], Fidelity]]:
    """Raise the effort until valid queries reach the requested fidelity; yields each effort and its fidelity.

    If more effort does not help, quantised scores are the limit: then more candidates are rescored. It ends at the
    latest with all lists probed and all candidates rescored.
    """
    effort, refine, before = min(KINDS[index.kind].first, index.max_search_effort), KINDS[index.kind].refine, -1.0
    while True:
        index.set_search_effort(effort, refine)
        result = measure(index, reference)
        yield {KINDS[index.kind].effort_parameter: effort, "refine": refine}, result
        all_scored = refine * FIDELITY_K >= len(index.catalogue.item)
        if result.reaches(requested) or (effort >= index.max_search_effort and all_scored):
            return
        stuck = result.recall - before < 0.1 * (requested - result.recall)
        rescore_more = stuck and index.kind in ("ivf_sq8", "ivf_pq_refine") and not all_scored
        if effort >= index.max_search_effort or rescore_more:
            refine *= 2
        else:
            effort = min(2 * effort, index.max_search_effort)
        before = result.recall
