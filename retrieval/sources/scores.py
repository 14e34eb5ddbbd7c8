"""Scoring functions of the sources for a batch of queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from retrieval.item_lists import is_among, seen_pairs
from retrieval.popularity import CategoryPopularity, Popularity
from retrieval.queries import Queries
from retrieval.ragged import index_in_group
from retrieval.sources.sessions import TrainSessions, rows_of_users
from retrieval.sources.sparse_rows import (
    entries_at,
    entries_of_largest,
    kth_largest_count,
    position_in_row,
    sampled_rows,
    seen_matrix,
)

Scores = Callable[[Queries], sparse.csr_matrix]
"""A source: positive float32 scores of some items `[Q, n_items + 1]`; its candidates are the items with a score."""

SESSIONS_PER_ITEM = 1_000
"""Maximum train sessions per seen item in V-SkNN, sampled."""
DECAY_STEPS = 10
"""V-SkNN: number of steps back at which a click's weight reaches 0."""
LONGEST_TOGETHER = 180
"""Maximum clicks of a query for which the sum of positions × 2^DECAY_STEPS is exact in float32."""
STEP_OF_BITS = np.maximum(1.0 - (DECAY_STEPS - np.frexp(np.arange(1 << DECAY_STEPS))[1]) / DECAY_STEPS, 1e-9).astype(
    np.float32
)
"""V-SkNN: weight of the latest shared click by the bit mask of shared clicks; the last click is the highest bit."""


@dataclass(frozen=True)
class SuccessorScores:
    """Scores by the list of the last clicked item: `markov` and `sequential_rules`.

    Attributes:
        lists: float32 `[n_items + 1, n_items + 1]`.
    """

    lists: sparse.csr_matrix

    def __call__(self, queries: Queries) -> sparse.csr_matrix:
        """Score a batch."""
        return self.lists[queries.seen[queries.seen_offset[1:] - 1]]


@dataclass(frozen=True)
class ItemKNNScores:
    """Scores by the sum of the lists of all distinct seen items: `item_knn`.

    Attributes:
        lists: float32 `[n_items + 1, n_items + 1]`.
    """

    lists: sparse.csr_matrix

    def __call__(self, queries: Queries) -> sparse.csr_matrix:
        """Score a batch."""
        seen = seen_matrix(queries, np.ones(len(queries.seen)), self.lists.shape[0] - 1)
        return (seen @ self.lists).tocsr()


@dataclass(frozen=True)
class VSkNNScores:
    """V-SkNN (Ludewig and Jannach 2018): items of the most similar train sessions.

    A session's similarity is the sum over shared items of their position in the query divided by its
    length, so late clicks count most. The `neighbours` best ones, ties by the lower row, add to each of their
    items their similarity × how late the latest shared click is (1 for the last click, down to 0 ten steps back). For
    an item with more than `SESSIONS_PER_ITEM` sessions a sample is used.

    Attributes:
        user_id: int64 `[S]`, sorted, of the train sessions.
        has: `[S, n_items + 1]`, 1 if a session has an item.
        of_item: `[n_items + 1, S]`, transposed; sampled for items with many sessions.
        neighbours: number of nearest sessions.
    """

    user_id: npt.NDArray[np.int64]
    has: sparse.csr_matrix
    of_item: sparse.csr_matrix
    neighbours: int

    @classmethod
    def of(cls, sessions: TrainSessions, neighbours: int) -> VSkNNScores:
        """Index the sessions."""
        has = sessions.incidence()
        has.sort_indices()
        return cls(sessions.user_id, has, sampled_rows(has.T.tocsr(), SESSIONS_PER_ITEM), neighbours)

    def __call__(self, queries: Queries) -> sparse.csr_matrix:
        """Score a batch; a query's own session is excluded, since it may contain the target."""
        position = index_in_group(queries.n_seen) + 1
        back = np.repeat(queries.n_seen, queries.n_seen) - position
        bit = np.where(back < DECAY_STEPS, 1 << np.maximum(DECAY_STEPS - 1 - back, 0), 0)
        # Positions are integers and each click has its own bit, so one float32 sum holds both exactly.
        together = int(queries.n_seen.max(initial=0)) <= LONGEST_TOGETHER
        value = (position << DECAY_STEPS) + bit if together else position
        n_items = self.has.shape[1] - 1
        shared = (seen_matrix(queries, value, n_items) @ self.of_item).tocsr()
        places = shared.data.astype(np.int32) >> (DECAY_STEPS if together else 0)
        own = rows_of_users(self.user_id, queries.user_id).astype(shared.indices.dtype)
        places[shared.indices == np.repeat(own, np.diff(shared.indptr))] = 0
        threshold = np.maximum(kth_largest_count(places, shared.indptr, self.neighbours), 1)
        best = entries_of_largest(places, shared.indices, shared.indptr, self.neighbours, threshold)
        query = np.searchsorted(shared.indptr, best, side="right") - 1
        session = shared.indices[best]
        if together:
            bits = shared.data[best].astype(np.int32) & ((1 << DECAY_STEPS) - 1)
        else:
            recent = (seen_matrix(queries, bit, n_items) @ self.of_item).tocsr()
            recent.sort_indices()
            bits = entries_at(recent, query, session).astype(np.int32)
        weight = (places[best] / queries.n_seen[query]).astype(np.float32) * STEP_OF_BITS[bits]
        indptr = np.concatenate([[0], np.cumsum(np.bincount(query, minlength=len(queries)))])
        weights = sparse.csr_matrix((weight, session, indptr), shape=(len(queries), len(self.user_id)))
        return (weights @ self.has).tocsr()


def last_item(n_items: int) -> Scores:
    """Scores only the last clicked item."""

    def scores(queries: Queries) -> sparse.csr_matrix:
        last = queries.seen[queries.seen_offset[1:] - 1]
        ones = np.ones(len(queries), np.float32)
        return sparse.csr_matrix((ones, last, np.arange(len(queries) + 1)), shape=(len(queries), n_items + 1))

    return scores


def repeats(n_items: int) -> Scores:
    """Scores all seen items by 1 / (number of clicks ago)."""

    def scores(queries: Queries) -> sparse.csr_matrix:
        back = np.repeat(queries.seen_offset[1:], queries.n_seen) - np.arange(len(queries.seen))
        return seen_matrix(queries, 1.0 / back, n_items)

    return scores


def popularity(popular: Popularity, max_items: int, *, mask_seen: bool) -> Scores:
    """Scores the `max_items` most clicked candidates by 1 + train clicks."""

    def scores(queries: Queries) -> sparse.csr_matrix:
        return scored_lists(popular.lists(queries, max_items, mask_seen=mask_seen), popular)

    return scores


def category_popularity(categories: CategoryPopularity, max_items: int, *, mask_seen: bool) -> Scores:
    """Scores the `max_items` most clicked candidates of the session's categories by clicks × the category's share."""

    def scores(queries: Queries) -> sparse.csr_matrix:
        query = np.repeat(np.arange(len(queries)), queries.n_seen)
        category = categories.category[queries.seen]
        pair, times = np.unique(query << 32 | category, return_counts=True)
        query, category = pair >> 32, pair & 0xFFFFFFFF
        # At most `times` of a category's items were seen: this many more are listed, since those are removed.
        length = np.minimum(categories.sizes[category], max_items + (times if mask_seen else 0))
        number = np.repeat(np.arange(len(pair)), length)
        item = categories.best_first[categories.begin[category[number]] + position_in_row(number, len(pair))]
        if mask_seen:
            unseen = ~is_among(query[number] << 32 | item.astype(np.int64), seen_pairs(queries))
            number, item = number[unseen], item[unseen]
        listed = position_in_row(number, len(pair)) < max_items
        number, item = number[listed], item[listed]
        clicks = (1.0 + categories.popularity.clicks_of(item)).astype(np.float32)
        share = (times / queries.n_seen[query]).astype(np.float32)
        shape = (len(queries), categories.popularity.n_items + 1)
        return sparse.csr_matrix((clicks * share[number], (query[number], item)), shape=shape)

    return scores


def scored_lists(listed_QK: npt.NDArray[np.integer], popular: Popularity) -> sparse.csr_matrix:
    """Scores of listed items (0 = none): 1 + train clicks."""
    inside = listed_QK > 0
    indptr = np.concatenate([[0], np.cumsum(inside.sum(axis=1))])
    item = listed_QK[inside]
    score = (1.0 + popular.clicks_of(item)).astype(np.float32)
    return sparse.csr_matrix((score, item.astype(np.int32), indptr), shape=(len(listed_QK), popular.n_items + 1))
