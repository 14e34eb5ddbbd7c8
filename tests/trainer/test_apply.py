"""Other logs scored with a trained run."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from etl.dataset import open_dataset
from etl.runtime.errors import InputError
from retrieval.bundle import open_bundle
from tests.support.engine import build
from tests.support.logs import generated_log
from tests.support.runs import SMALL
from trainer.__main__ import main as train
from trainer.apply import main
from trainer.config import TrainerConfig
from trainer.option_groups import ModelOptions
from trainer.score_dataset import check


@pytest.fixture(scope="module")
def other(fifty, tmp_path_factory):
    """A log of other users over the same items and some unknown ones."""
    folder = tmp_path_factory.mktemp("other")
    log = generated_log(folder / "log.csv", users=30, items=70, seed=5)
    options = [f"input={log}", f"output={folder / 'data'}", "scenario=qb_video", "shards=2"]
    return build([*options, f"items_from={fifty.path}"])


def run_of(fifty, folder, *more):
    run = folder / "run"
    assert train([f"data={fifty.path}", f"output={run}", *SMALL, "train.epochs=1", *more]) == 0
    return run


@pytest.mark.parametrize("model", ["gru4rec", "hybrid", "rank_mmoe"])
def test_applying_a_run_to_its_own_data_reproduces_its_bundle(fifty, tmp_path, model):
    run = run_of(fifty, tmp_path, f"model={model}")
    assert main([f"run={run}", f"data={fifty.path}", f"output={tmp_path / 'again'}"]) == 0
    manifests = [open_bundle(path).manifest for path in (run / "bundle", tmp_path / "again")]
    assert manifests[0] == manifests[1]
    if model == "gru4rec":  # a dataset also has a manifest, but is not overwritten as a bundle
        assert main([f"run={run}", f"data={fifty.path}", f"output={fifty.path}", "overwrite=true"]) == 2
        assert open_dataset(fifty.path).manifest == fifty.manifest


def test_refit_run_scores_with_the_parameters_of_the_refit(fifty, tmp_path):
    run = run_of(fifty, tmp_path, "model=gru4rec", "train.refit=true")
    assert main([f"run={run}", f"data={fifty.path}", f"output={tmp_path / 'again'}"]) == 0
    vectors = [open_bundle(p).item_vectors() for p in (run / "bundle", run / "bundle-selected", tmp_path / "again")]
    assert np.array_equal(vectors[0], vectors[2])
    assert not np.array_equal(vectors[1], vectors[2])


@pytest.mark.parametrize("model", ["hybrid", "rank_mmoe"])
def test_logs_of_other_users_are_scored_over_the_items_of_the_run(fifty, other, tmp_path, model):
    more = ["network.past_actions=true"] if model == "hybrid" else []
    run = run_of(fifty, tmp_path, f"model={model}", "network.item_features=[category]", *more)
    bundle = tmp_path / "bundle"
    assert main([f"run={run}", f"data={other.path}", f"output={bundle}"]) == 0
    actual = open_bundle(bundle, dataset=other.manifest.fingerprint)
    assert actual.feedback("test", "like").num_rows > 0
    if model == "hybrid":
        assert actual.n_queries("test") == other.manifest.counts["sessions"]
        assert np.array_equal(actual.item_vectors(), open_bundle(run / "bundle").item_vectors())


def test_sessions_longer_than_the_positions_of_the_run_are_refused(fifty):
    config = TrainerConfig(data="", output="", network=ModelOptions(positions=30))
    check(config, fifty, fifty)
    protocol = fifty.manifest.protocol | {"max_clicks": 31}
    with pytest.raises(InputError, match="sessions of at most 30 clicks, got 31"):
        check(config, fifty, replace(fifty, manifest=replace(fifty.manifest, protocol=protocol)))


def test_unsupported_runs_datasets_and_outputs_are_refused(fifty, other, tmp_path, capfd):
    run = run_of(fifty, tmp_path, "model=gru4rec")
    capfd.readouterr()
    log = generated_log(tmp_path / "log.csv", users=30, items=40, seed=5)
    stranger = build([f"input={log}", f"output={tmp_path / 'data'}", "scenario=qb_video", "shards=2"])
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("{}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    for options in (
        [f"run={run}", f"data={stranger.path}", f"output={tmp_path / 'a'}"],
        [f"run={unfinished}", f"data={other.path}", f"output={tmp_path / 'a'}"],
        [f"run={run}", "data=/nowhere", f"output={tmp_path / 'a'}"],
        [f"run={run}", f"data={other.path}", f"output={tmp_path / 'mine'}", "overwrite=true"],
        [f"run={run}", f"data={other.path}"],
    ):
        assert main(options) == 2
        err = capfd.readouterr().err
        assert err.startswith("error: expected ")
        assert err.count("\n") == 1
    assert not (tmp_path / "a").exists()
    assert json.loads((run / "summary.json").read_text())["model"] == "gru4rec"
