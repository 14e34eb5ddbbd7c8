"""Pools, weights and re-rankers of a blend, against slow references and sources known to be good or useless."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from etl.runtime.errors import InputError
from etl.runtime.files import fingerprint_of
from retrieval.blend import pool as pool_module
from retrieval.blend import reranker
from retrieval.blend.context import CandidateFeatures
from retrieval.blend.fit import collect_hits, learn_blend
from retrieval.blend.fitted import FILE, FOLDS, FittedBlend, fold_of
from retrieval.blend.pool import NOT_LISTED, Pool, Pools
from retrieval.blend.ranker import BLEND, BlendRanker
from retrieval.blend.seconds import Seconds
from retrieval.blend.weights import find_weights, gain_of, summed
from retrieval.metrics.ranking import MISS
from retrieval.popularity import Popularity
from retrieval.queries import Queries
from retrieval.search.index import Catalogue, build_index

N_ITEMS, D = 60, 4


def queries_of(rng, n):
    lengths = rng.integers(1, 6, n)
    return Queries(
        np.arange(n) * 7,
        rng.integers(1, N_ITEMS + 1, n).astype(np.int32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        rng.integers(1, N_ITEMS + 1, lengths.sum()).astype(np.int32),
        lengths.astype(np.int32),
        rng.normal(size=(n, D)).astype(np.float32),
    )


def source_of(score_QI):
    """A source that scores query number `user_id / 7` by one row; the values are small integers, so ties are common."""
    return lambda queries: sparse.csr_matrix(score_QI[queries.user_id // 7].astype(np.float32))


def sparse_scores(rng, n, share=0.4):
    return np.where(rng.random((n, N_ITEMS + 1)) < share, rng.integers(1, 5, (n, N_ITEMS + 1)), 0) * (
        np.arange(N_ITEMS + 1) > 0
    )


def pools_of(rng, sources, *, mask_seen=True, candidates=N_ITEMS):
    item = np.sort(rng.choice(np.arange(1, N_ITEMS + 1), candidates, replace=False)).astype(np.int32)
    catalogue = Catalogue(item, rng.normal(size=(candidates, D)).astype(np.float32))
    popularity = Popularity(item, rng.integers(0, 50, candidates), N_ITEMS)
    features = CandidateFeatures(popularity, np.zeros(N_ITEMS + 1, np.int64), None)
    return Pools(sources, build_index("flat", catalogue), popularity, mask_seen=mask_seen), features


@pytest.mark.parametrize("mask_seen", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_pool_is_the_union_of_top_items_with_the_scores_of_every_source(seed, mask_seen):
    rng = np.random.default_rng(seed)
    queries, scores = queries_of(rng, 20), {"a": sparse_scores(rng, 20), "b": sparse_scores(rng, 20, 0.1)}
    sources = {"model": None, **{name: source_of(values) for name, values in scores.items()}}
    pools, _ = pools_of(rng, sources, mask_seen=mask_seen, candidates=40)
    pools.candidates = 7
    catalogue, pool = pools.index.catalogue, pools.of(queries)
    exact = {int(i): v for i, v in zip(catalogue.item, catalogue.vector, strict=True)}
    for q in range(20):
        seen = set(queries.seen[queries.seen_offset[q] : queries.seen_offset[q + 1]].tolist()) if mask_seen else set()
        usable = [i for i in exact if i not in seen]
        of = {"model": {i: float(exact[i] @ queries.vector[q]) for i in usable}}
        of |= {n: {i: float(values[q, i]) for i in usable if values[q, i]} for n, values in scores.items()}
        best = {name: sorted(options, key=lambda i, g=options: (-g[i], i))[:7] for name, options in of.items()}
        rows = np.flatnonzero(pool.query == q)
        assert pool.item[rows].tolist() == sorted(set().union(*best.values()))
        power = {i: np.exp(of["model"][i]) for i in pool.item[rows].tolist()}
        for row in rows:
            item = int(pool.item[row])
            for s, name in enumerate(pool.names):
                assert pool.raw[s, row] == pytest.approx(of[name].get(item, 0.0), rel=1e-4, abs=1e-5)
                wanted = best[name].index(item) + 1 if item in best[name] else pool_module.NOT_LISTED
                assert pool.rank[s, row] == wanted
                total = sum(power.values()) if name == "model" else sum(of[name].values())
                share = power[item] if name == "model" else of[name].get(item, 0.0)
                assert pool.share[s, row] == pytest.approx(share / max(total, 1e-30), rel=1e-3, abs=1e-6)
            assert pool.is_target[row] == (item == queries.target[q])


@pytest.mark.parametrize("seed", range(4))
def test_blend_ranks_and_lists_equal_a_slow_ranking_with_pessimistic_ties(seed):
    rng = np.random.default_rng(seed)
    queries = queries_of(rng, 30)
    names = {"a": sparse_scores(rng, 30), "b": sparse_scores(rng, 30)}
    pools, features = pools_of(rng, {name: source_of(values) for name, values in names.items()}, candidates=40)
    learned = FittedBlend(["a", "b"], 1.0, "sum", weights({"a": 0.75, "b": 0.25}), [weights({"a": 1.0})] * FOLDS, {})
    actual = BlendRanker(learned, pools, pools, features, 5, 2).rank(queries, "test")
    score, listed = BlendRanker(learned, pools, pools, features, 5, 2).recommend(queries)
    pool = pools.of(queries)
    for name, weight in ((BLEND, (0.75, 0.25)), ("blend-source-b", (0, 1)), ("blend-without-b", (0.75, 0))):
        scores, (rank, _) = summed(pool, np.array(weight)), actual[name]
        for q in range(30):
            mine = dict(zip(pool.item[pool.query == q].tolist(), scores[pool.query == q].tolist(), strict=True))
            target = int(queries.target[q])
            seen = queries.seen[queries.seen_offset[q] : queries.seen_offset[q + 1]].tolist()
            if target in seen or target not in features.popularity.best_first:
                assert rank[q] == MISS
            elif target in mine:
                assert rank[q] == 1 + sum(v >= mine[target] for i, v in mine.items() if i != target)
            else:
                assert rank[q] > max(len(mine), 5)
            if name == BLEND:
                best = sorted(mine, key=lambda i: (-mine[i], i))[:5]
                assert listed[q].tolist() == best + [0] * (5 - len(best))
                assert score[q, : len(best)].tolist() == [mine[i] for i in best]


def weights(values):
    from retrieval.blend.fitted import Weights

    return Weights(values)


def signal(rng, queries, strength):
    """Random scores with a random bonus up to `strength` for the target."""
    scores = rng.random((len(queries), N_ITEMS + 1)) * (np.arange(N_ITEMS + 1) > 0)
    scores[np.arange(len(queries)), queries.target] += strength * rng.random(len(queries))
    return scores


def unseen_targets(rng, n):
    queries = queries_of(rng, n)
    queries.target[:] = (queries.seen[queries.seen_offset[1:] - 1] + rng.integers(0, 30, n)) % N_ITEMS + 1
    return queries


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_no_worse_than_any_source_and_ignore_useless_ones(seed):
    rng = np.random.default_rng(seed)
    queries = unseen_targets(rng, 1000)
    good, other = signal(rng, queries, 1.0), signal(rng, queries, 0.8)
    options = {"good": good, "other": other, "random": rng.random(good.shape), "empty": np.zeros_like(good)}
    pools, _ = pools_of(rng, {n: source_of(v) for n, v in options.items()}, mask_seen=False)
    pool = pools.of(queries)
    gain = lambda w: gain_of(pool.target_ranks(summed(pool, w)), 10).mean()  # noqa: E731
    actual = find_weights(pool, 10, pool.names)
    assert np.array_equal(actual, find_weights(pool, 10, pool.names, threads=3))
    assert actual.sum() == pytest.approx(1.0)
    assert gain(actual) >= max(gain(unit) for unit in np.eye(4))
    assert actual[2] < 0.05  # random scores
    assert actual[3] == 0.0
    assert min(actual[:2]) > 0  # both good sources are used
    twice = {**options, "copy": good}
    pools, _ = pools_of(np.random.default_rng(seed + 9), {n: source_of(v) for n, v in twice.items()}, mask_seen=False)
    copied = pools.of(queries)
    with_copy = gain_of(copied.target_ranks(summed(copied, find_weights(copied, 10, copied.names))), 10).mean()
    assert with_copy == pytest.approx(gain(actual), abs=0.01)


def test_reranker_is_chosen_if_better_and_learns_nothing_from_shuffled_targets(monkeypatch):
    rng = np.random.default_rng(0)
    queries = unseen_targets(rng, 1200)
    # The first source knows the targets of short sessions, the second those of the others: no one weight suits both.
    short = queries.n_seen <= 2
    first, second = (rng.random((len(queries), N_ITEMS + 1)) + 0.0 for _ in range(2))
    first[np.flatnonzero(short), queries.target[short]] += 0.8
    second[np.flatnonzero(~short), queries.target[~short]] += 0.8
    sources = {"first": source_of(first), "second": source_of(second)}
    pools, features = pools_of(rng, sources, mask_seen=False)
    learned = learn_blend(pools, features, [queries], 10, 1)
    message = learned.selection["ndcg@10"]
    assert learned.kind == "reranker"
    assert message["reranker"] > message["sum"] > max(message["sources"].values()) - 0.02
    ranker = BlendRanker(learned, pools, pools, features, 10, 2)
    assert gain_of(ranker.rank(queries, "valid")["blend"][0], 10).mean() == pytest.approx(message["reranker"], abs=1e-9)

    shuffled = rng.permutation(queries.target)
    queries.target[:] = shuffled
    by_chance = learn_blend(pools, features, [queries], 10, 1).selection["ndcg@10"]
    expected = (1 / np.log2(np.arange(1, 11) + 1)).sum() / N_ITEMS
    for kind in ("sum", "reranker"):
        assert by_chance[kind] == pytest.approx(expected, abs=0.03)


def test_predictions_are_independent_of_other_rows_and_blend_files_are_bit_exact(tmp_path):
    rng = np.random.default_rng(1)
    queries = unseen_targets(rng, 600)
    sources = {"a": source_of(signal(rng, queries, 1.0)), "b": source_of(signal(rng, queries, 1.0))}
    pools, features = pools_of(rng, sources, mask_seen=False)
    learned = learn_blend(pools, features, [queries], 10, 1)
    model = reranker.Reranker(learned.all_users.reranker, 1)
    rows = rng.random((500, model.booster.num_feature())).astype(np.float32)
    assert np.array_equal(model(rows)[::7], model(rows[::7]))
    assert FittedBlend.read(tmp_path) is None
    learned.write(tmp_path)
    assert FittedBlend.read(tmp_path) == learned
    assert FittedBlend.read(tmp_path) == learn_blend(pools, features, [queries], 10, 1)
    text = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(text.replace('"kind": "', '"kind": "s'))
    with pytest.raises(InputError, match="other content"):
        FittedBlend.read(tmp_path)


def test_folds_depend_on_the_user_and_are_about_equal():
    user = np.arange(30_000)
    assert np.array_equal(fold_of(user)[::-1], fold_of(user[::-1]))
    assert np.bincount(fold_of(user), minlength=FOLDS) == pytest.approx([10_000] * FOLDS, rel=0.05)


def test_weights_fitted_to_few_queries_are_nearly_as_good_as_to_many():
    """Weights of 150 queries rank other queries nearly as well as those of 4,000 queries."""
    rng = np.random.default_rng(3)
    queries = unseen_targets(rng, 5000)
    options = {name: source_of(signal(rng, queries, 0.5)) for name in "abc"}
    pools, features = pools_of(rng, options, mask_seen=False)
    hits = collect_hits(pools, features, [queries])
    assert hits.n_queries == len(hits.user_id) == 5000

    def part(begin, end):
        chosen = (hits.pool.query >= begin) & (hits.pool.query < end)
        some = hits.pool.take(chosen)
        return replace(some, query=some.query - begin, n_queries=end - begin)

    rest = part(4000, 5000)
    value = lambda weight: gain_of(rest.target_ranks(summed(rest, weight)), 10).mean()  # noqa: E731
    best = value(find_weights(part(0, 4000), 10, hits.pool.names))
    few = [value(find_weights(part(i, i + 150), 10, hits.pool.names)) for i in range(0, 3000, 150)]
    alone = max(value(unit) for unit in np.eye(3))
    assert best > alone + 0.02
    assert np.mean(few) > best - 0.02
    assert min(few) > alone


def test_all_queries_in_one_fold_still_give_a_blend_with_even_weights_for_its_valid_queries():
    rng = np.random.default_rng(0)
    queries = unseen_targets(rng, 4)
    queries.user_id[:] = np.flatnonzero(fold_of(np.arange(7, 700, 7)) == 1)[:4] * 7 + 7
    scores = sparse_scores(rng, 700, share=1.0)
    pools, features = pools_of(rng, {name: source_of(scores) for name in "ab"}, mask_seen=False)
    learned = learn_blend(pools, features, [queries], 10, 1)
    assert [fold.weights for fold in learned.folds] == [
        learned.all_users.weights if fold != 1 else {"a": 0.5, "b": 0.5} for fold in range(FOLDS)
    ]
    assert sum(learned.all_users.weights.values()) == pytest.approx(1)


def test_valid_ranks_do_not_depend_on_the_targets_of_their_fold():
    rng = np.random.default_rng(0)
    queries = unseen_targets(rng, 900)
    pools, features = pools_of(rng, {"model": None, "a": source_of(signal(rng, queries, 1.0))}, mask_seen=False)
    catalogue, in_fold = pools.index.catalogue, fold_of(queries.user_id) == 1
    score = queries.vector.astype(np.float64) @ catalogue.vector.T
    # Targets are drawn from the model's softmax at temperature 4, but those of fold 1 are its first items.
    noise = rng.gumbel(size=score.shape)
    other = replace(queries, target=catalogue.item[(score / 4 + noise).argmax(axis=1)])
    first = replace(queries, target=np.where(in_fold, catalogue.item[score.argmax(axis=1)], other.target))
    learned = [learn_blend(pools, features, [batch], 10, 1) for batch in (other, first)]
    assert learned[0].temperature == 4
    assert learned[1].temperature < 4
    assert [blend.folds[1].temperature for blend in learned] == [4, 4]
    ranks = []
    for blend in learned:
        pools.temperature = blend.temperature
        ranks.append(BlendRanker(blend, pools, pools, features, 10, 1).rank(other, "valid")["blend-sum"][0])
    assert np.array_equal(ranks[0][in_fold], ranks[1][in_fold])
    assert not np.array_equal(*ranks)


def test_blends_of_earlier_versions_have_one_temperature(tmp_path):
    folds = [{"weights": {"a": 1.0}, "reranker": None}] * FOLDS
    record = {"names": ["a"], "temperature": 2.0, "kind": "sum", "everyone": folds[0], "folds": folds, "selection": {}}
    (tmp_path / FILE).write_text(json.dumps(record | {"fingerprint": fingerprint_of(record)}))
    learned = FittedBlend.read(tmp_path)
    assert learned is not None
    assert (learned.temperature, learned.folds[0]) == (2.0, weights({"a": 1.0}))


def test_sessions_that_have_seen_every_candidate_get_empty_lists():
    rng = np.random.default_rng(0)
    queries = queries_of(rng, 1)
    pools, features = pools_of(rng, {"a": source_of(sparse_scores(rng, 1))}, candidates=5)
    seen = features.popularity.best_first.astype(np.int32)
    queries = replace(queries, seen=seen, seen_offset=np.array([0, len(seen)]))
    learned = FittedBlend(["a"], 1.0, "sum", weights({"a": 1.0}), [weights({"a": 1.0})] * FOLDS, {})
    score, item, ranks = BlendRanker(learned, pools, pools, features, 5, 1).recommend_with_ranks(queries)
    assert not item.any()
    assert np.isneginf(score).all()
    assert np.isnan(ranks["a"]).all()


def test_short_lists_end_with_the_most_popular_unseen_candidates():
    rng = np.random.default_rng(0)
    queries = queries_of(rng, 30)
    scores = sparse_scores(rng, 30, share=0.1)
    scores[3] = 0  # nothing is scored
    pools, features = pools_of(rng, {"a": source_of(scores)}, candidates=50)
    learned = FittedBlend(["a"], 1.0, "sum", weights({"a": 1.0}), [weights({"a": 1.0})] * FOLDS, {})
    score, listed = BlendRanker(learned, pools, pools, features, 40, 2).recommend(queries)
    pool = pools.of(queries)
    ranked, _ = pool.lists(summed(pool, np.array([1.0])), 40)
    popular = features.popularity.best_first.tolist()
    for q in range(30):
        seen = set(queries.seen[queries.seen_offset[q] : queries.seen_offset[q + 1]].tolist())
        usable = [item for item in popular if item not in seen]
        scored = [item for item in ranked[q].tolist() if item]
        assert set(scored) == {item for item in usable if scores[q, item]}
        assert listed[q].tolist() == (scored + [item for item in usable if item not in scored])[:40]
        assert (np.diff(score[q]) <= 0).all()
        assert np.isfinite(score[q]).all()


def test_seconds_of_several_threads_add_up(monkeypatch):
    clock = threading.local()

    def perf_counter():
        clock.now = getattr(clock, "now", 0.0) + 1.0
        return clock.now

    monkeypatch.setattr("retrieval.blend.seconds.perf_counter", perf_counter)
    seconds, taken = Seconds(["a", "b"]), []

    def work(_):
        for _ in range(500):
            with seconds.timed("a"):
                pass
        taken.append(seconds.take())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert sum(each["a"] for each in taken) == 8 * 500
    assert seconds.take() == {"a": 0.0, "b": 0.0}


def test_number_of_sources_that_list_a_candidate_does_not_depend_on_other_queries():
    def sources(n):
        query, item, zeros = np.repeat(np.arange(2), [3, 5])[:n], np.array([1, 2, 3, 1, 2, 3, 4, 5])[:n], np.zeros(n)
        rank = np.array([[1, 2, 3, 1, 2, 3, 4, 5], [3, 2, 1, 5, 4, 3, 2, NOT_LISTED]], np.float32)[:, :n]
        pool = Pool(("a", "b"), query, item, *[np.zeros((2, n), np.float32)] * 2, rank, zeros, zeros > 0, query[-1] + 1)
        names, values = reranker.features(pool, np.zeros(n, np.float32), {})
        return values[:, names.index("sources")].tolist()

    assert sources(8) == [2, 2, 2, 2, 2, 2, 2, 1]
    assert sources(3) == [2, 2, 2]
