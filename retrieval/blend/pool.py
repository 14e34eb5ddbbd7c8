"""Candidate pools: the union of the sources' candidates per query, each scored by every source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import sparse

from etl.runtime.arrays import Float32Array
from etl.runtime.lookup import lookup
from retrieval.blend.seconds import Seconds
from retrieval.item_lists import is_among, matches, seen_pairs
from retrieval.popularity import Popularity
from retrieval.queries import Queries
from retrieval.rankers.index_ranker import search_items, search_unseen
from retrieval.rankers.registry import MODEL
from retrieval.search.index import Catalogue, Index
from retrieval.sources.scores import Scores
from retrieval.sources.sparse_rows import (
    entries_at,
    entries_where,
    kth_largest,
    largest_of_rows,
    position_in_row,
    row_of_entries,
)

MIN_CANDIDATES = 100
"""Minimum number of best items that each source adds to a query's pool; with a larger cutoff, that many."""
NOT_LISTED = 1_000
"""Rank of an item that is not in a source's list."""


@dataclass(frozen=True)
class Pool:
    """N candidates of Q queries, sorted by query and item.

    Attributes:
        names: names of the S sources.
        query: int64 `[N]`, sorted.
        item: int64 `[N]`, dense ids.
        raw: float32 `[S, N]`, the sources' scores; 0 = no score.
        share: float32 `[S, N]`, scores normalised by the source's sum for the query; for the model the softmax over
            the pool.
        rank: float32 `[S, N]`, rank in the source's list from 1, else `NOT_LISTED`.
        popularity: float32 `[N]`, train clicks divided by those of the most clicked candidate.
        is_target: `[N]`.
        n_queries: Q.
    """

    names: tuple[str, ...]
    query: npt.NDArray[np.int64]
    item: npt.NDArray[np.int64]
    raw: Float32Array
    share: Float32Array
    rank: Float32Array
    popularity: Float32Array
    is_target: npt.NDArray[np.bool_]
    n_queries: int

    def take(self, chosen_N: npt.NDArray[np.bool_]) -> Pool:
        """Select candidates; queries keep their numbers."""
        rows = {name: getattr(self, name)[chosen_N] for name in ("query", "item", "popularity", "is_target")}
        columns = {name: getattr(self, name)[:, chosen_N] for name in ("raw", "share", "rank")}
        return replace(self, **rows, **columns)

    def target_ranks(self, score_N: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
        """Rank of each query's target by a score, ties count against it; 0 if the target is not in the pool."""
        own = np.full(self.n_queries, np.inf, score_N.dtype)
        own[self.query[self.is_target]] = score_N[self.is_target]
        not_lower = ~(score_N < own[self.query])
        ahead = np.bincount(self.query[not_lower & ~self.is_target], minlength=self.n_queries)
        return np.where(np.isinf(own), 0, 1 + ahead)

    def lists(
        self, score_N: npt.NDArray[np.floating], k: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.floating]]:
        """The `k` best candidates of each query and their scores `[Q, k]`, ties by ascending id; 0 and -inf beyond."""
        indptr = np.concatenate([[0], np.cumsum(np.bincount(self.query, minlength=self.n_queries))])
        top = np.flatnonzero(score_N >= kth_largest(score_N, indptr, k)[self.query])
        order = top[np.lexsort((self.item[top], -score_N[top], self.query[top]))]
        index = position_in_row(self.query[order], self.n_queries)
        order, index = order[index < k], index[index < k]
        item, score = np.zeros((self.n_queries, k), np.int64), np.full((self.n_queries, k), -np.inf, score_N.dtype)
        item[self.query[order], index], score[self.query[order], index] = self.item[order], score_N[order]
        return item, score

    def ranks_of(self, item_QK: npt.NDArray[np.int64]) -> Float32Array:
        """Ranks of listed items in each source `[S, Q, K]`; NaN if a source does not list the item."""
        if not len(self.item):
            return np.full((len(self.names), *item_QK.shape), np.nan, np.float32)
        pair = np.arange(self.n_queries)[:, None] << 32 | item_QK
        index, inside = lookup(self.query << 32 | self.item, pair)
        rank = self.rank[:, index]
        return np.where(inside & (rank < NOT_LISTED), rank, np.float32(np.nan))


class Pools:
    """Builds candidate pools.

    Args:
        sources: sources by name; `None` = the model, scored through the index.
        index: index over the candidates.
        popularity: popularity of the candidates.
        mask_seen: whether to exclude seen items.
        temperature: softmax temperature of the model's scores.
        candidates: number of best items that each source adds.
    """

    def __init__(
        self,
        sources: Mapping[str, Scores | None],
        index: Index,
        popularity: Popularity,
        *,
        mask_seen: bool,
        temperature: float = 1.0,
        candidates: int = MIN_CANDIDATES,
    ) -> None:
        self.sources, self.index, self.popularity = dict(sources), index, popularity
        self.mask_seen, self.temperature, self.candidates = mask_seen, temperature, candidates
        self.seconds = Seconds(self.sources)
        self.is_candidate = np.zeros(popularity.n_items + 1, bool)
        self.is_candidate[: len(popularity.clicks)] = popularity.clicks >= 0

    def of(self, queries: Queries) -> Pool:
        """Build the pool of a batch."""
        seen = seen_pairs(queries) if self.mask_seen else np.zeros(0, np.int64)
        scores_by_name = {}
        for name, source in self.sources.items():
            with self.seconds.timed(name):
                scores_by_name[name] = self._scores(source, queries, seen)
        best = {name: largest_of_rows(scores.copy(), self.candidates) for name, scores in scores_by_name.items()}
        key = np.sort(np.concatenate([_pairs(scores) for scores in best.values()]))
        key = key[np.diff(key, prepend=-1) > 0]
        query, item = key >> 32, key & 0xFFFFFFFF
        shape = (len(best), len(key))
        raw, share, rank = (
            np.zeros(shape, np.float32),
            np.zeros(shape, np.float32),
            np.full(shape, NOT_LISTED, np.float32),
        )
        for row, (name, scores) in enumerate(scores_by_name.items()):
            rank[row, np.searchsorted(key, _pairs(best[name]))] = _ranks(best[name])
            if name == MODEL:
                with self.seconds.timed(name):
                    raw[row] = exact_scores(self.index.catalogue, queries, query, item)
                    share[row] = softmax_of_rows(raw[row] / np.float32(self.temperature), query, len(queries))
            else:
                entry, index = matches(_pairs(scores), key)
                raw[row, index] = scores.data[entry]
                total = np.maximum(np.bincount(row_of_entries(scores), scores.data, len(queries)), 1e-30)
                share[row] = raw[row] / total.astype(np.float32)[query]
        clicks = self.popularity.clicks_of(item) / max(int(self.popularity.clicks.max(initial=0)), 1)
        is_target = item == queries.target[query]
        return Pool(tuple(best), query, item, raw, share, rank, clicks.astype(np.float32), is_target, len(queries))

    def _scores(self, source: Scores | None, queries: Queries, seen: npt.NDArray[np.int64]) -> sparse.csr_matrix:
        """A source's positive scores of candidates, without seen items if these are masked."""
        scores = self._listed(queries) if source is None else source(queries)
        row = row_of_entries(scores)
        usable = (scores.data > 0) & self.is_candidate[scores.indices]
        if self.mask_seen and source is not None:
            usable &= ~is_among(row << 32 | scores.indices, seen)
        return entries_where(scores, usable)

    def _listed(self, queries: Queries) -> sparse.csr_matrix:
        """The items that the index lists, scored by 1 / rank; exact scores are computed later for the complete pool."""
        search = search_unseen if self.mask_seen else search_items
        _, listed = search(self.index, queries, min(self.candidates, len(self.index.catalogue.item)))
        inside = listed > 0
        index = np.cumsum(inside, axis=1)
        indptr = np.concatenate([[0], np.cumsum(inside.sum(axis=1))])
        score = (1.0 / index[inside]).astype(np.float32)
        return sparse.csr_matrix((score, listed[inside], indptr), shape=(len(queries), self.popularity.n_items + 1))


def exact_scores(
    catalogue: Catalogue, queries: Queries, query_N: npt.NDArray[np.int64], item_N: npt.NDArray[np.int64]
) -> Float32Array:
    """The model's scores of (query, item) pairs; the summation order does not depend on the batch."""
    out, row = np.empty(len(item_N), np.float32), catalogue.rows_of(item_N)
    for begin in range(0, len(item_N), 1 << 17):
        part = slice(begin, begin + (1 << 17))
        out[part] = np.einsum("nd,nd->n", catalogue.vector[row[part]], queries.vector[query_N[part]])
    term = catalogue.transition_term(queries)
    return out if term is None else out + entries_at(term, query_N, item_N).astype(np.float32)


def softmax_of_rows(score_N: Float32Array, query_N: npt.NDArray[np.int64], n_queries: int) -> Float32Array:
    """Softmax over the candidates of each query; `query_N` is sorted."""
    if not len(score_N):
        return score_N
    begin = np.flatnonzero(np.diff(query_N, prepend=-1))
    top = np.full(n_queries, -np.inf, np.float32)
    top[query_N[begin]] = np.maximum.reduceat(score_N, begin)
    power = np.exp((score_N - top[query_N]).astype(np.float64))
    total = np.bincount(query_N, power, n_queries)
    return (power / total[query_N]).astype(np.float32)


def _pairs(scores: sparse.csr_matrix) -> npt.NDArray[np.int64]:
    return row_of_entries(scores) << 32 | scores.indices.astype(np.int64)


def _ranks(best: sparse.csr_matrix) -> Float32Array:
    """Rank of each entry in its row, ties by ascending item; columns are sorted."""
    row, width = row_of_entries(best), int(np.diff(best.indptr).max(initial=0))
    column = position_in_row(row, best.shape[0])
    cells = np.full((best.shape[0], width), -np.inf, best.dtype)
    cells[row, column] = best.data
    order = np.argsort(-cells, axis=1, kind="stable")
    rank = np.empty(cells.shape, np.float32)
    np.put_along_axis(rank, order, np.arange(1, width + 1, dtype=np.float32)[None, :], axis=1)
    return np.asarray(rank[row, column])
