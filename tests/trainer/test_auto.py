"""`recipe=auto` with several recipes: which are tried, selection by valid metrics, resuming."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from unittest import mock

import pytest
import yaml

from tests.support.runs import SMALL, assert_same_run, killed_at_step, terminated_at_step
from trainer.__main__ import main
from trainer.config import load
from trainer.recipe import SMALL_CATALOGUE, recipes_to_try
from trainer.training.step import TrainStep
from trainer.tuning.auto import trial_epochs
from trainer.tuning.trial import FAILED, Trial

BOTH = ["small", "small_softmax"]
OF_GRU4REC = [*BOTH, "small_dropout"]


def options(dataset, run: Path, *more: str) -> list[str]:
    """Four epochs of whichever of two recipes is better after two epochs."""
    fixed = ["model=gru4rec", *SMALL, "train.epochs=4", f"auto.candidates=[{','.join(BOTH)}]"]
    return [f"data={dataset.path}", f"output={run}", *fixed, *more]


def choice_of(run: Path) -> dict:
    return json.loads((run / "recipe_choice.json").read_text())


def recipe_of(run: Path) -> str:
    return yaml.safe_load((run / "config.yaml").read_text())["recipe"]


@pytest.fixture(scope="module")
def chosen(fifty, tmp_path_factory) -> Path:
    """An undisturbed run; next to it a file `steps` with the number of steps of trials and training."""
    run, step, taken = tmp_path_factory.mktemp("chosen") / "run", TrainStep.step, []

    def counted(self, *arguments):
        taken.append(1)
        return step(self, *arguments)

    with mock.patch.object(TrainStep, "step", counted):
        assert main(options(fifty, run)) == 0
    (run.parent / "steps").write_text(str(len(taken)))
    return run


@pytest.mark.parametrize(
    ("more", "n_items", "tried"),
    [
        (["model=gru4rec"], SMALL_CATALOGUE, OF_GRU4REC),
        (["model=gru4rec"], SMALL_CATALOGUE + 1, ["medium", "medium_dropout"]),
        (["model=hybrid"], SMALL_CATALOGUE + 1, ["medium", "medium_dropout"]),
        (["model=sasrec"], SMALL_CATALOGUE + 1, ["medium"]),
        (["model=gru4rec", "network.item_features=[category]"], 100, OF_GRU4REC),
        (["model=nextitnet"], 100, ["small"]),
        (["model=rank_mmoe"], 100, ["small"]),
        (["model=nextitnet", "auto.candidates=[medium,small]"], 10**6, ["medium", "small"]),
    ],
)
def test_recipes_to_try_follow_from_model_and_catalogue_unless_given(more, n_items, tried):
    assert recipes_to_try(load(["data=d", "output=o", *more]), n_items) == tried


@pytest.mark.parametrize(
    ("clicks", "sessions", "more", "epochs"),
    [
        (27_370, 1_090, [], 9),  # 24,100 targets
        (27_370, 1_090, ["train.epochs=12"], 6),
        (164_490, 19_412, [], 2),  # 106,254 targets
        (10**6, 1_000, [], 2),
        (10**6, 1_000, ["train.epochs=3"], 0),
        (100, 10, ["train.epochs=5"], 2),
        (100, 40, [], 10),  # no target
        (164_490, 19_412, ["auto.targets=0"], 0),
        (164_490, 19_412, ["auto.targets=300000"], 3),
    ],
)
def test_trials_have_more_epochs_if_clicks_are_few(clicks, sessions, more, epochs):
    config = load(["data=d", "output=o", "model=gru4rec", "train.epochs=20", *more])
    dataset = mock.Mock()
    dataset.manifest.counts = {"clicks": clicks, "sessions": sessions}
    assert trial_epochs(config, dataset) == epochs


def test_best_recipe_on_valid_gives_the_same_run_as_naming_it(fifty, chosen, tmp_path, capfd):
    choice, reached = choice_of(chosen), {}
    for recipe in BOTH:
        alone = options(fifty, tmp_path / recipe, f"recipe={recipe}", "train.epochs=2")
        assert main(alone) == 0
        reached[recipe] = json.loads((tmp_path / recipe / "summary.json").read_text())["valid"]
        assert not (tmp_path / recipe / "recipe_choice.json").exists()
    assert {row["recipe"]: row["valid"] for row in choice["tried"]} == reached
    best = max(BOTH, key=lambda recipe: reached[recipe]["ndcg@20"])
    assert reached["small"]["ndcg@20"] != reached["small_softmax"]["ndcg@20"]
    assert choice["recipe"] == recipe_of(chosen) == best
    assert json.loads((chosen / "summary.json").read_text())["recipe"] == best
    assert main(options(fifty, tmp_path / "named", f"recipe={best}")) == 0
    assert_same_run(chosen, tmp_path / "named")
    # In another order, and by another metric in which they differ.
    run = tmp_path / "turned"
    assert main(options(fifty, run, "auto.candidates=[small_softmax,small]", "train.select_by=hr@20")) == 0
    scores = {row["recipe"]: row["valid"]["hr@20"] for row in choice_of(run)["tried"]}
    assert choice_of(run)["recipe"] == recipe_of(run) == max(reversed(BOTH), key=scores.__getitem__)
    assert f"recipe=auto: {recipe_of(run)} (valid hr@20 after 2 epochs: small_softmax 0." in capfd.readouterr().out


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_run_killed_during_its_trials_resumes_to_a_bit_identical_result(fifty, chosen, tmp_path, share):
    run, total = tmp_path / "run", int((chosen.parent / "steps").read_text())
    with killed_at_step(int(share * total)):
        main(options(fifty, run))
    assert (run / "config.yaml").exists() == (share > 0.6)
    assert main(options(fifty, run)) == 0
    assert_same_run(chosen, run)
    mine, theirs = ([row | {"seconds": None} for row in choice_of(folder)["tried"]] for folder in (run, chosen))
    assert mine == theirs
    for folder in (run / ".recipes").iterdir():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines if line["name"] == "ndcg@20"] == [1, 2]


def test_sigterm_during_trials_saves_a_checkpoint_and_the_command_resumes(fifty, chosen, tmp_path, capfd):
    with terminated_at_step(3):
        main(options(fifty, tmp_path / "run", "train.checkpoint_steps=1000"))
    assert "the same command resumes from there\n" in capfd.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert main(options(fifty, tmp_path / "run", "train.checkpoint_steps=1000")) == 0
    assert choice_of(tmp_path / "run")["recipe"] == choice_of(chosen)["recipe"]
    assert_same_run(chosen, tmp_path / "run")


def test_full_disk_during_trials_is_a_plain_error_and_the_command_continues(fifty, chosen, tmp_path, capfd):
    full = mock.patch("trainer.run.checkpoint.write", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with full:
        assert main(options(fifty, tmp_path / "run")) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: expected room on the disk for the checkpoint")
    assert not list((tmp_path / "run").glob(".recipes/*/trial.json"))
    assert main(options(fifty, tmp_path / "run")) == 0
    assert choice_of(tmp_path / "run")["recipe"] == choice_of(chosen)["recipe"]
    assert_same_run(chosen, tmp_path / "run")


def test_run_keeps_its_recipe_and_refuses_changed_options_from_the_first_trial(fifty, tmp_path, capfd):
    run = tmp_path / "run"
    with killed_at_step(5):
        main(options(fifty, run))
    assert main(options(fifty, run, "seed=1")) == 2
    assert "expected seed=0 as the run began with" in capfd.readouterr().err
    assert main(options(fifty, run, "train.learning_rate=0.3")) == 2
    assert main(options(fifty, run)) == 0
    # Options of auto have no effect any more; the other recipe is refused.
    assert main(options(fifty, run, "auto.candidates=[medium,large]", "auto.targets=1", "train.epochs=5")) == 0
    other = next(name for name in BOTH if name != recipe_of(run))
    assert main(options(fifty, run, f"recipe={other}")) == 2
    assert f"expected recipe={recipe_of(run)} as the run began with, got {other}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "recipe"),
    [
        (["auto.targets=0"], "small"),
        (["train.epochs=3"], "small"),  # half of them is one
        (["loss=sampled_softmax"], "small_softmax"),
        (["loss=gbce"], "small"),  # no recipe has this loss
        (["loss=embedding"], "small"),  # not combinable with cosine scores
        (["auto.candidates=[small_dropout]"], "small_dropout"),
        (["recipe=small_softmax"], "small_softmax"),
        (["recipe=small_softmax", "model=nextitnet"], "small"),  # nextitnet has no such recipe file
    ],
)
def test_no_trials_run_if_there_is_only_one_recipe_to_choose(fifty, tmp_path, more, recipe, monkeypatch):
    monkeypatch.setattr(Trial, "run", lambda self, report: pytest.fail("tried"))
    assert main(options(fifty, tmp_path / "run", "train.valid_sessions=5", *more)) == 0
    assert recipe_of(tmp_path / "run") == recipe
    assert not (tmp_path / "run" / "recipe_choice.json").exists()


def test_recipe_whose_trial_fails_is_not_chosen(fifty, tmp_path, monkeypatch, capfd):
    run, better = tmp_path / "run", Trial.run

    def fails(self, report):
        if self.setting["recipe"] == "small":
            self.end(FAILED, error="loss is not finite")
        else:
            better(self, report)

    monkeypatch.setattr(Trial, "run", fails)
    assert main(options(fifty, run)) == 0
    assert recipe_of(run) == "small_softmax"
    assert "small failed, small_softmax 0." in capfd.readouterr().out
    assert choice_of(run)["tried"][0] == {"recipe": "small", "state": "failed", "error": "loss is not finite"}


@pytest.mark.parametrize(
    "wrong",
    [
        ["auto.candidates=[huge]"],
        ["auto.candidates=[auto]"],
        ["auto.targets=-1"],
        ["network.positions=2"],
        ["data=/no"],
    ],
)
def test_invalid_options_fail_before_any_trial(fifty, tmp_path, wrong, capfd):
    assert main(options(fifty, tmp_path / "run", *wrong)) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: expected ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_unrelated_output_folder_is_refused_before_any_trial(fifty, tmp_path, capfd):
    (tmp_path / "thesis.txt").touch()
    assert main(options(fifty, tmp_path)) == 2
    assert "a fresh output folder" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert main(options(fifty, fifty.path / "run")) == 2
    assert not (fifty.path / "run").exists()


def test_killed_trials_of_another_number_of_epochs_begin_again(fifty, tmp_path):
    run = tmp_path / "run"
    with killed_at_step(25):
        main(options(fifty, run, "train.epochs=4"))
    (run / ".recipes" / BOTH[0] / "trial.json").write_text('{"state": "finished", "valid": {"ndcg@20": 1.0}}')
    assert main(options(fifty, run, "train.epochs=6")) == 0
    choice = choice_of(run)
    assert choice["epochs"] == 3
    for name in BOTH:
        trained = yaml.safe_load((run / ".recipes" / name / "config.yaml").read_text())
        assert trained["train"]["epochs"] == 3
