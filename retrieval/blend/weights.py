"""Weights of a sum of sources, fitted on the pools of valid queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrieval.blend.pool import Pool

STEPS = (0.03, 0.1, 0.2, 0.35, 0.6, 1.0, 1.7, 3.0)
"""Weights of a source that are tried, as multiples of all others' together."""
ROUNDS = 2
LEAST_T = 2.0
"""A source joins where its gain is so many standard errors: less is what chance gives a useless one."""
TIE = np.float32(1e-6)
"""What popularity adds: it orders what the sources score alike."""


def summed(pool: Pool, weight_S: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """The weighted sum of the sources' shares for each candidate."""
    score = TIE * pool.popularity
    for weight, share in zip(weight_S, pool.share, strict=True):
        if weight:
            score = score + np.float32(weight) * share
    return score


def gain_of(rank_Q: npt.NDArray[np.int64], cutoff: int) -> npt.NDArray[np.float64]:
    """NDCG@cutoff of each query; rank 0 stands for a target that is not in the pool."""
    hit = (rank_Q > 0) & (rank_Q <= cutoff)
    return np.where(hit, 1.0 / np.log2(np.maximum(rank_Q, 1) + 1.0), 0.0)


@dataclass
class _Search:
    """Queries whose target is in the pool; of `n_queries` in all."""

    pool: Pool
    cutoff: int
    n_queries: int

    def gain(self, score: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        return gain_of(self.pool.ahead(score), self.cutoff)

    def t(self, difference_Q: npt.NDArray[np.float64]) -> float:
        """Mean gain over its standard error, over all queries; those outside gain nothing."""
        mean = float(difference_Q.sum()) / self.n_queries
        variance = float((difference_Q**2).sum()) / self.n_queries - mean**2
        return mean / np.sqrt(max(variance, 1e-30) / self.n_queries)


def find_weights(pool: Pool, cutoff: int, n_queries: int, names: Sequence[str]) -> npt.NDArray[np.float64]:
    """Weights `[S]` that sum to 1 and whose NDCG@cutoff on these queries is at least that of the best single source.

    It begins with the best source alone; the others join one after another, at the weight that gains most, where that
    is more than chance; weights are then tried again, and a source that is not missed is dropped.
    """
    search = _Search(pool, cutoff, n_queries)
    tie, share = TIE * pool.popularity, pool.share
    allowed = [row for row, name in enumerate(pool.names) if name in names]
    alone = {row: search.gain(tie + share[row]) for row in allowed}
    weight = np.zeros(len(pool.names))
    first = max(alone, key=lambda row: alone[row].sum())
    weight[first], best = 1.0, alone[first]
    for _ in range(ROUNDS):
        before = weight
        for row in sorted(allowed, key=lambda row: -alone[row].sum()):
            weight, best = _best_step(search, weight, best, row)
        if np.array_equal(weight, before):
            break
    return _pruned(search, weight, best, np.sum(alone[first]))


def _best_step(
    search: _Search, weight: npt.NDArray[np.float64], best: npt.NDArray[np.float64], row: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Weights and gains with the best weight of one source beside the others'."""
    others = weight.copy()
    others[row] = 0.0
    if not others.any():
        return weight, best
    others /= others.sum()
    base = summed(search.pool, others)
    tried = [(step, search.gain(base + np.float32(step) * search.pool.share[row])) for step in STEPS]
    step, gain = max(tried, key=lambda pair: pair[1].sum())
    if gain.sum() <= best.sum() or (not weight[row] and search.t(gain - best) < LEAST_T):
        return weight, best
    others[row] = step
    return others / others.sum(), gain


def _pruned(
    search: _Search, weight: npt.NDArray[np.float64], best: npt.NDArray[np.float64], least: float
) -> npt.NDArray[np.float64]:
    """Drop sources without which the gain is no less than chance explains, and never less than the best source's."""
    for row in np.argsort(weight):
        others = weight.copy()
        others[row] = 0.0
        if not weight[row] or not others.any():
            continue
        gain = search.gain(summed(search.pool, others / others.sum()))
        if search.t(best - gain) < 1.0 and gain.sum() >= least:
            weight, best = others / others.sum(), gain
    return weight
