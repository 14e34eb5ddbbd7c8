"""STAN: items near the shared click in the most similar train sessions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from retrieval.item_lists import matches
from retrieval.queries import Queries
from retrieval.ragged import concat_ranges
from retrieval.sources.sessions import TrainSessions, rows_of_users
from retrieval.sources.sparse_rows import entries_where, largest_of_rows, latest_clicks, row_of_entries, seen_matrix

CLICKS = 10
"""Number of last clicks of the query that are compared with sessions."""
RECENCY = 3.0
"""Decay length in clicks of a shared click's weight by its position in the query (1/e)."""
NEARNESS = 8.0
"""Decay length in clicks of a session item's weight by distance from the shared click, on both sides (1/e)."""
BEFORE = 0.3
"""Factor on the weight of clicks before the shared click."""
LONGEST = 1_000
"""Maximum clicks of a session (`protocol.max_clicks`)."""
_DISTANCE = np.arange(-LONGEST, LONGEST + 1)
DECAY = (np.exp(-np.abs(_DISTANCE) / NEARNESS) * np.where(_DISTANCE < 0, BEFORE, 1.0)).astype(np.float32)
"""Weight by distance from the shared click, starting at `-LONGEST`."""


@dataclass(frozen=True)
class Stan:
    """Sequence and time aware neighbourhood (STAN, Garg et al. 2019), without the term for the time between sessions.

    A train session's similarity is the sum over the items that it shares with the query's last `CLICKS` clicks of idf ×
    e^(-steps back in the query / `RECENCY`); idf as in VSTAN (Ludewig et al. 2021). Each click of the `neighbours` most
    similar ones, ties by the lower row, adds to its item the similarity × how late the latest shared click is (1 for
    the last click, 1 / `CLICKS` for the first of them) × e^(-its distance from that click in the session / `NEARNESS`).
    Clicks before it count `BEFORE` times that: a soft form of the sequential filter of SF-SKNN (Ludewig and Jannach
    2018).

    The constants were chosen on valid clicks of Toys, LastFM, MovieLens-100K, Diginetica, Tmall and a generated log.

    Attributes:
        sessions: train clicks in order.
        of_item: `[n_items + 1, S]`, 1 if a session has an item; sampled for items with many sessions.
        idf: float32 `[n_items + 1]`, log(1 + all sessions / sessions with the item).
        neighbours: number of nearest sessions.
    """

    sessions: TrainSessions
    of_item: sparse.csr_matrix
    idf: npt.NDArray[np.float32]
    neighbours: int

    @classmethod
    def of(cls, sessions: TrainSessions, of_item: sparse.csr_matrix, neighbours: int) -> Stan:
        """From sessions, and the sessions of each item."""
        times = np.bincount(sessions.items, minlength=sessions.n_items + 1)
        idf = np.log1p(len(sessions.user_id) / np.maximum(times, 1))
        return cls(sessions, of_item, idf.astype(np.float32), neighbours)

    def __call__(self, queries: Queries) -> sparse.csr_matrix:
        """Score a batch; a query's own session is excluded, since it may contain the target."""
        queries = queries.latest(CLICKS)
        back = np.repeat(queries.seen_offset[1:], queries.n_seen) - 1 - np.arange(len(queries.seen))
        nearest = self._near_sessions(queries, back)
        query, session = row_of_entries(nearest), nearest.indices

        # The clicks of the nearest sessions, by (query, session) pair.
        offset = self.sessions.offset
        length = offset[session + 1] - offset[session]
        indptr, index = concat_ranges(offset[session], length)
        item = self.sessions.items[index]

        of_query, latest = latest_clicks(queries)
        click, which = matches(np.repeat(query << 32, length) | item, of_query << 32 | queries.seen[latest])
        pair, step = np.searchsorted(indptr, click, side="right") - 1, back[latest[which]]
        latest_step = np.full(len(session), CLICKS, np.int64)
        np.minimum.at(latest_step, pair, step)
        is_latest = step == latest_step[pair]
        at = np.zeros(len(session), np.int64)
        np.maximum.at(at, pair[is_latest], index[click[is_latest]])

        decay = DECAY[index - np.repeat(at - LONGEST, length)]
        weight = (nearest.data * (1.0 - latest_step / CLICKS)).astype(np.float32)
        clicks = sparse.csr_matrix((decay, item, indptr), shape=(len(session), len(self.idf)))
        shape = (len(queries), len(session))
        return (sparse.csr_matrix((weight, np.arange(len(session)), nearest.indptr), shape=shape) @ clicks).tocsr()

    def _near_sessions(self, queries: Queries, back_N: npt.NDArray[np.int64]) -> sparse.csr_matrix:
        """Similarities of the nearest sessions `[Q, S]`."""
        value = np.exp(-back_N / RECENCY) * self.idf[queries.seen]
        similar = (seen_matrix(queries, value, len(self.idf) - 1) @ self.of_item).tocsr()
        own = rows_of_users(self.sessions.user_id, queries.user_id)
        others = similar.indices != np.repeat(own, np.diff(similar.indptr))
        return largest_of_rows(entries_where(similar, others), self.neighbours)
