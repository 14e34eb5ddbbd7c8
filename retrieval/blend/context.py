"""Candidate features other than source scores: session length, popularity, repeats, categories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from retrieval.blend.pool import Pool
from retrieval.popularity import Popularity
from retrieval.queries import Queries
from retrieval.sources.sparse_rows import latest_clicks

Context = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class CandidateFeatures:
    """Item and session attributes of the dataset, and the candidate features computed from them.

    Attributes:
        popularity: of the candidates.
        category: int64 `[n_items + 1]`, category of each item.
        successors: float32 `[n_items + 1, n_items + 1]`, counts of direct transitions; None if they are not
            counted.
    """

    popularity: Popularity
    category: npt.NDArray[np.int64]
    successors: sparse.csr_matrix | None

    def counted(self, from_N: npt.NDArray[np.integer], to_N: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Count of each transition; 0 if it is not among the item's retained successors."""
        if self.successors is None or not len(from_N):
            return np.zeros(len(from_N), np.float32)
        return np.asarray(self.successors[from_N, to_N], np.float32).ravel()

    def context(self, pool: Pool, queries: Queries) -> Context:
        """Features of each candidate `[N]`, by name."""
        end, n_seen = queries.seen_offset[1:], queries.n_seen
        last = queries.seen[end - 1]
        before = queries.seen[np.maximum(end - 2, queries.seen_offset[:-1])]
        clicks = np.maximum(self.popularity.clicks_of(last), 0)
        out: Context = {
            "session length": n_seen[pool.query],
            "user clicks": queries.n_clicks[pool.query],
            "last item's clicks": clicks[pool.query],
            "after the click before": self.counted(before[pool.query], pool.item),
            "clicks": self.popularity.clicks_of(pool.item),
        }
        query, seen_at = latest_clicks(queries)
        pair, requested = query << 32 | queries.seen[seen_at], pool.query << 32 | pool.item
        index = np.minimum(np.searchsorted(pair, requested), len(pair) - 1)
        repeated = pair[index] == requested
        out["clicks since seen"] = np.where(repeated, end[pool.query] - seen_at[index], 0)
        if self.category.any():
            out |= self._categories(pool, queries, last)
        return out

    def _categories(self, pool: Pool, queries: Queries, last_Q: npt.NDArray[np.integer]) -> Context:
        query = np.repeat(np.arange(len(queries)), queries.n_seen)
        pair, times = np.unique(query << 32 | self.category[queries.seen], return_counts=True)
        own_category = self.category[pool.item]
        requested = pool.query << 32 | own_category
        index = np.minimum(np.searchsorted(pair, requested), len(pair) - 1)
        share = np.where(pair[index] == requested, times[index], 0) / queries.n_seen[pool.query]
        return {
            "category share": share,
            "category of the last": (self.category[last_Q][pool.query] == own_category) * 1.0,
        }
