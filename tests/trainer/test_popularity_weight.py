"""`network.popularity_weight`: an addition to the item biases at inference, which changes nothing in training."""

from __future__ import annotations

import json

import numpy as np
import pytest

from retrieval.bundle import open_bundle
from retrieval.config import load
from retrieval.evaluate import evaluate
from tests.support.runs import SMALL
from trainer.__main__ import main
from trainer.apply import main as apply

WEIGHT = 0.3


@pytest.fixture(scope="module", params=[["model=gru4rec"], ["model=hybrid", "network.transitions=true"]], ids=str)
def runs(request, fifty, tmp_path_factory):
    """Runs without and with the weight, for one epoch: which epoch is best may depend on the weight."""
    folder = tmp_path_factory.mktemp("popularity")
    options = [f"data={fifty.path}", *SMALL, *request.param, "train.epochs=1", "train.valid_sessions=50"]
    assert main([*options, f"output={folder / 'plain'}"]) == 0
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
