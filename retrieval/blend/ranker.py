"""Ranks a batch of queries by a fitted blend and by its variants (single sources, leave-one-out)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval.blend.context import CandidateFeatures
from retrieval.blend.fit import at_temperature, reranked
from retrieval.blend.fitted import FittedBlend, Weights, fold_of
from retrieval.blend.pool import Pool, Pools
from retrieval.blend.reranker import Reranker
from retrieval.blend.seconds import Seconds
from retrieval.blend.weights import summed
from retrieval.item_lists import first_listed, is_among
from retrieval.metrics.ranking import MISS
from retrieval.queries import Queries
from retrieval.search.threads import in_threads

BLEND = "blend"
"""Name of the blend among the rankers of `ranks.parquet`."""
MIN_TILE, MAX_TILE = 256, 1_024
"""Minimum and maximum queries per tile of a thread: a sparse product over millions of items costs tens of milliseconds
even for few rows, and the candidates of a large tile take 100 MB and more."""

Ranked = tuple[npt.NDArray[np.int64], npt.NDArray[np.integer]]


class BlendRanker:
    """Ranks by the blend, and optionally by its kinds, each single source, and the sum without each source.

    Args:
        learned: weights and re-rankers.
        pools: pools for ranking targets.
        unseen: pools without seen items, for recommendations.
        candidate_features: computes candidate features from session and item attributes.
        deepest: the largest cutoff.
        threads: number of tiles ranked in parallel.
    """

    def __init__(
        self,
        learned: FittedBlend,
        pools: Pools,
        unseen: Pools,
        candidate_features: CandidateFeatures,
        deepest: int,
        threads: int,
    ) -> None:
        self.learned, self.pools, self.unseen, self.candidate_features = learned, pools, unseen, candidate_features
        self.deepest, self.threads = deepest, threads
        self.seconds = Seconds(("sum", "reranker"))

    @property
    def names(self) -> list[str]:
        """The blend and its variants."""
        return [BLEND, *self.variants]

    @property
    def variants(self) -> list[str]:
        """Names of the variants: both kinds, each single source, the sum without each source that has a weight."""
        kinds = ["sum", "reranker"] if self.learned.all_users.reranker else ["sum"]
        out = [f"{BLEND}-{kind}" for kind in kinds] + [f"{BLEND}-source-{name}" for name in self.learned.names]
        used = [name for name, weight in self.learned.all_users.weights.items() if weight]
        return out + [f"{BLEND}-without-{name}" for name in used if len(used) > 1]

    def spent(self) -> dict[str, float]:
        """Seconds by source and kind since the last call, summed over threads."""
        return self.pools.seconds.take() | self.seconds.take()

    @cached_property
    def _rerankers(self) -> list[Reranker | None]:
        """Re-rankers by fold, then that of all users."""
        texts = [weights.reranker for weights in (*self.learned.folds, self.learned.all_users)]
        return [Reranker(text, 1) if text else None for text in texts]

    def rank(self, queries: Queries, split: str, *, variants: bool = True) -> dict[str, Ranked]:
        """Ranks of the targets (ties count against them) and top lists, by name.

        Valid queries are ranked by the blend fitted without the users of their fold.
        """
        names = self.names if variants else [BLEND]
        out: dict[str, Ranked] = {
            name: (np.full(len(queries), MISS), np.zeros((len(queries), self.deepest * (name == BLEND)), np.int64))
            for name in names
        }
        fold = fold_of(queries.user_id) if split == "valid" else np.full(len(queries), -1)
        jobs = []
        for member in np.unique(fold).tolist():
            rows = np.flatnonzero(fold == member)
            jobs += [(member, tile) for tile in self._tiles(rows)]
        ranked = in_threads(lambda job: self._rank(queries.take(job[1]), job[0], names), jobs, self.threads)
        for (_, rows), result in zip(jobs, ranked, strict=True):
            for name, (rank, lists) in result.items():
                out[name][0][rows], out[name][1][rows] = rank, lists
        return out

    def recommend(self, queries: Queries) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]:
        """Scores and items of the best unseen candidates `[Q, deepest]`, padded with -inf and 0 if there are fewer.

        The most popular ones follow those of the pool, each with a score 1 lower than the one before.
        """
        score, item, _ = self.recommend_with_ranks(queries)
        return score, item

    def recommend_with_ranks(
        self, queries: Queries
    ) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.integer], dict[str, npt.NDArray[np.float32]]]:
        """As `recommend`, with the rank of each listed item by source `[Q, deepest]`; NaN if not in its list."""
        tiles = self._tiles(np.arange(len(queries)))

        def best(rows: npt.NDArray[np.intp]) -> tuple[npt.NDArray[Any], ...]:
            some = queries.take(rows)
            pool = self.unseen.of(some)
            item, score = self._filled(some, *pool.lists(self._score(pool, some, -1, self.learned.kind), self.deepest))
            return score, item, pool.ranks_of(item)

        score, item, rank = zip(*in_threads(best, tiles, self.threads), strict=True)
        ranks = np.concatenate(rank, axis=1)
        return np.concatenate(score), np.concatenate(item), dict(zip(self.unseen.sources, ranks, strict=True))

    def _filled(
        self, queries: Queries, item_QK: npt.NDArray[np.int64], score_QK: npt.NDArray[np.floating]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.floating]]:
        """Append the most popular unseen candidates to lists that are shorter than `deepest`."""
        short = np.flatnonzero(item_QK[:, -1] == 0)
        if not len(short):
            return item_QK, score_QK
        item, score = item_QK[short], score_QK[short]
        popular = self.unseen.popularity.lists(queries.take(short), 2 * self.deepest, mask_seen=True).astype(np.int64)
        row = np.arange(len(short))[:, None] << 32
        popular[is_among(row | popular, np.sort((row | item)[item > 0]))] = 0
        filled = first_listed(np.concatenate([item, popular], axis=1), self.deepest)
        length = (item > 0).sum(axis=1, keepdims=True)
        last = np.where(length > 0, np.take_along_axis(score, np.maximum(length - 1, 0), 1), 0)
        below = last - (np.arange(self.deepest) - length + 1).astype(score.dtype)
        score_QK[short] = np.where(item > 0, score, np.where(filled > 0, below, -np.inf))
        item_QK[short] = filled
        return item_QK, score_QK

    def _tiles(self, row_N: npt.NDArray[np.intp]) -> list[npt.NDArray[np.intp]]:
        """Split rows into tiles, several per thread."""
        size = int(np.clip(len(row_N) // (2 * self.threads), MIN_TILE, MAX_TILE))
        return np.split(row_N, np.arange(size, len(row_N), size))

    def _rank(self, queries: Queries, member: int, names: list[str]) -> dict[str, Ranked]:
        pool, temperature = self.pools.of(queries), self._weights(member).temperature
        if temperature not in (None, self.pools.temperature):
            pool = at_temperature(pool, temperature)
        no_candidate = self.candidate_features.popularity.clicks_of(queries.target) < 0
        if self.pools.mask_seen:
            no_candidate |= queries.is_repeat
        kinds = {kind: self._score(pool, queries, member, kind) for kind in self._kinds(names)}
        out: dict[str, Ranked] = {}
        for name in names:
            variant = name.removeprefix(f"{BLEND}-")
            score = (
                kinds[self.learned.kind if name == BLEND else variant]
                if name == BLEND or variant in kinds
                else (summed(pool, self._without(variant, member)))
            )
            rank = pool.target_ranks(score)
            rank[rank == 0] = np.maximum(np.bincount(pool.query, minlength=len(queries)), self.deepest)[rank == 0] + 1
            rank[no_candidate] = MISS
            # Lists of variants are not needed.
            listed = pool.lists(score, self.deepest)[0] if name == BLEND else np.zeros((len(queries), 0), np.int64)
            out[name] = rank, listed
        return out

    def _kinds(self, names: list[str]) -> list[str]:
        return [kind for kind in ("sum", "reranker") if f"{BLEND}-{kind}" in names or kind == self.learned.kind]

    def _weights(self, member: int) -> Weights:
        return self.learned.all_users if member < 0 else self.learned.folds[member]

    def _array(self, weights: Mapping[str, float]) -> npt.NDArray[np.float64]:
        return np.array([weights.get(name, 0.0) for name in self.learned.names])

    def _without(self, variant: str, member: int) -> npt.NDArray[np.float64]:
        """Weights of `source-NAME` or `without-NAME`."""
        kind, _, name = variant.partition("-")
        if kind == "source":
            return self._array({name: 1.0})
        return self._array({n: w for n, w in self._weights(member).weights.items() if n != name})

    def _score(self, pool: Pool, queries: Queries, member: int, kind: str) -> npt.NDArray[np.floating]:
        with self.seconds.timed(kind):
            weights, model = self._array(self._weights(member).weights), self._rerankers[member]
            if kind == "sum" or model is None:
                return summed(pool, weights)
            return reranked((pool, self.candidate_features.context(pool, queries)), weights, model)
