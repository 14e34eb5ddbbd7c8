"""Counted transitions in the score of a trained model: fitting their weights, and their use in runs."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from etl.dataset import open_dataset
from etl.runtime.errors import InputError
from retrieval.blend.fitted import fold_of
from retrieval.bundle import open_bundle
from retrieval.config import load
from retrieval.evaluate import evaluate
from retrieval.sources.sessions import TrainSessions
from retrieval.transitions import open_transitions, read_transitions, transitions_from_counts
from tests.retrieval.test_transitions import counted, slow_term
from tests.support.engine import build, write_log
from tests.support.runs import SMALL, assert_same_run
from trainer.__main__ import main
from trainer.apply import main as apply
from trainer.inference import transition_term
from trainer.inference.target_ranks import exact_ranks, rank_request
from trainer.inference.transition_term import (
    TermCandidates,
    TransitionTerm,
    find_candidates,
    fit_term_weights,
    minimise,
)
from trainer.show import main as show

OPTIONS = [*SMALL, "network.transitions=true", "train.valid_sessions=50"]


def random_candidates(
    seed: int, queries: int = 60, helps: float = 3.0, helps_rare: float | None = None
) -> TermCandidates:
    """Twelve candidates per query; the first feature predicts the target, the second is noise.

    In every other query the last item has fewer than 20 clicks; there the first feature has strength `helps_rare`.
    """
    rng = np.random.default_rng(seed)
    last_clicks = np.where(np.arange(queries) % 2 == 0, 2, 500)
    helps_Q = np.where(last_clicks < 20, helps if helps_rare is None else helps_rare, helps)
    query = np.repeat(np.arange(queries), 12)
    feature = rng.random((len(query), 2)) * (rng.random((len(query), 2)) < 0.4)
    score = rng.normal(size=len(query))
    noise = rng.gumbel(size=len(query))
    logit = (score + helps_Q[query] * feature[:, 0] + noise).reshape(queries, 12)
    is_target = np.zeros((queries, 12), bool)
    is_target[np.arange(queries), logit.argmax(1)] = True
    is_target[:3] = False  # in some queries the target is not among the candidates
    return TermCandidates(query, score, feature, is_target.ravel(), np.arange(queries), last_clicks)


def test_fitted_weights_equal_scipys_minimum_of_the_same_likelihood():
    pool = random_candidates(0, queries=600)
    has = pool.query >= 3
    score, feature = pool.score[has].reshape(-1, 12), pool.feature[has].reshape(-1, 12, 2)
    target = pool.is_target[has].reshape(-1, 12).argmax(1)

    often = np.log1p(pool.last_clicks[3:]) / 3 - 1

    def loss(parameter):
        weight = np.logaddexp(0, parameter[1:3] + often[:, None] * parameter[3:])
        logit = np.exp(parameter[0]) * score + (feature * weight[:, None]).sum(2)
        mean = (np.log(np.exp(logit).sum(1)) - logit[np.arange(len(target)), target]).mean()
        return mean + 1e-3 * (parameter[3:] ** 2).sum()

    theirs = minimize(loss, np.zeros(5), method="BFGS").x
    clicks = np.array([2, 500])
    expected = np.logaddexp(0, theirs[1:3] + np.outer(np.log1p(clicks) / 3 - 1, theirs[3:])) / np.exp(theirs[0])
    actual = minimise(pool, np.ones(600, bool)).weights(clicks)
    assert actual == pytest.approx(expected, abs=2e-3)
    assert (actual[:, 0] > 5 * actual[:, 1]).all()


def test_weights_depend_on_how_often_the_last_item_was_clicked():
    rare, often = minimise(random_candidates(5, 3_000, helps=1.0, helps_rare=4.0), np.ones(3_000, bool)).weights(
        np.array([2, 500])
    )
    assert rare[0] == pytest.approx(4.0, abs=0.6)
    assert often[0] == pytest.approx(1.0, abs=0.3)


def test_weights_of_a_fold_do_not_depend_on_its_own_queries():
    pool = random_candidates(1)
    all_users, folds = fit_term_weights(pool)
    mine = np.flatnonzero(fold_of(pool.user_id) == 1)
    rng = np.random.default_rng(0)
    feature = np.where(np.isin(pool.query, mine)[:, None], rng.random(pool.feature.shape), pool.feature)
    again, other = fit_term_weights(replace(pool, feature=feature))
    assert folds[1] == other[1]
    assert folds[0] != other[0]
    assert all_users != again


def test_useless_transitions_get_weights_near_zero():
    clicks = np.array([0, 2, 500])
    noise = minimise(random_candidates(2, queries=2_000, helps=0.0), np.ones(2_000, bool))
    assert noise.weights(clicks) == pytest.approx(np.zeros((3, 2)), abs=0.15)
    assert not minimise(random_candidates(3), np.zeros(60, bool)).weights(clicks).any()


def test_pool_contains_the_nearest_and_all_counted_candidates():
    rng = np.random.default_rng(4)
    lists = [rng.integers(1, 301, 9).tolist() for _ in range(20)]
    transitions = counted(lists, 300)
    vector, query = rng.normal(size=(301, 4)).astype("f"), rng.normal(size=(7, 4)).astype("f")
    candidates = np.setdiff1d(np.arange(1, 301), [5, 9])
    context = np.zeros((7, 12), np.int64)
    clicks = [rng.choice(np.concatenate(lists), 3).tolist() for _ in range(7)]
    context[:, :3] = [row[::-1] for row in clicks]
    target = rng.choice(candidates, 7)
    seen = (np.repeat(np.arange(7), 3), np.concatenate(clicks))
    item_clicks = rng.integers(0, 50, 300)
    score_of = lambda item: query @ vector[item].T  # noqa: E731
    pool = find_candidates(transitions, item_clicks, context, np.arange(7), target, score_of, candidates, seen)
    assert np.array_equal(pool.last_clicks, item_clicks[[row[-1] - 1 for row in clicks]])
    for q in range(7):
        score = query[q] @ vector.T
        usable = np.setdiff1d(candidates, clicks[q])
        nearest = usable[np.argsort(-score[usable])[:100]]
        term = np.array([slow_term(transitions, clicks[q], weight) for weight in np.eye(3)])
        expected = np.union1d(nearest, np.intersect1d(usable, np.flatnonzero(term.any(0))))
        mine = pool.query == q
        assert pool.score[mine] == pytest.approx(score[expected], abs=1e-5)
        assert pool.feature[mine] == pytest.approx(term[:, expected].T, abs=1e-12)
        assert np.array_equal(pool.is_target[mine], expected == target[q])


@pytest.mark.parametrize("masked", [False, True])
def test_nearest_over_many_chunks_equal_a_sort(masked, monkeypatch):
    rng = np.random.default_rng(5)
    monkeypatch.setattr(transition_term, "CHUNK_SCORES", 7 * 150)
    vector, query = rng.normal(size=(1_001, 4)).astype("f"), rng.normal(size=(7, 4)).astype("f")
    candidates = np.setdiff1d(np.arange(1, 1_001), [5, 9])
    product = query @ vector.T
    seen = (np.repeat(np.arange(7), 50), rng.choice(candidates, 350)) if masked else None
    best, items = transition_term.nearest(7, lambda item: product[:, item], candidates, seen)
    for q in range(7):
        usable = np.setdiff1d(candidates, seen[1][seen[0] == q]) if masked else candidates
        expected = usable[np.argsort(-product[q, usable])[:100]]
        assert np.array_equal(items[q], expected)
        assert np.array_equal(best[q], product[q, expected])
    best, items = transition_term.nearest(7, lambda item: product[:, item], candidates[:30], None)
    assert np.isfinite(best[:, :30]).all()
    assert np.isneginf(best[:, 30:]).all()


def test_validation_ranks_by_inner_product_plus_transition_term():
    rng = np.random.default_rng(1)
    vector = torch.from_numpy(rng.normal(size=(9, 3)).astype("f"))
    query = torch.from_numpy(rng.normal(size=(20, 3)).astype("f"))
    candidates = np.array([1, 2, 4, 5, 7, 8, 9])
    transitions = counted([rng.integers(1, 10, 12).tolist() for _ in range(3)], 9)
    term = transitions.scores(rng.integers(0, 10, (20, 12)), rng.random((20, 3)))
    scorer = SimpleNamespace(item_vectors=lambda item: vector[item - 1], dimension=vector.shape[1])
    target = rng.choice(candidates, 20)
    request = rank_request(scorer, query, torch.from_numpy(target), None, term)
    actual = exact_ranks(scorer, request, torch.from_numpy(candidates))
    score = (query @ vector.t()).numpy() + term.toarray()[:, 1:]
    for q, goal in enumerate(target):
        others = [item for item in candidates if item != goal]
        assert actual[q] == 1 + sum(score[q, item - 1] >= score[q, goal - 1] for item in others)


def chain_log(folder, shuffled: bool):
    """Users who walk along a fixed chain of 300 items from a random start; if shuffled, random items."""
    rng, rows = np.random.default_rng(0), []
    chain = rng.permutation(300)
    for user in range(1, 301):
        items = chain[(rng.integers(0, 300) + np.arange(10)) % 300]
        items = rng.choice(300, 10, replace=False) if shuffled else items
        rows += [(user, int(item), 1, 0, 0, 0, "c", 1, 0, 0) for item in items]
    write_log(folder / "log.csv", rows)
    return build([f"input={folder / 'log.csv'}", f"output={folder / 'data'}", "scenario=qb_video"])


@pytest.mark.parametrize("shuffled", [False, True])
def test_transitions_help_on_a_chain_and_do_not_on_shuffled_items(tmp_path, shuffled, no_report):
    dataset, actual = chain_log(tmp_path, shuffled), {}
    for name in ("false", "true"):
        run = tmp_path / name
        options = [*SMALL, "model=gru4rec", "train.epochs=1", f"network.transitions={name}", "train.valid_sessions=300"]
        assert main([f"data={dataset.path}", f"output={run}", *options]) == 0
        arguments = [f"bundle={run / 'bundle'}", f"data={dataset.path}", f"output={tmp_path / 'r'}", "overwrite=true"]
        actual[name] = evaluate(load([*arguments, "blend=none", "baselines=[]", "cutoffs=[10,20]"]))["test"]["hr@10"]
    if shuffled:
        assert actual["true"] < actual["false"] + 0.05
    else:
        assert actual["true"] > 0.9
        assert actual["true"] > actual["false"] + 0.3


@pytest.fixture(scope="module")
def run(fifty, tmp_path_factory):
    folder = tmp_path_factory.mktemp("transitions") / "run"
    assert main([f"data={fifty.path}", f"output={folder}", "model=hybrid", "train.refit=true", *OPTIONS]) == 0
    weights = json.loads((folder / "transition_weights.json").read_text())
    assert len(weights["folds"]) == 3
    assert all(len(gate[name]) == 3 for gate in (weights["everyone"], *weights["folds"]) for name in ("bias", "slope"))
    return folder


def test_validation_metrics_of_training_equal_the_evaluations(fifty, run, tmp_path, no_report):
    options = [f"bundle={run / 'bundle-selected'}", f"data={fifty.path}", f"output={tmp_path / 'r'}", "cutoffs=[10,20]"]
    actual = evaluate(load([*options, "blend=none", "baselines=[markov]"]))["valid"]
    summary = json.loads((run / "summary.json").read_text())["valid"]
    for name in ("hr@10", "ndcg@10", "hr@20", "ndcg@20"):
        assert actual[name] == pytest.approx(summary[name], abs=1e-6)


def test_bundle_has_the_counts_of_its_train_clicks_and_the_weights(fifty, run):
    weights = json.loads((run / "transition_weights.json").read_text())
    clicks = np.concatenate([[0], fifty.items(["train_clicks"])["train_clicks"].to_numpy()])

    def weights_of(gate, queries):
        often = np.log1p(clicks[queries.seen[queries.seen_offset[1:] - 1]]) / 3 - 1
        return gate["size"] * np.logaddexp(0, gate["bias"] + np.outer(often, gate["slope"]))

    for name, held_out in (("bundle-selected", 2), ("bundle", 1)):
        bundle = open_bundle(run / name)
        sessions = TrainSessions.of(open_dataset(fifty.path), held_out)
        lists = [sessions.items[a:b].tolist() for a, b in zip(sessions.offset[:-1], sessions.offset[1:], strict=True)]
        expected = counted(lists, fifty.manifest.n_items)
        for term, matrix in read_transitions(bundle).terms.items():
            assert abs(matrix - expected.terms[term]).max() < 1e-6
        for split in ("test", "next"):
            for queries in bundle.queries(split):
                expected = weights_of(weights["everyone"], queries)
                assert queries.transition_weight == pytest.approx(expected, rel=1e-6)
    for queries in open_bundle(run / "bundle-selected").queries("valid"):
        by_fold = np.stack([weights_of(gate, queries) for gate in weights["folds"]])
        expected = by_fold[fold_of(queries.user_id), np.arange(len(queries))]
        assert queries.transition_weight == pytest.approx(expected, rel=1e-6)


def test_transition_weights_of_an_earlier_version_are_refused(tmp_path):
    (tmp_path / "transition_weights.json").write_text('{"everyone": [6.6, 5.2], "folds": [[6.3, 7.7]]}')
    with pytest.raises(InputError, match="train it again"):
        TransitionTerm.read(tmp_path, transitions_from_counts({}), np.zeros(3, np.int64))
    (tmp_path / "transition_weights.json").write_text("{")
    with pytest.raises(InputError, match="train it again"):
        TransitionTerm.read(tmp_path, transitions_from_counts({}), np.zeros(3, np.int64))


def test_run_of_an_earlier_version_is_scored_by_its_two_terms(tmp_path):
    gate = {"size": 1.0, "bias": [0.5, 0.1], "slope": [0.0, 0.2]}
    (tmp_path / "transition_weights.json").write_text(json.dumps({"everyone": gate, "folds": [gate]}))
    transitions = counted([[1, 2, 3], [2, 3, 1]], 3)
    term = TransitionTerm.read(tmp_path, transitions, np.array([2, 2, 2]))
    context = np.array([[1] + [0] * 11])
    weight = term.all_users.weights(np.array([2]))
    expected = slow_term(transitions, [1], np.append(weight[0], 0.0))
    assert term.transitions.scores(context, weight).toarray()[0] == pytest.approx(expected)


def test_applying_a_run_to_its_own_data_reproduces_its_bundle(fifty, run, tmp_path, capfd):
    assert apply([f"run={run}", f"data={fifty.path}", f"output={tmp_path / 'again'}"]) == 0
    ours, theirs = (open_bundle(path) for path in (tmp_path / "again", run / "bundle"))
    files = [{f.path: f.sha256 for f in bundle.manifest.files if "valid" not in f.path} for bundle in (ours, theirs)]
    assert files[0] == files[1]
    assert show([f"run={run}"]) == 0
    assert "next by score" in capfd.readouterr().out


def test_run_continued_with_more_epochs_is_bit_identical(fifty, run, tmp_path):
    line = [f"data={fifty.path}", f"output={tmp_path / 'run'}", "model=hybrid", "train.refit=true", *OPTIONS]
    assert main([*line, "train.epochs=1"]) == 0
    assert main(line) == 0
    assert_same_run(run, tmp_path / "run")


def test_stored_counts_depend_on_the_held_out_clicks(tmp_path, fifty):
    first, mapped = (open_transitions(fifty, tmp_path / "a", 2) for _ in range(2))
    again, other = open_transitions(fifty, tmp_path / "b", 2), open_transitions(fifty, tmp_path / "a", 1)
    for name, matrix in first.terms.items():
        assert (matrix != mapped.terms[name]).nnz == 0
        assert (matrix != again.terms[name]).nnz == 0
        assert (matrix != other.terms[name]).nnz > 0


def test_transition_terms_are_log_rules_plain_cosine_and_log_markov():
    """Session a b c: b follows a at distance 1, c at 2: log 2 and log 1.5; each pair shares one session: cosine 1."""
    transitions = counted([[1, 2, 3]], 3)
    assert slow_term(transitions, [1], np.array([1.0, 0, 0])) == pytest.approx([0, 0, np.log(2), np.log(1.5)])
    assert slow_term(transitions, [1], np.array([0, 1.0, 0])) == pytest.approx([0, 0, 1, 1])
    assert slow_term(transitions, [1], np.array([0, 0, 1.0])) == pytest.approx([0, 0, np.log(2), 0])
    assert transitions_from_counts({}).terms == {}


def test_ranking_models_refuse_transitions(fifty, tmp_path, capfd):
    assert main([f"data={fifty.path}", f"output={tmp_path / 'run'}", *OPTIONS, "model=rank_mmoe"]) == 2
    assert "network.transitions=false for ranking models" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
