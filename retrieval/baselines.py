"""Recommenders without training, which every learned model has to beat."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from retrieval.bundle import Queries
from retrieval.metrics import MISS


class Popularity:
    """Scores an item by its train clicks, for everyone alike.

    Args:
        item: dense ids of the candidates, rising, `[C]`.
        train_clicks: their train clicks `[C]`.
    """

    def __init__(self, item: npt.NDArray[np.integer], train_clicks: npt.NDArray[np.integer]) -> None:
        self.clicks = np.full(int(item.max(initial=0)) + 1, -1, np.int64)
        self.clicks[item] = train_clicks
        self.falling = np.sort(-train_clicks)
        self.best_first = item[np.lexsort((item, -train_clicks))]

    def ranks(self, queries: Queries, *, mask_seen: bool) -> npt.NDArray[np.int64]:
        """Rank of each target: how many candidates have at least as many train clicks, itself among them."""
        clicks = self.clicks_of(queries.target)
        rank = np.searchsorted(self.falling, -clicks, side="right").astype(np.int64)
        if mask_seen:
            query = np.repeat(np.arange(len(queries)), queries.n_seen)
            once = _distinct(query, queries.seen)
            seen_clicks = self.clicks_of(queries.seen[once])
            above = (seen_clicks >= clicks[query[once]]) & (seen_clicks >= 0)
            rank -= np.bincount(query[once][above], minlength=len(queries))
            rank[queries.is_repeat] = MISS
        rank[clicks < 0] = MISS
        return rank

    def lists(self, queries: Queries, k: int, *, mask_seen: bool) -> npt.NDArray[np.integer]:
        """The `k` most popular candidates for each query `[Q, k]`, 0 where there are fewer."""
        out = np.zeros((len(queries), k), self.best_first.dtype)
        if not mask_seen:
            out[:, : len(self.best_first)] = self.best_first[:k]
            return out
        deep = self.best_first[: k + int(queries.n_seen.max(initial=0))]
        for row in range(len(queries)):
            seen = queries.seen[queries.seen_offset[row] : queries.seen_offset[row + 1]]
            left = deep[~np.isin(deep, seen)][:k]
            out[row, : len(left)] = left
        return out

    def clicks_of(self, item_N: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Train clicks of items, -1 for one that is no candidate."""
        inside = item_N < len(self.clicks)
        return np.where(inside, self.clicks[np.where(inside, item_N, 0)], -1)


def _distinct(query_N: npt.NDArray[np.integer], item_N: npt.NDArray[np.integer]) -> npt.NDArray[np.intp]:
    """Places of the first of each (query, item) pair."""
    pair = query_N.astype(np.int64) << 32 | item_N.astype(np.int64)
    return np.unique(pair, return_index=True)[1]
