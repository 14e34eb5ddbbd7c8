"""`train.best_epoch_by_task`: each feedback task is scored by its own best epoch, the queries by theirs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from retrieval.bundle import open_bundle
from retrieval.metrics.feedback import auc
from tests.support.runs import SMALL, assert_same_run, killed_at_step
from tests.support.workers import train_on_two
from trainer.__main__ import main
from trainer.apply import main as apply
from trainer.distributed.world import World
from trainer.loop import train
from trainer.prepare import prepare
from trainer.run.progress import Progress
from trainer.task.task_epochs import update_best_by_task

MINE = "train.best_epoch_by_task=true"
TASKS = ("click", "like", "share")
LONG = ["train.epochs=6", "train.early_stopping_patience=6", "train.valid_sessions=50", "train.keep_checkpoints=1"]


def options(dataset, run: Path, *more: str) -> list[str]:
    tasks = f"tasks=[next,{','.join(TASKS)}]"
    return [f"data={dataset.path}", f"output={run}", "model=hybrid", tasks, *SMALL, *LONG, *more]


def score(run: Path, split: str, task: str) -> np.ndarray:
    """Scores of a task's rows, sorted by user and item."""
    return open_bundle(run).feedback(split, task).sort_by([("user_id", "ascending"), ("item", "ascending")])["score"]


@pytest.fixture(scope="module")
def own(fifty, tmp_path_factory):
    """A run whose tasks have different best epochs."""
    run = tmp_path_factory.mktemp("own") / "run"
    assert main(options(fifty, run, MINE)) == 0
    return run


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def test_best_epoch_of_a_task_is_the_first_with_its_highest_auc():
    progress = Progress()
    for epoch, like in enumerate((0.5, 0.7, None, math.nan, 0.7, 0.6), 1):
        progress.epoch, progress.step = epoch, 10 * epoch
        update_best_by_task(progress, {"auc/like": like, "auc": like, "hr@20": 0.1 * epoch})
    assert progress.best_by_task == {"like": (2, 20, 0.7)}


def test_each_task_has_its_best_valid_auc_and_queries_are_unchanged(fifty, own, tmp_path):
    assert main(options(fifty, tmp_path / "run")) == 0
    plain = summary(tmp_path / "run")
    epochs = summary(own)["epoch_by_task"]
    assert epochs == {task: plain["best_epoch_by_metric"][f"auc/{task}"] for task in TASKS}
    assert len({summary(own)["best_epoch"], *epochs.values()}) > 1  # otherwise the test shows nothing
    bundles = [open_bundle(run / "bundle") for run in (own, tmp_path / "run")]
    assert np.array_equal(*(bundle.item_vectors() for bundle in bundles))
    for split in ("valid", "test", "next"):
        both = [[(q.user_id, q.vector) for q in bundle.queries(split)] for bundle in bundles]
        for (user, vector), (other_user, other) in zip(*both, strict=True):
            assert np.array_equal(user, other_user)
            assert np.array_equal(vector, other)
    for task in TASKS:
        table = bundles[0].feedback("valid", task)
        value = auc(table["label"].to_numpy(), table["score"].to_numpy())
        assert value == pytest.approx(summary(own)["valid"][f"auc/{task}"], abs=1e-6)
        assert value >= plain["valid"][f"auc/{task}"]
    mean = np.mean([summary(own)["valid"][f"auc/{task}"] for task in TASKS])
    assert summary(own)["valid"]["auc"] == pytest.approx(mean)


def test_task_scores_equal_those_of_a_run_selected_by_that_task(fifty, own, tmp_path):
    for task in TASKS:
        assert main(options(fifty, tmp_path / task, f"train.select_by=auc/{task}")) == 0
        for split in ("valid", "test"):
            assert score(own / "bundle", split, task).equals(score(tmp_path / task / "bundle", split, task))


def test_best_checkpoints_of_tasks_are_retained(own):
    kept = {int(path.name[5:]) for path in (own / "checkpoints").glob("step-*")}
    steps, epochs = summary(own)["steps"], summary(own)["epochs"]
    own_epochs = {summary(own)["best_epoch"], *summary(own)["epoch_by_task"].values(), epochs}
    assert kept == {epoch * steps // epochs for epoch in own_epochs}


def test_killed_run_resumes_to_the_same_result(fifty, own, tmp_path):
    settings, _ = prepare(options(fifty, tmp_path / "run", MINE))
    with killed_at_step(2 * summary(own)["steps"] // 3):
        train(settings, World.alone())
    assert main(options(fifty, tmp_path / "run", MINE)) == 0
    assert_same_run(own, tmp_path / "run")


def test_apply_scores_with_the_best_epoch_of_each_task(fifty, own, tmp_path):
    assert apply([f"run={own}", f"data={fifty.path}", f"output={tmp_path / 'bundle'}"]) == 0
    for task in TASKS:
        assert score(tmp_path / "bundle", "test", task).equals(score(own / "bundle", "test", task))


def test_ranking_model_scores_each_task_by_its_best_epoch(fifty, tmp_path):
    line = [o for o in options(fifty, tmp_path / "run", MINE) if not o.startswith(("model=", "tasks="))]
    assert main([*line, "model=rank_mmoe", "tasks=[click,like]"]) == 0
    for task in ("click", "like"):
        table = open_bundle(tmp_path / "run" / "bundle").feedback("valid", task)
        value = auc(table["label"].to_numpy(), table["score"].to_numpy())
        assert value == pytest.approx(summary(tmp_path / "run")["valid"][f"auc/{task}"], abs=1e-6)


def test_best_epoch_by_task_with_a_refit_is_refused(fifty, tmp_path, capfd):
    assert main(options(fifty, tmp_path / "run", MINE, "train.refit=true")) == 2
    assert "train.best_epoch_by_task" in capfd.readouterr().err


@pytest.mark.cluster
@pytest.mark.parametrize("table", ["replicated", "sharded"])
def test_task_scores_on_two_workers_equal_those_of_a_run_selected_by_the_task(fifty, tmp_path, table):
    found = {}
    for name, more in (("plain", ["train.select_by=auc/like"]), ("own", [MINE])):
        settings, _ = prepare(options(fifty, tmp_path / name, *more, f"train.table={table}", "train.ppmi_start=0"))
        train_on_two(tmp_path / f"meet {name}", settings)
        found[name] = score(tmp_path / name / "bundle", "test", "like")
    assert found["own"].equals(found["plain"])
