"""Options of a run: invalid ones, values by task, recipes, datasets with nothing to learn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from etl.dataset import Dataset
from tests.support.engine import build, write_log
from tests.support.runs import SMALL, options
from trainer.__main__ import main
from trainer.config import MODELS
from trainer.recipe import MEDIUM_CATALOGUE, SMALL_CATALOGUE, with_recipe
from trainer.unread_options import unread_options, warn_about_unread


@pytest.mark.parametrize(
    "wrong",
    [
        ["model=bert"],
        ["loss=magic"],
        ["ray.workers=9999"],
        ["ray.workers=-1"],
        ["ray.workers=two"],
        ["ray.workers=automatic"],
        ["ray.workers=[2,1]"],
        ["ray.workers=[1]"],
        ["loss=embedding", "network.tie_embeddings=false"],
        ["ray.workers=[0,1]"],
        ["train.precision=bfloat16"],
        ["train.gradient_accumulation_steps=0"],
        ["train.epochs=none"],
        ["tasks=[click]"],
        ["tasks=[next,next]"],
        ["network.hidden_size=0"],
        ["seed=-1"],
        ["train.negative_popularity_exponent=nan"],
        ["train.negative_popularity_exponent=1000"],
        ["train.positive_rates={like: 5}"],
        ["seed=9223372036854775808"],
        ["seed=1180591620717411303424"],
        ["train.learning_rate=-1"],
        ["data=/nowhere"],
        ["nosuch=1"],
        ["train"],
        ["train.task_weights={jump: 1}"],
        ["encoder=cnn"],
        ["recipe=huge"],
        ["encoder=[gru4rec,gru4rec]"],
        ["encoder=[]"],
        ["encoder=sasrec", "network.attention_heads=3"],
        ["network.positions=2"],
        ["train.select_by=auc/dislike"],
        ["train.gbce_t=2"],
        ["train.max_grad_norm=-1"],
        ["train.optimizer=sgd"],
        ["model=rank_esmm", "tasks=[like]"],
        ["model=rank_mmoe", "tasks=[next]"],
    ],
)
def test_invalid_options_fail_with_a_one_line_error_and_write_nothing(fifty, tmp_path, wrong, capfd):
    assert main([*options(fifty, tmp_path / "run"), *wrong]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: expected "), err
    assert err.count("\n") == 1
    assert ", got " in err
    assert wrong[-1].partition("=")[0] in err
    assert not (tmp_path / "run").exists()
    assert out == ""


@pytest.mark.parametrize(
    "more",
    [
        ["train.task_weights={like: 0.5,click: 2}", "train.positive_rates={share: 0.25}"],
        ["train.task_weights.like=0.5", "train.task_weights.click=2", "train.positive_rates.share=0.25"],
    ],
)
@pytest.mark.parametrize(
    ("model", "recipes"), [("gru4rec", {}), ("hybrid", {"share": 0.01, "follow": 0.01, "passive": 0.01})]
)
def test_values_by_task_are_given_as_a_map_or_one_by_one(model, recipes, more):
    train = with_recipe(["data=d", "output=o", f"model={model}", *more], n_items=10).train
    assert train.task_weights == {"like": 0.5, "click": 2.0} | recipes
    assert train.positive_rates == {"share": 0.25}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            "train.task_weights={jump: 1}",
            "expected train.task_weights of next, click, like, share, follow, passive, got jump",
        ),
        ("train.task_weights.like=-1", "expected train.task_weights.like of at least 0, got -1.0"),
        ("train.positive_rates.like=often", "expected a number for train.positive_rates.like, got 'often'"),
    ],
)
def test_invalid_values_by_task_are_reported(fifty, tmp_path, wrong, message, capfd):
    assert main([*options(fifty, tmp_path / "run"), wrong]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("model", MODELS)
def test_recipe_is_given_or_follows_from_the_catalogue_size(model):
    line = ["data=d", "output=o", f"model={model}"]
    sizes = ("small", "medium", "large")
    small, medium, large = (with_recipe([*line, f"recipe={size}"], n_items=10) for size in sizes)
    assert (small.recipe, medium.recipe, large.recipe) == sizes
    assert small.train.batch_tokens <= medium.train.batch_tokens < large.train.batch_tokens
    assert with_recipe(line, n_items=SMALL_CATALOGUE) == small
    assert with_recipe(line, n_items=SMALL_CATALOGUE + 1) == with_recipe(line, n_items=MEDIUM_CATALOGUE) == medium
    assert with_recipe(line, n_items=MEDIUM_CATALOGUE + 1) == large
    assert with_recipe([*line, "recipe=large", "train.batch_tokens=7"], n_items=10).train.batch_tokens == 7


def test_recipe_that_a_model_does_not_have_is_reported_and_recorded_as_the_one_used(capfd):
    line = ["data=d", "output=o", "model=sasrec", "recipe=medium_dropout"]
    config = with_recipe(line, n_items=10)
    assert config == with_recipe([*line[:3], "recipe=medium"], n_items=10)
    assert config.recipe == "medium"
    warn_about_unread(line, config)
    assert capfd.readouterr().err == "warning: model=sasrec has no recipe medium_dropout: medium is used\n"
    warn_about_unread([*line, "recipe=auto"], config)
    assert capfd.readouterr().err == ""


def test_missing_options_and_unrelated_output_folders_are_refused(fifty, tmp_path, capfd):
    assert main([f"data={fifty.path}", "model=gru4rec"]) == 2
    assert "error: expected option output=" in capfd.readouterr().err
    (tmp_path / "file").touch()
    for output, words in ((fifty.path / "run", "outside the dataset"), (tmp_path / "file" / "run", "error: expected ")):
        assert main(options(fifty, output)) == 2
        assert words in capfd.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose me")
    assert main(options(fifty, tmp_path / "mine")) == 2
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def dataset_of(folder: Path, sessions: list[list[int]]) -> Dataset:
    rows = [(user, item, 1, 0, 0, 0, "c", 1, 1, 1) for user, items in enumerate(sessions, 1) for item in items]
    log = write_log(folder / "log.csv", rows)
    arguments = ["scenario=qb_video", "shards=1", "protocol.min_clicks=3"]
    return build([f"input={log}", f"output={folder / 'data'}", *arguments])


@pytest.mark.parametrize(
    ("sessions", "model", "words"),
    [
        ([[7] * 6] * 5, "gru4rec", "expected a dataset of at least 2 items, got 1"),
        (
            [[i, i + 1, i + 2] for i in range(20)],
            "gru4rec",
            "a session of at least 4 retained clicks to train on, got at most 3",
        ),
        ([[i, i + 1, i + 2] for i in range(20)], "rank_mmoe", "a session of at least 4 retained clicks"),
    ],
)
def test_dataset_with_nothing_to_learn_is_refused_with_the_reason(tmp_path, sessions, model, words, capfd):
    dataset = dataset_of(tmp_path, sessions)
    assert main([f"data={dataset.path}", f"output={tmp_path / 'run'}", f"model={model}", *SMALL]) == 2
    out, err = capfd.readouterr()
    assert words in err
    assert (out, err.count("\n")) == ("", 1)
    assert not (tmp_path / "run").exists()


def test_single_session_and_largest_seed_train_and_dropped_tasks_are_warned_of(tmp_path, capfd):
    dataset = dataset_of(tmp_path, [[1, 2, 3, 4, 5, 6]])
    arguments = [f"data={dataset.path}", f"output={tmp_path / 'run'}", "model=hybrid", *SMALL, "recipe=small"]
    assert main([*arguments, f"seed={2**63 - 1}", "train.epochs=1"]) == 0
    out, err = capfd.readouterr()
    assert "warning: task like is dropped: only one class in train" in err
    assert "warning" not in out


def test_a_dataset_without_sessions_is_refused(fifty, tmp_path, capfd):
    shutil.copytree(fifty.path, tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"counts": manifest["counts"] | {"sessions": 0}}))
    assert main([f"data={tmp_path / 'data'}", f"output={tmp_path / 'run'}", "model=hybrid", *SMALL]) == 2
    assert "error: expected a dataset with sessions, got none" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["model=sasrec"], 0),
        (["model=sasrec", "network.hidden_size=256"], 100),
        (["model=gru4rec"], 100),  # from its recipe
        (["model=gru4rec", "recipe=medium"], 0),
        (["model=gru4rec", "recipe=medium", "network.hidden_size=256"], 100),
        (["model=hybrid", "network.embedding_dim=512"], 100),
        (["model=hybrid", "network.embedding_dim=512", "train.warmup_steps=0"], 0),
        (["model=rank_mmoe", "network.embedding_dim=512"], 0),
    ],
)
def test_wide_session_models_warm_up_by_default(options, steps):
    assert with_recipe(["data=d", "output=o", *options], 1_000).train.warmup_steps == steps


@pytest.mark.parametrize(
    ("options", "unread"),
    [
        (["model=gru4rec", "encoder=srgnn", "head=ple", "tasks=[next,like]"], ["encoder", "head", "tasks"]),
        (["model=gru4rec", "tasks=[next]", "loss=gbce", "train.gbce_t=0.5", "network.layers=2"], []),
        (["model=gru4rec", "train.gbce_t=0.5", "train.task_weights.like=2"], ["train.gbce_t", "train.task_weights"]),
        (["model=hybrid", "encoder=[gru4rec,srgnn]", "network.gnn_steps=2", "network.levels=1"], ["network.levels"]),
        (["model=hybrid", "head=ple", "network.levels=1", "network.experts=3"], ["network.experts"]),
        (["model=sasrec", "ray.use_gpu=true", "ray.workers=0"], ["ray.use_gpu"]),
        (
            ["model=gru4rec", "network.gate_preference=3", "train.best_epoch_by_task=true"],
            ["network.gate_preference", "train.best_epoch_by_task"],
        ),
        (["model=hybrid", "head=single", "network.gate_preference=2"], ["network.gate_preference"]),
        (["model=rank_mmoe", "network.gate_preference=2", "network.layers=3"], ["network.layers"]),
        (["model=rank_mmoe", "loss=softmax", "network.experts=3", "train.exposures=true"], ["loss"]),
        (
            ["model=gru4rec", "loss=softmax", "train.negatives=9", "train.batch_positives=true", "train.logq=0.5"],
            ["train.batch_positives", "train.logq", "train.negatives"],
        ),
        (["model=gru4rec", "loss=softmax", "network.popularity_bias=true", "train.skipped_negatives=3"], []),
        (["model=gru4rec", "loss=embedding", "train.skipped_negatives=3"], ["train.skipped_negatives"]),
        (
            ["model=hybrid", "tasks=[next]", "train.exposures_per_session=9", "network.detach_items=true"],
            ["network.detach_items", "train.exposures_per_session"],
        ),
        (["model=rank_mmoe", "network.profile=true", "train.positive_power=1"], ["network.profile"]),
        (["model=srgnn", "network.layers=2", "train.feature_rate=1"], ["network.layers", "train.feature_rate"]),
        (["model=sasrec", "network.item_features=[category]", "train.feature_rate=1", "network.layers=2"], []),
    ],
)
def test_options_that_the_model_does_not_read_are_named(options, unread):
    line = ["data=d", "output=o", "recipe=small", *options]
    assert unread_options(line, with_recipe(line, n_items=10)) == unread
