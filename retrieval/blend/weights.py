"""Fits the weights of a sum of sources on the pools of valid queries."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from retrieval.blend.pool import Pool

STEPS = (0.03, 0.1, 0.2, 0.35, 0.6, 1.0, 1.7, 3.0)
"""Weights to try for a source, as multiples of the sum of the others."""
ROUNDS = 2
SAMPLES = 10
"""Number of bootstrap samples of the queries to average weights over."""
TIE = np.float32(1e-6)
"""Weight of popularity, to break ties."""
Weight = npt.NDArray[np.float64]
Gain = npt.NDArray[np.float64]


def summed(pool: Pool, weight_S: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """The weighted sum of the sources' shares for each candidate."""
    score = TIE * pool.popularity
    for weight, share in zip(weight_S, pool.share, strict=True):
        if weight:
            score = score + np.float32(weight) * share
    return score


def gain_of(rank_Q: npt.NDArray[np.int64], cutoff: int) -> Gain:
    """NDCG@cutoff of each query; rank 0 = target not in the pool."""
    hit = (rank_Q > 0) & (rank_Q <= cutoff)
    return np.where(hit, 1.0 / np.log2(np.maximum(rank_Q, 1) + 1.0), 0.0)


def find_weights(pool: Pool, cutoff: int, names: Sequence[str], threads: int = 1) -> Weight:
    """Weights `[S]` that sum to 1: the mean of the best weights of bootstrap samples (bagging, Breiman 1996).

    With a thousand queries the best weights are mostly noise, which bagging averages out. If the best single source is
    better on these queries than the mean, it gets all the weight.

    Args:
        pool: pool of queries whose target is in it; without a query all sources get the same weight.
        cutoff: cutoff of the NDCG to maximise.
        names: sources that may get a weight; those without scores get none.
        threads: samples fitted in parallel; the weights do not depend on it.
    """
    if not pool.n_queries:  # all users of a small dataset may be in one fold
        return np.full(len(pool.names), 1 / len(pool.names))
    search = _Search(pool, cutoff)
    rng = np.random.default_rng(0)
    allowed = [row for row, name in enumerate(pool.names) if name in names and pool.share[row].any()]
    even = np.full(pool.n_queries, 1 / pool.n_queries)
    drawn = [rng.multinomial(pool.n_queries, even) for _ in range(SAMPLES)]
    with ThreadPoolExecutor(threads) as executor:
        samples = list(executor.map(lambda times: search.weights(times, allowed), drawn))
    mean = np.mean(samples, axis=0)
    mean = search.pruned(mean, np.ones(pool.n_queries))
    units = np.eye(len(pool.names))[allowed]
    return max([mean, *units], key=lambda weight: float(search.gain(weight).sum()))


def _without(weight: Weight, row: int) -> Weight:
    """The other weights, renormalised to sum 1."""
    others = np.where(np.arange(len(weight)) == row, 0.0, weight)
    return np.asarray(others / others.sum())


class _Search:
    """Coordinate search over the queries whose target is in the pool."""

    def __init__(self, pool: Pool, cutoff: int) -> None:
        target = np.flatnonzero(pool.is_target)[pool.query]
        self.ahead = pool.share - pool.share[:, target]
        """Each candidate's share minus that of its query's target, float32 `[S, N]`."""
        self.tie = TIE * (pool.popularity - pool.popularity[target])
        self.begin = np.searchsorted(pool.query, np.arange(pool.n_queries))
        self.cutoff = cutoff
        self.known: dict[bytes, Gain] = {}

    def gain(self, weight: Weight) -> Gain:
        """NDCG of each query, cached, since bootstrap samples evaluate the same weights repeatedly."""
        key = weight.tobytes()
        if key not in self.known:
            above = self.tie + weight.astype(np.float32) @ self.ahead
            # Ties count against the target; the count includes the target itself.
            self.known[key] = gain_of(np.add.reduceat(above >= 0, self.begin, dtype=np.int64), self.cutoff)
        return self.known[key]

    def weights(self, times_Q: npt.NDArray[np.number], allowed: Sequence[int]) -> Weight:
        """The best weights for a bootstrap sample with each query `times_Q` times.

        Starts from the best single source and adds the others one by one at their best weight; then each weight is
        optimised again.
        """
        unit = np.eye(len(self.ahead))
        alone = {row: float(times_Q @ self.gain(unit[row])) for row in allowed}
        order = sorted(allowed, key=lambda row: -alone[row])
        weight = unit[order[0]]
        for _ in range(ROUNDS):
            before = weight
            for row in order:
                weight = self._best_step(weight, row, times_Q)
            if np.array_equal(weight, before):
                break
        return self.pruned(weight, times_Q)

    def _best_step(self, weight: Weight, row: int, times_Q: npt.NDArray[np.number]) -> Weight:
        """Optimise the weight of one source, with the others fixed."""
        if weight[row] == 1:
            return weight
        others, unit = _without(weight, row), np.eye(len(weight))[row]
        tried = [(others + step * unit) / (1 + step) for step in STEPS]
        best = max(tried, key=lambda each: float(times_Q @ self.gain(each)))
        return best if times_Q @ (self.gain(best) - self.gain(weight)) > 0 else weight

    def pruned(self, weight: Weight, times_Q: npt.NDArray[np.number]) -> Weight:
        """Drop sources whose removal does not lower NDCG, smallest weight first."""
        for row in np.argsort(weight):
            if 0 < weight[row] < 1:
                others = _without(weight, row)
                if times_Q @ (self.gain(others) - self.gain(weight)) >= 0:
                    weight = others
        return weight
