"""Embeddings of item features: their sum, unknown values, items without a train click."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import trainer.data.item_features
from etl.dataset import Dataset
from retrieval.bundle import open_bundle
from tests.support.engine import build, write_log
from tests.support.runs import SMALL
from tests.trainer.test_step import config, make_stepper, some_batch, state_of
from trainer.__main__ import main
from trainer.config import TrainerConfig
from trainer.data.item_features import feature_codes
from trainer.distributed.world import World
from trainer.models.embedding_table import SparseTable
from trainer.models.item_features import ItemFeatures
from trainer.option_groups import ModelOptions, TrainOptions
from trainer.prepare import resolve_config
from trainer.task.registry import model_task_of

CATEGORIES, ITEMS_OF_EACH, COLD_OF_EACH = 10, 6, 2


@pytest.fixture(scope="module")
def categories(tmp_path_factory) -> Dataset:
    """Sessions around a ring of categories, with a random item of each; two items of each are clicked only last."""
    folder = tmp_path_factory.mktemp("categories")
    rng, rows = np.random.default_rng(0), []
    for user in range(1, 301):
        clicks = int(rng.integers(10, 16))
        for i in range(clicks):
            category = (user + i) % CATEGORIES
            cold = i == clicks - 1 and user % 2
            low, high = (ITEMS_OF_EACH, ITEMS_OF_EACH + COLD_OF_EACH) if cold else (0, ITEMS_OF_EACH)
            item = 1 + category * 10 + int(rng.integers(low, high))
            rows.append((user, item, 1, 0, 0, 0, "\\N" if item % 10 == 1 else f"c{category}", 1, 1, 1))
    log = write_log(folder / "log.csv", rows)
    return build([f"input={log}", f"output={folder / 'data'}", "scenario=qb_video", "shards=2"])


def test_feature_codes_follow_the_value_names_and_null_is_zero(categories):
    codes, vocabulary = feature_codes(categories, ["category"])
    items = categories.items().to_pylist()
    assert codes.shape == (len(items) + 1, 1)
    assert vocabulary == {"category": {f"c{i}": i + 1 for i in range(CATEGORIES)}}
    for row in items:
        assert codes[row["item"], 0] == vocabulary["category"].get(row["category"], 0)
    assert (codes[1:] == 0).any()
    assert feature_codes(categories, [])[0].shape == (len(items) + 1, 0)


def test_item_vector_is_the_sum_of_its_own_and_its_feature_vectors():
    codes = np.array([[0, 0], [1, 3], [2, 0], [0, 0]])
    features = ItemFeatures(codes, np.array([5, 1, 0]), ["item"])
    tables = {
        name: SparseTable(3, 2, generator=torch.Generator(), device=torch.device("cpu"), bias=False)
        for name in ("item", "item_features")
    }
    tables["item"].vector.copy_(torch.tensor([[0.0, 0.0], [0.1, 0.1], [0.2, 0.2], [0.3, 0.3]]))
    tables["item_features"].vector.copy_(torch.tensor([[0.0, 0.0], [1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]))
    ids = torch.tensor([1, 2, 3])
    # The third item has no train click, so its own vector is not used.
    expected = torch.tensor([[101.1, 202.1], [10.2, 20.2], [0.0, 0.0]])
    assert torch.allclose(features.vectors(tables, "item", ids), expected)
    assert torch.equal(ItemFeatures.none().vectors(tables, "item", ids), tables["item"].vector[1:])
    ids_of = features.with_values({"item": ids, "user": ids})
    assert {name: sorted(set(actual.tolist())) for name, actual in ids_of.items()} == {
        "item": [1, 2, 3],
        "user": [1, 2, 3],
        "item_features": [0, 1, 2, 3],
    }
    rows = {name: tables[name].rows(torch.unique(ids_of[name])) for name in ("item", "item_features")}
    actual = features.join(rows)["item"].vector
    assert torch.allclose(actual, expected)
    actual.sum().backward()
    assert rows["item"].vector.grad.tolist() == [[1, 1], [1, 1], [0, 0]]
    tables["item_features"].update(rows["item_features"].ids, rows["item_features"].gradient(), 1.0)
    assert tables["item_features"].vector[0].tolist() == [0, 0]  # the vector of unknown values stays zero
    assert tables["item_features"].vector[1].tolist() == pytest.approx([0, 1], abs=1e-4)


def test_initial_vectors_are_split_into_value_means_and_residuals():
    codes = np.array([[0, 0], [1, 3], [1, 0], [2, 3], [2, 4], [0, 0]])
    vector = torch.tensor([[2.0, 0.0], [0.0, 4.0], [6.0, 2.0], [7.0, 7.0], [1.0, 1.0]])
    features = ItemFeatures(codes, np.ones(5, np.int64), ["item"])
    counted = torch.tensor([0, 1, 2, 4])  # the fourth item has no vector
    own, value = features.split(vector, counted)
    # By hand: half the mean over a value's items, as there are two columns; the fourth value has no item.
    assert value.tolist() == [[0, 0], [0.5, 1], [3, 1], [2, 0.5], [0, 0]]
    assert torch.equal(own + value[torch.from_numpy(codes)[counted + 1]].sum(1), vector[counted])
    same, none = ItemFeatures.none().split(vector, counted)
    assert torch.equal(same, vector[counted])
    assert len(none) == 0


def test_ppmi_start_with_item_features_keeps_vectors_and_fills_cold_items(categories):
    def begun(columns):
        network = ModelOptions(embedding_dim=8, hidden_size=8, item_features=columns)
        train = TrainOptions(ppmi_start=0.5)
        settings = TrainerConfig(data="", output="", model="gru4rec", tasks=["next"], network=network, train=train)
        task = model_task_of(settings, categories, World.alone())
        step = task.train_step(1)
        task.init_from_counts(step, 2)
        ids = torch.arange(categories.manifest.n_items + 1)
        return step, step.model.item_features.vectors(step.tables, "item", ids)

    train_clicks = categories.items()["train_clicks"].to_numpy()
    warm = np.flatnonzero(train_clicks > 0) + 1
    (_, plain), (step, joined) = begun([]), begun(["category"])
    assert torch.allclose(joined[warm], plain[warm], atol=1e-6)
    category = step.model.item_features.codes[:, 0].numpy()
    for cold in np.flatnonzero(train_clicks == 0) + 1:
        like = warm[category[warm] == category[cold]]
        if category[cold]:
            assert joined[cold].numpy() == pytest.approx(plain[like].mean(0).numpy(), abs=1e-5)


def cold_hits(dataset: Dataset, run, k: int) -> float:
    """HR@k over test targets without a train click."""
    train_clicks = dataset.items()["train_clicks"].to_numpy()
    bundle = open_bundle(run / "bundle")
    vectors, hits = bundle.item_vectors(), []
    for query in bundle.queries("test"):
        score = query.vector @ vectors.T
        own = score[np.arange(len(score)), query.target - 1]
        rank = (score >= own[:, None]).sum(1)
        hits += (rank[train_clicks[query.target - 1] == 0] <= k).tolist()
    assert len(hits) > 100
    return float(np.mean(hits))


@pytest.mark.parametrize(
    "model",
    [
        ["gru4rec"],
        ["hybrid"],
        ["sasrec", "network.tie_embeddings=false", "loss=softmax", "train.feature_rate=1"],
        ["sasrec", "network.tie_embeddings=false"],
    ],
    ids=" ".join,
)
def test_items_without_a_train_click_are_ranked_by_their_features(categories, tmp_path, model):
    actual = {}
    size = ["network.embedding_dim=16", "network.hidden_size=16", "train.epochs=15", "train.negatives=60"]
    for name, features in (("without", "[]"), ("with", "[category]")):
        run = tmp_path / name
        options = [*SMALL, *size, f"model={model[0]}", *model[1:], f"network.item_features={features}"]
        assert main([f"data={categories.path}", f"output={run}", *options]) == 0
        actual[name] = cold_hits(categories, run, ITEMS_OF_EACH + COLD_OF_EACH)
    assert actual["without"] < 0.1
    assert actual["with"] > 0.4
    assert json.loads((tmp_path / "with" / "item_features.json").read_text())["category"]["c3"] == 4
    assert not (tmp_path / "without" / "item_features.json").exists()


@pytest.mark.parametrize("option", ["network.item_features", "network.feedback_features"])
def test_unknown_or_unusable_feature_columns_are_refused(categories, tmp_path, option, capfd):
    for features in ("[colour]", "[item_id]", "[category,category]"):
        options = [f"data={categories.path}", f"output={tmp_path / 'run'}", "model=hybrid"]
        assert main([*options, f"{option}={features}"]) == 2
        err = capfd.readouterr().err
        assert err.startswith(f"error: expected {option}")
        assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "max_values", "expected"),
    [
        (["model=hybrid"], 5, ["category"]),
        (["model=hybrid"], 4, []),
        (["model=hybrid", "network.item_features=[category]"], 5, ["category"]),
        (["model=hybrid", "network.item_features=[category]"], 4, []),
        (["model=hybrid", "network.feedback_features=[category]"], 4, ["category"]),
        (["model=hybrid", "network.feedback_features=[]"], 5, []),
        (["model=hybrid", "network.feedback_feature_dim=0"], 5, []),
        (["model=hybrid", "tasks=[next]"], 5, []),
        (["model=gru4rec"], 5, []),
    ],
    ids=str,
)
def test_feedback_towers_read_the_category_by_default_if_it_has_few_values(
    fifty, monkeypatch, options, max_values, expected
):
    monkeypatch.setattr(trainer.data.item_features, "MAX_VALUES", max_values)
    plain = ["network.feedback_feature_dim=3", "network.feedback_actions=false"]
    line = [f"data={fifty.path}", "output=run", *plain, *options]
    config, dataset = resolve_config(line)
    assert config.feedback_features == expected
    model = model_task_of(config, dataset, World.alone()).train_step(1).model
    assert (model.feedback_features is not None) == bool(expected)


@pytest.mark.parametrize(
    "options",
    [
        ["model=gru4rec", "network.feedback_actions=true"],
        ["model=rank_mmoe", "network.feedback_features=[category]", "network.feedback_feature_dim=8"],
        ["model=hybrid", "recipe=large", "network.feedback_actions=true", "network.feedback_feature_dim=0"],
        ["model=hybrid", "tasks=[next]", "network.feedback_features=[category]"],
    ],
    ids=" ".join,
)
def test_options_of_feedback_towers_are_refused_without_feedback_towers(fifty, tmp_path, options, capfd):
    assert main([f"data={fifty.path}", f"output={tmp_path / 'run'}", *options]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: expected a hybrid with feedback tasks and network.feedback_feature_dim above 0 for")
    assert err.count("\n") == 1


def test_feature_vectors_learn_at_a_fifth_of_the_item_rate_by_default(fifty):
    moved = {}
    for rate in (0.2, 1.0):
        changes = {"network": {"item_features": ["category"]}, "train": {} if rate == 0.2 else {"feature_rate": rate}}
        train_step = make_stepper(config(fifty.path, **changes), fifty, World.alone())
        before = state_of(train_step)
        train_step.step([some_batch(fifty)], 0)
        moved[rate] = {name: table.vector - before[f"table.{name}.vector"] for name, table in train_step.tables.items()}
    assert torch.allclose(moved[0.2]["item_features"], 0.2 * moved[1.0]["item_features"], atol=1e-7)
    assert torch.equal(moved[0.2]["item"], moved[1.0]["item"])
    assert moved[1.0]["item_features"].any()
