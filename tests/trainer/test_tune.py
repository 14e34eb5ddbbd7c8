"""Hyperparameter search: spaces, settings, invalid options; a search that is killed, resumed and extended."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pyarrow.parquet as pq
import pytest
import yaml

from etl.runtime.errors import InputError
from etl.runtime.locks import locked
from etl.runtime.option_files import expand_files
from tests.support.mounts import resize, small_disk
from tests.support.runs import SMALL
from trainer.__main__ import main as train
from trainer.config import MODELS, load
from trainer.recipe import with_recipe
from trainer.tune import load as tune_options
from trainer.tune import main
from trainer.tuning.search import rows_of, write_findings
from trainer.tuning.space import Choice, Uniform, command_line, default_space, first_settings, read_space, settings
from trainer.tuning.trial import Trial

SHARED = " ".join(option for option in SMALL if not option.startswith(("ray.", "train.epochs")))


def test_settings_depend_on_seed_and_trial_number_only():
    space = {"a": Uniform(0.01, 100.0, log=True), "b": Choice([True, False, "x"]), "c": Uniform(-1.0, 1.0)}
    few, many = (settings("gru4rec", space, n, seed=3, known=False) for n in (5, 400))
    assert many[:5] == few
    assert few[0] == {}
    assert settings("gru4rec", space, 5, seed=4, known=False) != few
    logs = [math.log10(s["a"]) for s in many[1:]]
    assert -2 <= min(logs) < -1.8
    assert 1.8 < max(logs) <= 2
    assert abs(sum(logs) / len(logs)) < 0.2  # uniform in the logarithm: mean 0, standard error 0.06
    assert {s["b"] for s in many[1:]} == {True, False, "x"}
    assert abs(sum(s["c"] for s in many[1:]) / 399) < 0.1
    assert command_line({"b": True, "loss": "gbce", "c": 0.5}) == ["b=true", "loss=gbce", "c=0.5"]
    assert command_line({"n": None, "w": {"like": 0.1, "click": True}}) == ["n=null", "w={like:0.1,click:true}"]


@pytest.mark.parametrize("recipe", ["small", "large"])
@pytest.mark.parametrize("model", MODELS)
def test_settings_of_the_default_spaces_are_valid_and_surround_the_recipe(model, recipe):
    line = ["data=d", "output=o", f"model={model}", f"recipe={recipe}"]
    config = with_recipe(line, n_items=10)
    space = default_space(config)
    actual = settings(model, space, 40, seed=0, known=True)
    assert actual[: len(first_settings(model))] == first_settings(model)
    for setting in actual[:4]:
        load([*line, *command_line(setting)])
    for name, dimension in space.items():
        section, _, option = name.rpartition(".")
        value = getattr(getattr(config, section) if section else config, option)
        sampled = [setting[name] for setting in actual[2:]]
        if isinstance(dimension, Choice):
            assert value in dimension.values
            assert set(sampled) == set(dimension.values)
        elif value is not None:
            assert dimension.low <= value <= dimension.high
            assert min(sampled) < value < max(sampled) or value == dimension.low
    assert space["train.learning_rate"] == Uniform(
        config.train.learning_rate / 4, config.train.learning_rate * 4, log=True
    )


def test_search_space_is_read_from_a_file_and_invalid_ones_are_refused(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(
        "loss: {choice: [bpr_max, gbce]}\ntrain.learning_rate: {log_uniform: [0.01, 1]}\nx: {uniform: [0, 2]}"
    )
    assert read_space(str(path)) == {
        "loss": Choice(["bpr_max", "gbce"]),
        "train.learning_rate": Uniform(0.01, 1, log=True),
        "x": Uniform(0, 2),
    }
    for text in (
        "",
        "[]",
        "a: 3",
        "a: {choice: []}",
        "a: {uniform: [2, 1]}",
        "a: {log_uniform: [0, 1]}",
        "a: {grid: [1]}",
        "a: {uniform: [0.1, .inf]}",
    ):
        path.write_text(text)
        with pytest.raises(InputError):
            read_space(str(path))
    with pytest.raises(InputError, match="a readable search space"):
        read_space(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["trials=0"], "trials of at least 1, got 0"),
        (["hours=0"], "hours of above 0"),
        (["model=bert"], "model one of"),
        (["options=train.epochs=3"], "options that the search does not set, got train.epochs=3"),
        (["options=train.learning_rat=3"], "a known option, got train.learning_rat"),
        (["options=loss=none"], "loss one of"),
        (["output=s3://bucket/tune"], "a folder for output"),
        (["data=/nowhere"], "a dataset"),
    ],
)
def test_invalid_options_are_reported_and_write_nothing(fifty, tmp_path, capfd, wrong, message):
    options = [f"data={fifty.path}", f"output={tmp_path / 'tune'}", "model=gru4rec"]
    assert main([*options, *wrong]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: expected ")
    assert message in error
    assert not (tmp_path / "tune").exists()


def test_trial_reports_every_epoch_and_fails_alone_on_a_bad_setting(fifty, tmp_path):
    options = [f"data={fifty.path}", f"output={tmp_path / 'trial'}", "model=gru4rec", *SMALL, "train.epochs=2"]
    trial, reported = Trial(0, tmp_path / "trial", {}, options), []
    trial.run(reported.append)
    assert [metrics["epoch"] for metrics in reported] == [1, 2]
    assert trial.state == "finished"
    assert trial.ended()["valid"]["ndcg@20"] == max(metrics["ndcg@20"] for metrics in reported)
    assert not (tmp_path / "trial" / "bundle").exists()
    again = []
    trial.run(again.append)
    assert [m["ndcg@20"] for m in again] == [m["ndcg@20"] for m in reported]
    # A finished trial is an ordinary run: the trainer exports its bundle without training again.
    assert any((tmp_path / "trial" / "checkpoints").iterdir())
    assert train(options) == 0
    assert (tmp_path / "trial" / "bundle" / "manifest.json").is_file()
    wild = Trial(1, tmp_path / "wild", {}, [*options, f"output={tmp_path / 'wild'}", "train.learning_rate=1e30"])
    (tmp_path / "wild" / "checkpoints").mkdir(parents=True)
    wild.run(reported.append)
    assert wild.state == "failed"
    assert not (tmp_path / "wild" / "checkpoints").exists()


def test_rows_are_by_metric_then_number_and_a_finished_trials_metrics_those_of_its_end(tmp_path):
    """The last validation of a finished trial is with fitted score weights, which those of its epochs are not."""
    trials = [Trial(number, tmp_path / str(number), {}, []) for number in range(4)]
    for trial, values in zip(trials, ([0.1, 0.3, 0.2], [0.3], [0.1, 0.2], []), strict=True):
        trial.folder.mkdir()
        lines = [
            {"step": 1, "epoch": epoch, "split": "valid", "name": "ndcg@20", "value": value}
            for epoch, value in enumerate(values, 1)
        ]
        (trial.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trials[2].end("finished", best_epoch=2, valid={"ndcg@20": 0.35})
    trials[3].end("failed", error="no")
    rows = [(row["trial"], row["best_epoch"], row.get("valid/ndcg@20")) for row in rows_of(trials, "ndcg@20")]
    assert rows == [(2, 2, 0.35), (0, 2, 0.3), (1, 1, 0.3), (3, None, None)]


def test_best_setting_with_a_map_among_the_shared_options_is_read_again(tmp_path):
    shared = "recipe=small train.task_weights={like:0.25} tasks=[next,like]"
    config = tune_options(["data=d", f"output={tmp_path}", "model=hybrid", f"options={shared}", "epochs=3"])
    trial = Trial(0, tmp_path / "trial", {"train.learning_rate": 0.02}, ["data=d", "output=o"])
    trial.folder.mkdir()
    line = {"step": 1, "epoch": 1, "split": "valid", "name": "ndcg@20", "value": 0.5}
    (trial.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    write_findings(tmp_path, [trial], config, "ndcg@20")
    again = load(expand_files([f"@{tmp_path / 'best.yaml'}", "data=d", "output=o"]))
    assert again.train.task_weights == {"like": 0.25}
    assert (again.tasks, again.train.epochs, again.train.learning_rate) == (["next", "like"], 3, 0.02)


def full_disk(*arguments, **more):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("full", ["trainer.run.checkpoint.write", "trainer.run.metrics_log.RunLog.write"])
def test_full_disk_leaves_a_trial_unfinished(fifty, tmp_path, full):
    """Either no checkpoint is written, which is an error at the end only, or the first line of the metrics is not."""
    folder = tmp_path / "trial"
    options = [f"data={fifty.path}", f"output={folder}", "model=gru4rec", *SMALL, "train.epochs=2"]
    trial = Trial(0, folder, {}, options)
    with mock.patch(full, full_disk), pytest.raises(InputError, match="expected room on the disk"):
        trial.run(lambda _: None)
    assert trial.state == "unfinished"
    trial.run(lambda _: None)
    assert trial.state == "finished"


def test_trial_that_another_process_trains_is_left_unfinished(fifty, tmp_path, monkeypatch):
    trial = Trial(0, tmp_path / "trial", {}, [f"data={fifty.path}", f"output={tmp_path / 'trial'}", "model=gru4rec"])
    monkeypatch.setattr("etl.runtime.locks.time", mock.Mock(monotonic=itertools.count(0, 1000).__next__))
    with locked(trial.folder), pytest.raises(InputError, match="no other process is writing"):
        trial.run(lambda _: None)
    assert trial.state == "unfinished"


def search(data: Path, folder: Path, *more: str) -> list[str]:
    options = [f"data={data}", f"output={folder}", "model=gru4rec", "epochs=3", "grace_epochs=1", f"options={SHARED}"]
    return [*options, *more]


@pytest.mark.cluster
def test_full_disk_ends_a_search_which_can_be_continued(fifty, tmp_path, capfd):
    with small_disk(tmp_path / "small", "64k") as small:
        options = search(fifty.path, small / "tune", "trials=2", "scheduler=none")
        assert main(options) == 2
        assert capfd.readouterr().err.splitlines()[-1].startswith("error: expected room on the disk")
        assert not list(small.glob("tune/trials/*/trial.json"))
        resize(small, "64m")
        assert main(options) == 0
        states = {json.loads(path.read_text())["state"] for path in small.glob("tune/trials/*/trial.json")}
        assert states == {"finished"}


@pytest.mark.cluster
def test_killed_search_resumes_and_can_be_extended(fifty, tmp_path, capfd):
    folder, space = tmp_path / "tune", tmp_path / "space.yaml"
    space.write_text("train.learning_rate: {choice: [0.05, 0.2, 1.0e+30]}\nnetwork.layers: {choice: [1, 2]}")
    options = search(fifty.path, folder, f"space={space}")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer.tune", *options, "trials=8"]
    killed = subprocess.Popen(command, start_new_session=True, env=environment)
    deadline = time.monotonic() + 200
    while not list(folder.glob("trials/*/trial.json")):
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    ended = {path: path.read_bytes() for path in folder.glob("trials/*/trial.json")}
    assert len(ended) < 8
    assert main([*options, "trials=8"]) == 0
    text = capfd.readouterr().out
    assert {path: path.read_bytes() for path in ended} == ended
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    assert sorted(row["trial"] for row in rows) == list(range(8))
    assert {row["state"] for row in rows} <= {"finished", "stopped", "failed"}
    assert "failed" in {row["state"] for row in rows}  # a rate of 1e30
    values = [row["valid/ndcg@20"] for row in rows if row["valid/ndcg@20"] is not None]
    assert values == sorted(values, reverse=True)
    assert f"best {values[0]:.4f}" in text
    best = yaml.safe_load((folder / "best.yaml").read_text())
    again = load(expand_files([f"@{folder / 'best.yaml'}", "data=d", "output=o"]))
    assert (again.model, again.train.epochs) == ("gru4rec", 3)
    assert {name: best[name] for name in ("train.learning_rate", "network.layers") if name in best} == {
        name: rows[0][name] for name in ("train.learning_rate", "network.layers") if rows[0][name] is not None
    }
    assert not list(folder.glob("trials/*/bundle"))
    # Trials share processes of Ray: what ran before in a process changes nothing.
    number = rows[0]["trial"]
    [searched] = [path for path in folder.glob("trials/*") if int(path.name) == number]
    options_of_best = expand_files([f"@{folder / 'best.yaml'}", f"data={fifty.path}", f"output={tmp_path / 'again'}"])
    again = Trial(0, tmp_path / "again", {}, options_of_best)
    again.run(lambda _: None)
    epochs = Trial(number, searched, {}, []).epochs()
    assert epochs
    assert again.epochs()[: len(epochs)] == epochs
    # All trials have ended, so nothing is started, not even Ray; two more trials leave the others unchanged.
    with mock.patch("trainer.ray_tune.run_trials", side_effect=AssertionError):
        assert main([*options, "trials=8"]) == 0
    before = {path: path.read_bytes() for path in folder.glob("trials/*/trial.json")}
    assert main([*options, "trials=10"]) == 0
    assert len(list(folder.glob("trials/*/trial.json"))) == 10
    assert {path: path.read_bytes() for path in before} == before
    assert main([*options, "trials=10", "seed=1"]) == 2
    assert "seed=0 as the search began with" in capfd.readouterr().err
    assert "http://" not in (folder / "trials.html").read_text().replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    assert json.loads((folder / "search.json").read_text())["model"] == "gru4rec"
