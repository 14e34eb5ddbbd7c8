"""`network.popularity_weight`: an addition to the item biases at inference, which changes nothing in training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from etl.dataset import Dataset
from retrieval.bundle import open_bundle
from retrieval.config import load
from retrieval.evaluate import evaluate
from tests.support.engine import build, write_log
from tests.support.runs import SMALL
from tests.support.workers import train_on_two
from trainer.__main__ import main
from trainer.apply import main as apply
from trainer.distributed.world import World
from trainer.inference.popularity_weight import FACTORS, find_weight
from trainer.loop import train
from trainer.prepare import prepare

WEIGHT = 0.3


@pytest.fixture(scope="module", params=[["model=gru4rec"], ["model=hybrid", "network.transitions=true"]], ids=str)
def runs(request, fifty, tmp_path_factory):
    """Runs without and with the weight, for one epoch: which epoch is best may depend on the weight."""
    folder = tmp_path_factory.mktemp("popularity")
    options = [f"data={fifty.path}", *SMALL, *request.param, "train.epochs=1", "train.valid_sessions=50"]
    assert main([*options, f"output={folder / 'plain'}", "network.popularity_weight=0"]) == 0
    assert main([*options, f"output={folder / 'weighted'}", f"network.popularity_weight={WEIGHT}"]) == 0
    return folder / "plain", folder / "weighted"


def test_biases_gain_the_log_of_train_clicks_and_vectors_stay(fifty, runs):
    plain, weighted = (open_bundle(run / "bundle").item_vectors() for run in runs)
    clicks = fifty.items(["train_clicks"])["train_clicks"].to_numpy()
    assert clicks.max() > clicks.min()
    assert np.array_equal(weighted[:, :-1], plain[:, :-1])
    np.testing.assert_allclose(weighted[:, -1] - plain[:, -1], WEIGHT * np.log1p(clicks), atol=1e-6)


def test_validation_equals_the_evaluation_and_applying_the_run_reproduces_its_bundle(fifty, runs, tmp_path, no_report):
    run = runs[1]
    options = [f"bundle={run / 'bundle'}", f"data={fifty.path}", f"output={tmp_path / 'r'}", "cutoffs=[10,20]"]
    actual = evaluate(load([*options, "blend=none", "baselines=[]"]))["valid"]
    summary = json.loads((run / "summary.json").read_text())["valid"]
    for name in ("hr@10", "ndcg@10", "hr@20", "ndcg@20"):
        assert actual[name] == pytest.approx(summary[name], abs=1e-6)
    assert apply([f"run={run}", f"data={fifty.path}", f"output={tmp_path / 'applied'}"]) == 0
    applied = open_bundle(tmp_path / "applied")
    assert np.array_equal(applied.item_vectors(), open_bundle(run / "bundle").item_vectors())


def test_ranking_models_refuse_it(fifty, tmp_path, capfd):
    options = [f"data={fifty.path}", f"output={tmp_path / 'run'}", "model=rank_mmoe", "network.popularity_weight=0.1"]
    assert main(options) == 2
    assert "expected network.popularity_weight=0 for ranking models, got 0.1" in capfd.readouterr().err


def ranks_of_scores(score: np.ndarray, popularity: np.ndarray, target: np.ndarray):
    """Ranks with a weight of the popularity, by a sort of each query's scores."""

    def ranks_with(weight: float) -> np.ndarray:
        order = np.argsort(-(score + weight * popularity), axis=1, kind="stable")
        return 1 + np.array([row.tolist().index(goal) for row, goal in zip(order, target, strict=True)])

    return ranks_with


@pytest.mark.parametrize(("true", "scale"), [(1.0, 1.0), (1.0, 0.01), (0.25, 1.0), (0.0, 1.0)])
def test_weight_of_sampled_targets_is_found_up_to_the_steps_of_the_search(true, scale):
    """Targets are drawn from the softmax of scores + true weight × popularity, so the true weight ranks best."""
    rng = np.random.default_rng(0)
    score, popularity = rng.normal(size=(3_000, 200)), rng.normal(size=200)
    logit = score + true * popularity + rng.gumbel(size=score.shape) / 2
    found = find_weight(ranks_of_scores(scale * score, popularity, logit.argmax(1)), scale * 1.1)
    unit = 2.0 ** round(math.log2(scale * 1.1))
    expected = {0.0} if not true else {unit * f for f in FACTORS if true / 2 <= f <= 2 * true}
    assert found in expected


def test_gain_within_two_standard_errors_is_not_used():
    """One of ten queries enters the list: mean gain .1, standard error .3 / √10 = .095."""
    before, after = np.full(10, 30), np.array([1] + [30] * 9)
    assert find_weight(lambda weight: after if weight else before, 1.0) == 0
    before, after = np.full(100, 30), np.array([1] * 10 + [30] * 90)  # .1 and .03
    assert find_weight(lambda weight: after if weight else before, 1.0) == FACTORS[0]


def test_search_goes_on_until_a_weight_helps_and_ends_after_two_that_help_no_more():
    asked = []

    def ranks_with(weight):
        asked.append(weight)
        return np.full(9, 30 if weight < FACTORS[2] else 1)

    assert find_weight(ranks_with, 1.0) == FACTORS[2]
    assert asked == [0.0, *FACTORS[:5]]


@pytest.mark.parametrize("deviation", [0.0, math.nan, math.inf])
def test_no_weight_without_queries_or_for_scores_without_a_scale(deviation):
    assert find_weight(lambda weight: np.zeros(0, np.int64), 1.0) == 0
    assert find_weight(lambda weight: np.full(5, 2 - (weight > 0)), deviation) == 0


@pytest.fixture(scope="module")
def popular(tmp_path_factory) -> Dataset:
    """Users whose clicks are drawn by popularity alone; most items have few clicks."""
    rng = np.random.default_rng(0)
    share = 1.0 / np.arange(1, 401)
    rows = [
        (user, int(item), 1, 0, 0, 0, "c", 1, 0, 0)
        for user in range(1, 401)
        for item in rng.choice(400, 12, replace=False, p=share / share.sum())
    ]
    folder = tmp_path_factory.mktemp("popular")
    write_log(folder / "log.csv", rows)
    return build([f"input={folder / 'log.csv'}", f"output={folder / 'data'}", "scenario=qb_video"])


BRIEF = ["model=gru4rec", "train.epochs=1", "train.valid_sessions=400", "loss=bpr_max", "train.ppmi_start=0"]


@pytest.fixture(scope="module")
def fitted(popular, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fitted") / "run"
    options = [f"data={popular.path}", f"output={folder}", *SMALL, *BRIEF, "train.refit=true"]
    assert main(options) == 0
    return folder


def test_weight_is_fitted_saved_and_used_in_both_bundles(popular, fitted, tmp_path):
    weight = json.loads((fitted / "popularity_weight.json").read_text())["weight"]
    assert weight > 0
    assert json.loads((fitted / "summary.json").read_text())["popularity_weight"] == weight
    without = tmp_path / "without"
    options = [f"data={popular.path}", f"output={without}", *SMALL, *BRIEF, "train.refit=true"]
    assert main([*options, "network.popularity_weight=0"]) == 0
    assert not (without / "popularity_weight.json").exists()
    log_clicks = np.log1p(popular.items(["train_clicks"])["train_clicks"].to_numpy())
    for name in ("bundle-selected", "bundle"):
        with_it, plain = (open_bundle(run / name).item_vectors() for run in (fitted, without))
        np.testing.assert_allclose(with_it[:, -1] - plain[:, -1], weight * log_clicks, atol=1e-6)
        assert np.array_equal(with_it[:, :-1], plain[:, :-1])
    found, plain = (json.loads((run / "summary.json").read_text())["valid"]["ndcg@20"] for run in (fitted, without))
    assert found > plain


def test_fitted_weight_is_that_of_the_evaluation(popular, fitted, tmp_path, no_report):
    """Validation with it equals the evaluation of the exported vectors; applying the run uses it too."""
    options = [f"bundle={fitted / 'bundle-selected'}", f"data={popular.path}", f"output={tmp_path / 'r'}"]
    actual = evaluate(load([*options, "blend=none", "baselines=[]", "cutoffs=[10,20]"]))["valid"]
    summary = json.loads((fitted / "summary.json").read_text())["valid"]
    assert actual["ndcg@20"] == pytest.approx(summary["ndcg@20"], abs=1e-6)
    assert apply([f"run={fitted}", f"data={popular.path}", f"output={tmp_path / 'applied'}"]) == 0
    vectors = open_bundle(tmp_path / "applied").item_vectors()
    assert np.array_equal(vectors, open_bundle(fitted / "bundle").item_vectors())


def test_damaged_weight_is_an_error(popular, fitted, tmp_path, capfd):
    path = fitted / "popularity_weight.json"
    saved = path.read_bytes()
    try:
        for text in ("{", '{"weight": -1}', '{"weight": NaN}', "[]", '{"weight": "much"}'):
            path.write_text(text)
            assert apply([f"run={fitted}", f"data={popular.path}", f"output={tmp_path / 'applied'}"]) == 2
            assert "expected a weight of at least 0" in capfd.readouterr().err
    finally:
        path.write_bytes(saved)


@pytest.mark.cluster
@pytest.mark.parametrize("table", ["replicated", "sharded"])
def test_two_workers_fit_the_weight_of_one(popular, tmp_path, table):
    weights = {}
    for size in (1, 2):
        options = [f"data={popular.path}", f"output={tmp_path / str(size)}", *SMALL, *BRIEF, f"train.table={table}"]
        config, _ = prepare([*options, "network.embedding_dropout=0", "network.state_dropout=0"])
        if size == 1:
            train(config, World.alone())
        else:
            train_on_two(tmp_path / "meet", config)
        weights[size] = json.loads((tmp_path / str(size) / "popularity_weight.json").read_text())["weight"]
    assert weights[2] == weights[1] > 0
