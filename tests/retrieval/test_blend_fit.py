"""What a blend is fitted with: temperature, candidate features, weights, and the re-ranker's order."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from retrieval.blend import reranker
from retrieval.blend.context import CandidateFeatures
from retrieval.blend.fit import learn_blend, reranked
from retrieval.blend.pool import Pool
from retrieval.blend.ranker import BlendRanker
from retrieval.blend.weights import find_weights, gain_of, summed
from tests.retrieval.test_blend import N_ITEMS, pools_of, queries_of, signal, source_of, sparse_scores, unseen_targets


def pool_of(share, target, popularity=None):
    """A pool of shares `[S, Q, C]` with the same C candidates for each query, target number `target[q]`."""
    s, q, c = share.shape
    query, item = np.repeat(np.arange(q), c), np.tile(np.arange(1, c + 1), q)
    flat = share.reshape(s, -1).astype(np.float32)
    popular = np.zeros(q * c, np.float32) if popularity is None else popularity
    names = tuple("abcdef"[:s])
    return Pool(names, query, item, flat, flat, np.ones_like(flat), popular, item == np.repeat(target, c), q)


def mean_gain(pool, weight):
    return gain_of(pool.target_ranks(summed(pool, weight)), 10).mean()


@pytest.mark.parametrize("true", [0.25, 4.0])
def test_temperature_of_sampled_targets_is_found_and_used_in_the_pool(true, monkeypatch):
    monkeypatch.setattr(reranker, "MIN_HITS", 10**9)
    rng = np.random.default_rng(0)
    queries = queries_of(rng, 600)
    pools, features = pools_of(rng, {"model": None}, mask_seen=False)
    score = queries.vector @ pools.index.catalogue.vector.T / true
    gumbel = -np.log(-np.log(rng.random(score.shape)))
    queries.target[:] = np.argmax(score + gumbel, axis=1) + 1
    assert learn_blend(pools, features, [queries], 10, 1).temperature == true
    pools.temperature = true
    power = np.exp(score)
    assert pools.of(queries).share[0] == pytest.approx((power / power.sum(1, keepdims=True)).ravel(), rel=1e-3)


def test_candidate_features_equal_a_slow_reference():
    rng = np.random.default_rng(0)
    queries = replace(queries_of(rng, 40), n_clicks=rng.integers(5, 99, 40).astype(np.int32))
    pools, features = pools_of(rng, {"a": source_of(sparse_scores(rng, 40))}, mask_seen=False, candidates=50)
    category = np.array([0, *rng.integers(0, 4, N_ITEMS)])
    count = sparse_scores(rng, N_ITEMS + 1).astype(np.float32)
    features = CandidateFeatures(features.popularity, category, sparse.csr_matrix(count))
    pool, clicks = pools.of(queries), features.popularity.clicks
    expected: dict[str, list[float]] = {}
    for q, item in zip(pool.query.tolist(), pool.item.tolist(), strict=True):
        seen = queries.seen[queries.seen_offset[q] : queries.seen_offset[q + 1]].tolist()
        categories = Counter(category[i] for i in seen)
        for name, value in {
            "session length": len(seen),
            "user clicks": queries.n_clicks[q],
            "last item's clicks": max(clicks[seen[-1]], 0) if seen[-1] < len(clicks) else 0,
            "after the click before": count[seen[-2:][0], item],
            "clicks": clicks[item],
            "clicks since seen": seen[::-1].index(item) + 1 if item in seen else 0,
            "category share": categories[category[item]] / len(seen),
            "category of the last": category[seen[-1]] == category[item],
        }.items():
            expected.setdefault(name, []).append(float(value))
    actual = features.context(pool, queries)
    assert list(actual) == list(expected)
    for name, values in expected.items():
        assert actual[name] == pytest.approx(values), name


def test_selected_gains_are_means_over_all_queries_also_those_without_a_hit(monkeypatch):
    """A third of the targets are no candidates. Each fold is ranked by the weights of the others."""
    monkeypatch.setattr(reranker, "MIN_HITS", 10**9)
    rng = np.random.default_rng(0)
    queries = unseen_targets(rng, 300)
    sources = {name: source_of(signal(rng, queries, 0.6)) for name in "ab"}
    pools, features = pools_of(rng, sources, mask_seen=False, candidates=40)
    learned = learn_blend(pools, features, [queries], 10, 1)
    assert (learned.kind, learned.selection["queries"]) == ("sum", 300)
    assert learned.selection["in_pool"] == np.isin(queries.target, pools.index.catalogue.item).sum() < 250
    ranks = BlendRanker(learned, pools, pools, features, 10, 1).rank(queries, "valid")
    selected = learned.selection["ndcg@10"]
    assert gain_of(ranks["blend"][0], 10).mean() == pytest.approx(selected["sum"])
    for name in "ab":
        assert gain_of(ranks[f"blend-source-{name}"][0], 10).mean() == pytest.approx(selected["sources"][name])


def test_reranker_orders_the_shortlist_ties_by_the_sum_and_the_others_follow(monkeypatch):
    monkeypatch.setattr(reranker, "SHORTLIST", 4)
    rng = np.random.default_rng(0)
    pool = pool_of(rng.permuted(np.tile(np.arange(9.0), (1, 5, 1)), axis=2), np.ones(5, int))
    by_sum = (-pool.share[0].reshape(5, 9)).argsort(1)
    for model, first in (
        (lambda values: np.zeros(len(values)), by_sum[:, :4]),
        (lambda values: -values[:, 0], by_sum[:, :4][:, ::-1]),
    ):
        order = (-reranked((pool, {}), np.ones(1), model).reshape(5, 9)).argsort(1)
        assert order.tolist() == np.concatenate([first, by_sum[:, 4:]], axis=1).tolist()


def test_source_that_the_others_make_superfluous_gets_no_weight():
    """Source c alone is the best, but a knows the targets of even queries and b those of odd ones."""
    share, target = np.random.default_rng(0).random((3, 40, 30)) * 0.01, np.ones(40, int)
    share[0, ::2, 0] += 1
    share[1, 1::2, 0] += 1
    share[2, :, 0] += 0.5
    share[2, :, 1] += 0.51
    actual = find_weights(pool_of(share, target), 10, "abc")
    assert actual[2] == 0
    assert min(actual[:2]) > 0.1


def test_weights_of_few_queries_are_no_worse_on_them_than_any_source():
    """Ten queries: the mean over samples is often worse than the best source."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        pool = pool_of(rng.random((3, 10, 20)), rng.integers(1, 21, 10))
        best = max(mean_gain(pool, unit) for unit in np.eye(3))
        assert mean_gain(pool, find_weights(pool, 10, "abc")) >= best - 1e-9


def test_candidates_that_tie_with_the_target_count_against_a_source():
    """Source a gives ten candidates the target's score; b gives the target the third place."""
    share = np.zeros((2, 20, 30))
    share[0, :, :11] = 1.0
    share[1] = np.arange(30, 0, -1)
    actual = find_weights(pool_of(share, np.full(20, 3)), 10, "ab")
    assert actual.tolist() == [0, 1]


def test_trees_of_the_rerankers_are_those_of_early_stopping_and_their_mean_for_all_users():
    rng = np.random.default_rng(1)
    queries = unseen_targets(rng, 600)
    pools, features = pools_of(rng, {name: source_of(signal(rng, queries, 1.0)) for name in "ab"}, mask_seen=False)
    learned = learn_blend(pools, features, [queries], 10, 1)
    trees = [reranker.Reranker(each.reranker, 1).booster.num_trees() for each in learned.folds]
    assert trees == learned.selection["trees"]
    assert reranker.Reranker(learned.all_users.reranker, 1).booster.num_trees() == round(np.mean(trees))
