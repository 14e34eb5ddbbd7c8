"""Fits a blend on valid queries: temperature, weights and re-ranker, also cross-fitted over user folds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from retrieval.blend import reranker
from retrieval.blend.context import CandidateFeatures, Context
from retrieval.blend.fitted import FOLDS, FittedBlend, Weights, fold_of
from retrieval.blend.pool import Pool, Pools, softmax_of_rows
from retrieval.blend.weights import find_weights, gain_of, summed
from retrieval.queries import Queries
from retrieval.rankers.registry import MODEL

FIT_QUERIES = 20_000
"""Maximum valid queries to fit on, evenly spaced if there are more."""
FIT_AT_ONCE = 512
TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def learn_blend(
    pools: Pools, candidate_features: CandidateFeatures, queries: Iterable[Queries], cutoff: int, threads: int
) -> FittedBlend | None:
    """Fit on valid queries; None if no target is in any pool.

    Args:
        pools: pools of the model with valid queries, and of sources counted without valid clicks.
        candidate_features: computes candidate features from session and item attributes.
        queries: a sample of valid queries.
        cutoff: cutoff of the NDCG to maximise.
        threads: threads of the weight search and of LightGBM; the result does not depend on it.
    """
    hits = collect_hits(pools, candidate_features, queries)
    return fit_blend(hits, cutoff, threads) if len(hits.user_id) else None


@dataclass(frozen=True)
class Hits:
    """The queries, of `n_queries`, whose target is in their pool.

    Attributes:
        pool, context: candidates of these queries and their features.
        user_id: int64, user of each of these queries.
        n_queries: number of queries, including those without a hit.
    """

    pool: Pool
    context: Context
    user_id: npt.NDArray[np.int64]
    n_queries: int


def fit_blend(hits: Hits, cutoff: int, threads: int) -> FittedBlend:
    """Fit temperature, weights and re-ranker on all users, and without the users of each fold."""
    pool, context, users, n_queries = hits.pool, hits.context, hits.user_id, hits.n_queries
    fold, names = fold_of(users), pool.names
    rows = np.flatnonzero(np.bincount(fold, minlength=FOLDS))  # non-empty folds
    weights, gains = [], {kind: np.zeros(len(users)) for kind in ("sum", "reranker")}
    texts: list[str | None] = []
    temperatures: list[float] = []
    trees = []
    for each in range(FOLDS):
        train, test = _select_queries(pool, context, fold != each), _select_queries(pool, context, fold == each)
        temperatures.append(_best_temperature(train[0]))
        train, test = ((at_temperature(part, temperatures[-1]), values) for part, values in (train, test))
        fitted = find_weights(train[0], cutoff, names, threads)
        weights.append(fitted)
        gains["sum"][fold == each] = gain_of(test[0].target_ranks(summed(test[0], fitted)), cutoff)
        text, count = _learn_reranker(train, fitted, threads)
        texts.append(text)
        if text is not None:
            trees.append(count)
            ranks = test[0].target_ranks(reranked(test, fitted, reranker.Reranker(text, threads)))
            gains["reranker"][fold == each] = gain_of(ranks, cutoff)
    complete = len(trees) == FOLDS and len(rows) == FOLDS
    total = {kind: float(gain.sum()) / n_queries for kind, gain in gains.items()}
    kind = "reranker" if complete and total["reranker"] > total["sum"] else "sum"
    temperature = _best_temperature(pool)
    pool = at_temperature(pool, temperature)
    all_users = find_weights(pool, cutoff, names, threads)
    text = None
    if complete:
        text, _ = _learn_reranker((pool, context), all_users, threads, max(1, round(float(np.mean(trees)))))
    single = {name: gain_of(pool.target_ranks(summed(pool, unit)), cutoff) for name, unit in _units(names)}
    alone = {name: float(gain.sum()) / n_queries for name, gain in single.items()}
    selection = {
        "queries": n_queries,
        "in_pool": len(users),
        f"ndcg@{cutoff}": {"sum": total["sum"], "reranker": total["reranker"] if complete else None, "sources": alone},
        "trees": trees if complete else [],
    }
    folds = [
        Weights(_named(names, weight), text if complete else None, temperature)
        for weight, text, temperature in zip(weights, texts, temperatures, strict=True)
    ]
    return FittedBlend(list(names), temperature, kind, Weights(_named(names, all_users), text), folds, selection)


def collect_hits(pools: Pools, candidate_features: CandidateFeatures, queries: Iterable[Queries]) -> Hits:
    """Collect the queries whose target is in their pool."""
    parts: list[Pool] = []
    contexts: list[Context] = []
    users, n_queries, begin = [np.zeros(0, np.int64)], 0, 0
    for batch in queries:
        for tile in _tiles(batch):
            pool = pools.of(tile)
            n_queries += len(tile)
            hit = np.bincount(pool.query[pool.is_target], minlength=len(tile)) > 0
            chosen = hit[pool.query]
            contexts.append({name: values[chosen] for name, values in candidate_features.context(pool, tile).items()})
            number = np.cumsum(hit) - 1 + begin
            selected = pool.take(chosen)
            parts.append(replace(selected, query=number[selected.query]))
            users.append(tile.user_id[hit])
            begin += int(hit.sum())
    if not parts:
        return Hits(_joined([], begin), {}, users[0], 0)
    context = {name: np.concatenate([part[name] for part in contexts]) for name in contexts[0]}
    return Hits(_joined(parts, begin), context, np.concatenate(users), n_queries)


def _joined(parts: list[Pool], n_queries: int) -> Pool:
    if not parts:
        none, empty = np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
        return Pool((), none, none, empty, empty, empty, empty[0:0].ravel(), none > 0, 0)
    rows = {n: np.concatenate([getattr(p, n) for p in parts]) for n in ("query", "item", "popularity", "is_target")}
    columns = {name: np.concatenate([getattr(p, name) for p in parts], axis=1) for name in ("raw", "share", "rank")}
    return Pool(parts[0].names, **rows, **columns, n_queries=n_queries)


def _tiles(batch: Queries) -> Iterator[Queries]:
    for begin in range(0, len(batch), FIT_AT_ONCE):
        yield batch.take(np.arange(begin, min(begin + FIT_AT_ONCE, len(batch))))


def _select_queries(pool: Pool, context: Context, chosen_Q: npt.NDArray[np.bool_]) -> tuple[Pool, Context]:
    """Select queries, renumbered."""
    chosen, number = chosen_Q[pool.query], np.cumsum(chosen_Q) - 1
    selected = pool.take(chosen)
    selected = replace(selected, query=number[selected.query], n_queries=int(chosen_Q.sum()))
    return selected, {name: values[chosen] for name, values in context.items()}


def _named(names: Iterable[str], weight_S: npt.NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(names, weight_S.tolist(), strict=True))


def _units(names: tuple[str, ...]) -> Iterator[tuple[str, npt.NDArray[np.float64]]]:
    return zip(names, np.eye(len(names)), strict=True)


def at_temperature(pool: Pool, temperature: float) -> Pool:
    """The pool with the model's softmax at another temperature."""
    if MODEL not in pool.names:
        return pool
    row, share = pool.names.index(MODEL), pool.share.copy()
    share[row] = softmax_of_rows(pool.raw[row] / np.float32(temperature), pool.query, pool.n_queries)
    return replace(pool, share=share)


def _best_temperature(pool: Pool) -> float:
    """The temperature that maximises the likelihood of the targets under the model's softmax; 1 without model."""
    if MODEL not in pool.names or not pool.n_queries:
        return 1.0
    row = pool.names.index(MODEL)

    def likelihood(temperature: float) -> float:
        share = at_temperature(pool, temperature).share[row][pool.is_target]
        return float(np.log(np.maximum(share.astype(np.float64), 1e-30)).sum())

    return max(TEMPERATURES, key=likelihood)


def _shortlisted(
    data: tuple[Pool, Context], weight_S: npt.NDArray[np.float64]
) -> tuple[Pool, npt.NDArray[np.bool_], list[str], npt.NDArray[np.float32]]:
    pool, context = data
    score = summed(pool, weight_S)
    chosen = reranker.on_shortlist(pool, score, reranker.SHORTLIST)
    short = pool.take(chosen)
    names, values = reranker.features(short, score[chosen], {name: v[chosen] for name, v in context.items()})
    return short, chosen, names, values


def _learn_reranker(
    data: tuple[Pool, Context], weight_S: npt.NDArray[np.float64], threads: int, rounds: int | None = None
) -> tuple[str | None, int]:
    short, _, names, values = _shortlisted(data, weight_S)
    if short.is_target.sum() < reranker.MIN_HITS:
        return None, 0
    return reranker.learn(names, values, short, threads, rounds)


def reranked(
    data: tuple[Pool, Context], weight_S: npt.NDArray[np.float64], model: reranker.Reranker
) -> npt.NDArray[np.float64]:
    """Scores `[N]`: the shortlist by the re-ranker, ties by the sum; then all others by the sum."""
    pool = data[0]
    score = summed(pool, weight_S).astype(np.float64)
    _, chosen, _, values = _shortlisted(data, weight_S)
    out = score - BEHIND
    out[chosen] = model(values) + 1e-6 * score[chosen]
    return out


BEHIND = 1e6
"""Larger than any difference of a re-ranker's scores."""
