"""Recommenders from co-occurrence: successors of the last click, ItemKNN, V-SkNN.

All three score with sparse products over the train sessions; what they give no score is ordered by
popularity, behind everything that they score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from scipy import sparse

from etl.contract import Dataset
from retrieval.baselines import HELD_OUT, Popularity
from retrieval.bundle import Queries
from retrieval.metrics import MISS

SESSIONS_PER_ITEM = 1_000
"""Train sessions that V-SkNN looks at for a seen item: a sample where it has more."""
QUERIES_AT_ONCE = 256
ITEMS_AT_ONCE = 4_096
DECAY_STEPS = 10
"""V-SkNN: a click so many steps back weighs nothing any more."""


@dataclass(frozen=True)
class TrainSessions:
    """The train clicks of all sessions.

    Attributes:
        user_id: int64 `[S]`, rising.
        offset: int64 `[S + 1]` into `items`.
        items: int32, dense ids, oldest first.
        n_items: items of the dataset.
    """

    user_id: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    items: npt.NDArray[np.int32]
    n_items: int

    def __post_init__(self) -> None:
        # All baselines read the same arrays: whoever writes to them fails at once.
        for array in (self.user_id, self.offset, self.items):
            array.flags.writeable = False

    @classmethod
    def of(cls, dataset: Dataset) -> TrainSessions:
        """Read all sessions of a dataset but their last two clicks."""
        users, lengths, items = [], [], []
        for entry in dataset.session_files:
            table = pq.read_table(dataset.file(entry.path), columns=["user_id", "items"])
            column = table["items"].combine_chunks()
            kept = np.diff(column.offsets.to_numpy())
            place = np.arange(kept.sum()) - np.repeat(np.cumsum(kept) - kept, kept)
            users.append(table["user_id"].to_numpy())
            items.append(column.flatten().to_numpy()[place < np.repeat(kept - HELD_OUT, kept)])
            lengths.append(kept - HELD_OUT)
        user, length = np.concatenate(users), np.concatenate(lengths).astype(np.int64)
        order = np.argsort(user, kind="stable")
        begin = np.cumsum(length) - length
        offset = np.concatenate([[0], np.cumsum(length[order])])
        place = np.arange(offset[-1]) + np.repeat(begin[order] - offset[:-1], length[order])
        return cls(user[order], offset, np.concatenate(items)[place], dataset.manifest.n_items)

    @property
    def session(self) -> npt.NDArray[np.int64]:
        """The session of each click."""
        return np.repeat(np.arange(len(self.user_id)), np.diff(self.offset))

    def incidence(self) -> sparse.csr_matrix:
        """1 where a session `[S]` has an item `[n_items + 1]`."""
        shape = (len(self.user_id), self.n_items + 1)
        ones = np.ones(len(self.items), np.float32)
        # scipy takes arrays over as they are, and `sum_duplicates` compacts them in place.
        matrix = sparse.csr_matrix((ones, self.items.copy(), self.offset.copy()), shape=shape)
        matrix.sum_duplicates()
        matrix.data[:] = 1.0
        return matrix

    def row_of(self, user_Q: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The row of each user's own session, -1 where there is none."""
        row = np.minimum(np.searchsorted(self.user_id, user_Q), max(len(self.user_id) - 1, 0))
        return np.where(self.user_id[row] == user_Q, row, -1) if len(self.user_id) else np.full(len(user_Q), -1)


Scores = Callable[[Queries], sparse.csr_matrix]
"""Positive scores of some items `[Q, n_items + 1]`."""


def last_item(sessions: TrainSessions) -> Scores:
    """The last click once more, and nothing else."""
    n_items = sessions.n_items

    def scores(queries: Queries) -> sparse.csr_matrix:
        last = queries.seen[queries.seen_offset[1:] - 1]
        ones = np.ones(len(queries), np.float32)
        return sparse.csr_matrix((ones, last, np.arange(len(queries) + 1)), shape=(len(queries), n_items + 1))

    return scores


def markov(sessions: TrainSessions) -> Scores:
    """Successors of the last click: how often each item came right after it."""
    same = np.diff(sessions.session) == 0
    pair = (sessions.items[:-1][same], sessions.items[1:][same])
    ones = np.ones(int(same.sum()), np.float32)
    size = sessions.n_items + 1
    successors = sparse.coo_matrix((ones, pair), shape=(size, size)).tocsr()  # equal pairs are added up

    def scores(queries: Queries) -> sparse.csr_matrix:
        return successors[queries.seen[queries.seen_offset[1:] - 1]]

    return scores


def sampled_rows(matrix: sparse.csr_matrix, most: int) -> sparse.csr_matrix:
    """At most `most` entries of each row, a seeded sample where it has more."""
    count = np.diff(matrix.indptr)
    if count.max(initial=0) <= most:
        return matrix
    row = np.repeat(np.arange(matrix.shape[0]), count)
    order = np.lexsort((np.random.default_rng(0).random(matrix.nnz), row))
    kept = np.sort(order[np.arange(matrix.nnz) - np.repeat(matrix.indptr[:-1], count) < most])
    indptr = np.concatenate([[0], np.cumsum(np.minimum(count, most))])
    return sparse.csr_matrix((matrix.data[kept], matrix.indices[kept], indptr), shape=matrix.shape)


def without_own(weight_QS: sparse.csr_matrix, own_Q: npt.NDArray[np.int64]) -> sparse.csr_matrix:
    """Session weights without each query's own session, which holds what it asks for anyway."""
    row = np.repeat(np.arange(weight_QS.shape[0]), np.diff(weight_QS.indptr))
    weight_QS.data[weight_QS.indices == own_Q[row]] = 0.0
    weight_QS.eliminate_zeros()
    return weight_QS


def item_knn(sessions: TrainSessions, neighbours: int) -> Scores:
    """ItemKNN: each distinct seen item's cosines with its `neighbours` nearest items, added up.

    The cosine of i and j is how many train sessions hold both over √(sessions of i · sessions of j)
    (Sarwar et al. 2001). An item is not its own neighbour.
    """
    has = sessions.incidence()
    scale = sparse.diags(1.0 / np.sqrt(np.maximum(np.asarray(has.sum(axis=0)).ravel(), 1.0)), dtype=np.float32)
    scaled = (has @ scale).tocsr()
    of_item, nearest = scaled.T.tocsr(), []
    for begin in range(0, of_item.shape[0], ITEMS_AT_ONCE):
        cosine = (of_item[begin : begin + ITEMS_AT_ONCE] @ scaled).tocsr()
        row = begin + np.repeat(np.arange(cosine.shape[0]), np.diff(cosine.indptr))
        cosine.data[cosine.indices == row] = 0.0
        cosine.eliminate_zeros()
        nearest.append(largest_of_rows(cosine, neighbours))
    cosines = sparse.vstack(nearest).tocsr()

    def scores(queries: Queries) -> sparse.csr_matrix:
        return (seen_matrix(queries, np.ones(len(queries.seen)), sessions.n_items) @ cosines).tocsr()

    return scores


def v_sknn(sessions: TrainSessions, neighbours: int) -> Scores:
    """V-SkNN (Ludewig and Jannach 2018): what the most similar train sessions hold.

    A session's similarity is the sum over shared items of their place in the query divided by its
    length, so late clicks count most. The `neighbours` best ones add to each of their items their
    similarity × how late the latest shared click is (1 for the last click, down to 0 ten steps back).
    """
    has = sessions.incidence()
    of_item = sampled_rows(has.T.tocsr(), SESSIONS_PER_ITEM)

    def scores(queries: Queries) -> sparse.csr_matrix:
        place = np.arange(len(queries.seen)) - np.repeat(queries.seen_offset[:-1], queries.n_seen)
        length = np.repeat(queries.n_seen, queries.n_seen)
        late = seen_matrix(queries, (place + 1) / length, sessions.n_items)
        steps = seen_matrix(queries, np.maximum(1.0 - (length - 1 - place) / DECAY_STEPS, 1e-9), sessions.n_items)
        similarity = without_own((late @ of_item).tocsr(), sessions.row_of(queries.user_id))
        best = largest_of_rows(similarity, neighbours)
        latest = largest_shared(steps, has, best)
        return (best.multiply(latest) @ has).tocsr()

    return scores


def seen_matrix(queries: Queries, value_N: npt.NDArray[np.floating], n_items: int) -> sparse.csr_matrix:
    """Values of the seen clicks `[Q, n_items + 1]`; of an item seen twice the later one's."""
    query = np.repeat(np.arange(len(queries)), queries.n_seen)
    pair = query.astype(np.int64) << 32 | queries.seen
    last = len(pair) - 1 - np.unique(pair[::-1], return_index=True)[1]
    shape = (len(queries), n_items + 1)
    return sparse.csr_matrix((value_N[last].astype(np.float32), (query[last], queries.seen[last])), shape=shape)


def largest_of_rows(matrix: sparse.csr_matrix, k: int) -> sparse.csr_matrix:
    """The `k` largest entries of each row, ties by the lower column."""
    matrix.sort_indices()
    count = np.diff(matrix.indptr)
    row = np.repeat(np.arange(matrix.shape[0]), count)
    order = np.lexsort((matrix.indices, -matrix.data, row))
    kept = np.sort(order[np.arange(matrix.nnz) - np.repeat(matrix.indptr[:-1], count) < k])
    indptr = np.concatenate([[0], np.cumsum(np.minimum(count, k))])
    return sparse.csr_matrix((matrix.data[kept], matrix.indices[kept], indptr), shape=matrix.shape)


def largest_shared(
    steps_QI: sparse.csr_matrix, has_SI: sparse.csr_matrix, pairs_QS: sparse.csr_matrix
) -> sparse.csr_matrix:
    """For each (query, session) pair the largest step value of an item that they share."""
    step = np.zeros(has_SI.shape[1], np.float32)
    latest = []
    for query in range(steps_QI.shape[0]):
        mine = slice(steps_QI.indptr[query], steps_QI.indptr[query + 1])
        session = pairs_QS.indices[pairs_QS.indptr[query] : pairs_QS.indptr[query + 1]]
        step[steps_QI.indices[mine]] = steps_QI.data[mine]
        theirs = has_SI[session]
        latest.append(np.maximum.reduceat(step[theirs.indices], theirs.indptr[:-1]) if len(session) else step[:0])
        step[steps_QI.indices[mine]] = 0.0
    return sparse.csr_matrix((np.concatenate(latest), pairs_QS.indices, pairs_QS.indptr), shape=pairs_QS.shape)


class Neighbours:
    """Ranks candidates by sparse scores, and what has none by popularity.

    Args:
        scores: positive scores of some items.
        popularity: orders the others, and breaks ties.
    """

    def __init__(self, scores: Scores, popularity: Popularity) -> None:
        self.scores, self.popularity = scores, popularity

    def rank(
        self, queries: Queries, k: int, *, mask_seen: bool
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.integer]]:
        """Ranks of the targets, ties against them, and the `k` best candidates of each query, 0 where fewer."""
        parts = [
            self._rank(queries.take(rows), k, mask_seen=mask_seen)
            for rows in np.split(np.arange(len(queries)), np.arange(QUERIES_AT_ONCE, len(queries), QUERIES_AT_ONCE))
        ]
        return np.concatenate([rank for rank, _ in parts]), np.concatenate([lists for _, lists in parts])

    def _rank(
        self, queries: Queries, k: int, *, mask_seen: bool
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.integer]]:
        found = self.scores(queries)
        query = np.repeat(np.arange(len(queries)), np.diff(found.indptr))
        item, score = found.indices.astype(np.int64), found.data
        clicks = self.popularity.clicks_of(item)
        usable = (clicks >= 0) & (score > 0)
        if mask_seen:
            seen = np.repeat(np.arange(len(queries)), queries.n_seen) << 32 | queries.seen.astype(np.int64)
            usable &= ~np.isin(query << 32 | item, seen)
        query, item, score, clicks = query[usable], item[usable], score[usable], clicks[usable]

        is_target = item == queries.target[query]
        own = np.zeros(len(queries))
        own[query[is_target]] = score[is_target]
        own_clicks = self.popularity.clicks_of(queries.target)
        above = (score > own[query]) | ((score == own[query]) & (clicks >= own_clicks[query]))
        ahead = np.bincount(query[above & ~is_target], minlength=len(queries))
        # A target without a score stands behind all that have one, and among the rest by popularity.
        rest = self.popularity.ranks(queries, mask_seen=mask_seen)
        counted = np.bincount(query[clicks >= own_clicks[query]], minlength=len(queries))
        scored = np.bincount(query, minlength=len(queries))
        rank = np.where(own > 0, 1 + ahead, np.where(rest == MISS, MISS, rest - counted + scored))
        rank[rest == MISS] = MISS
        return rank.astype(np.int64), self._lists(queries, query, item, score, clicks, k, mask_seen=mask_seen)

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
        order = np.lexsort((item, -clicks, -score, query))
        begin = np.searchsorted(query[order], np.arange(len(queries) + 1))
        popular = self.popularity.lists(queries, 2 * k, mask_seen=mask_seen)
        out = np.zeros((len(queries), k), np.int64)
        for row in range(len(queries)):
            mine = item[order[begin[row] : begin[row + 1]]][:k]
            others = popular[row][~np.isin(popular[row], mine) & (popular[row] > 0)]
            both = np.concatenate([mine, others])[:k]
            out[row, : len(both)] = both
        return out
