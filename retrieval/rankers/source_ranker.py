"""Ranks and lists by a source; items without a score follow by popularity."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from retrieval.item_lists import first_listed, is_among, seen_pairs
from retrieval.metrics.ranking import MISS
from retrieval.popularity import Popularity
from retrieval.queries import Queries
from retrieval.search.threads import in_threads, search_threads
from retrieval.sources.scores import Scores
from retrieval.sources.sparse_rows import kth_largest, position_in_row

QUERIES_AT_ONCE = 256


class SourceRanker:
    """Ranks candidates by sparse scores, then those without a score by popularity.

    Args:
        scores: source of positive scores of some items.
        popularity: orders the others, and breaks ties.
    """

    def __init__(self, scores: Scores, popularity: Popularity) -> None:
        self.scores, self.popularity = scores, popularity

    def rank(
        self, queries: Queries, k: int, *, mask_seen: bool
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.integer]]:
        """Ranks of the targets (ties count against them), and the `k` best candidates of each query, padded with 0."""
        tiles = np.split(np.arange(len(queries)), np.arange(QUERIES_AT_ONCE, len(queries), QUERIES_AT_ONCE))
        parts = in_threads(lambda rows: self.tile(queries.take(rows), k, mask_seen=mask_seen), tiles, search_threads())
        return np.concatenate([rank for rank, _ in parts]), np.concatenate([lists for _, lists in parts])

    def tile(
        self, queries: Queries, k: int, *, mask_seen: bool
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.integer]]:
        """As `rank`, for one tile."""
        scored = self.scores(queries)
        query = np.repeat(np.arange(len(queries)), np.diff(scored.indptr))
        item, score = scored.indices.astype(np.int64), scored.data
        clicks = self.popularity.clicks_of(item)
        usable = (clicks >= 0) & (score > 0)
        if mask_seen:
            usable &= ~is_among(query << 32 | item, seen_pairs(queries))
        query, item, score, clicks = query[usable], item[usable], score[usable], clicks[usable]

        is_target = item == queries.target[query]
        own = np.zeros(len(queries), score.dtype)
        own[query[is_target]] = score[is_target]
        own_clicks = self.popularity.clicks_of(queries.target)
        above = (score > own[query]) | ((score == own[query]) & (clicks >= own_clicks[query]))
        ahead = np.bincount(query[above & ~is_target], minlength=len(queries))
        # A target without a score ranks behind all with one, and among the rest by popularity.
        rest = self.popularity.ranks(queries, mask_seen=mask_seen)
        counted = np.bincount(query[clicks >= own_clicks[query]], minlength=len(queries))
        count = np.bincount(query, minlength=len(queries))
        rank = np.where(own > 0, 1 + ahead, np.where(rest == MISS, MISS, rest - counted + count))
        rank[rest == MISS] = MISS
        lists = self._lists(queries, query, item, score, clicks, k, mask_seen=mask_seen)
        return rank.astype(np.int64), lists

    def _lists(
        self,
        queries: Queries,
        query: npt.NDArray[np.int64],
        item: npt.NDArray[np.int64],
        score: npt.NDArray[np.floating],
        clicks: npt.NDArray[np.int64],
        k: int,
        *,
        mask_seen: bool,
    ) -> npt.NDArray[np.integer]:
        count = np.bincount(query, minlength=len(queries))
        top = score >= kth_largest(score, np.concatenate([[0], np.cumsum(count)]), k)[query]
        query, item, score, clicks = query[top], item[top], score[top], clicks[top]
        order = np.lexsort((item, -clicks, -score, query))
        column = position_in_row(query[order], len(queries))
        order, column = order[column < k], column[column < k]
        best = np.zeros((len(queries), k), np.int64)
        best[query[order], column] = item[order]
        popular = self.popularity.lists(queries, 2 * k, mask_seen=mask_seen)
        listed = np.sort((np.arange(len(queries))[:, None] << 32 | best)[best > 0])
        popular[is_among(np.arange(len(queries))[:, None] << 32 | popular, listed)] = 0
        return first_listed(np.concatenate([best, popular], axis=1), k)
