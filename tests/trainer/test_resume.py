"""Runs that end early and are resumed: killed, signalled, with a broken checkpoint, with other options."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import yaml

import trainer.loop
import trainer.run.checkpoint
import trainer.run.signals
from etl.runtime.errors import InputError
from tests.support.engine import build, write_log
from tests.support.runs import Killed, assert_same_run, killed_at_step, options, terminated_at_step
from trainer.__main__ import main
from trainer.prepare import prepare
from trainer.run.checkpoint import STATE, TENSORS, latest
from trainer.run.metrics_log import RunLog, read_metrics
from trainer.run.run_folder import RunFolder


def test_rerunning_a_finished_run_changes_nothing(fifty, undisturbed, capfd):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.name != "config.yaml"}
    assert main(options(fifty, undisturbed)) == 0
    assert "already finished" in capfd.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.name != "config.yaml"} == before


@pytest.mark.parametrize("at", [3, 8, 26, 41])
def test_run_killed_at_any_step_resumes_to_a_bit_identical_result(fifty, undisturbed, tmp_path, at):
    with killed_at_step(at):
        main(options(fifty, tmp_path / "run"))
    assert not (tmp_path / "run" / "summary.json").exists()
    assert main(options(fifty, tmp_path / "run")) == 0
    assert_same_run(undisturbed, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["name"] == "ndcg@20"] == [1, 2, 3]


def test_sigterm_saves_a_checkpoint_and_the_same_command_resumes(fifty, undisturbed, tmp_path, capfd):
    with terminated_at_step(12):
        main(options(fifty, tmp_path / "run", "train.checkpoint_steps=1000"))
    assert "stopped after step 16; the same command resumes from there\n" in capfd.readouterr().err
    assert latest(tmp_path / "run" / "checkpoints").name == "step-000000016"
    assert main(options(fifty, tmp_path / "run", "train.checkpoint_steps=1000")) == 0
    assert_same_run(undisturbed, tmp_path / "run")


def test_ctrl_c_exits_with_130_and_a_message_despite_another_handler(fifty, tmp_path, monkeypatch, capfd):
    def quiet(*arguments):
        signal.signal(signal.SIGINT, lambda *_: sys.exit(0))  # as Ray's handler does
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    def interrupted(*arguments):
        with trainer.run.signals.interrupted_plainly():
            quiet()

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("trainer.launch.train", interrupted)
    with pytest.raises(SystemExit) as left:
        main(options(fifty, tmp_path / "run"))
    assert left.value.code == 130
    assert "interrupted; the same command resumes from the last checkpoint\n" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_truncated_checkpoint_is_reported_and_the_previous_one_is_used(fifty, undisturbed, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for name in ("summary.json", "bundle"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    newest = latest(run / "checkpoints")
    data = (newest / TENSORS).read_bytes()
    (newest / TENSORS).write_bytes(data[: len(data) // 2])
    assert main(options(fifty, run)) == 0
    assert f"checkpoint {newest.name} is broken" in capfd.readouterr().err
    assert_same_run(undisturbed, run)


def test_adding_epochs_to_a_finished_run_equals_training_them_at_once(fifty, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "a")
    assert main(options(fifty, tmp_path / "a", "train.epochs=4")) == 0
    assert main(options(fifty, tmp_path / "b", "train.epochs=4")) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("where", ["trainer.training.step.TrainStep.step", "trainer.loop.export"])
def test_run_killed_while_adding_epochs_is_not_marked_finished(fifty, undisturbed, tmp_path, where):
    run, more = tmp_path / "run", options(fifty, tmp_path / "run", "train.epochs=4")
    shutil.copytree(undisturbed, run)
    with mock.patch(where, side_effect=Killed), pytest.raises(Killed):
        main(more)
    assert not (run / "summary.json").exists()
    assert main(more) == 0
    assert main(options(fifty, tmp_path / "at once", "train.epochs=4")) == 0
    assert_same_run(run, tmp_path / "at once")


@pytest.mark.parametrize(
    "wrong",
    [
        ["train.learning_rate=0.3"],
        ["seed=7"],
        ["tasks=[next]"],
        ["resume=never"],
        ["network.experts=4"],
    ],
)
def test_resume_with_changed_options_is_refused(fifty, undisturbed, wrong, capfd):
    assert main([*options(fifty, undisturbed), *wrong]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: expected ")
    assert err.count("\n") == 1


def test_resume_with_an_option_unknown_to_the_earlier_version_takes_its_default(fifty, undisturbed, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["network"]["task_embedding_dim"], config["train"]["hard_negatives"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(options(fifty, run, "train.hard_negatives=3")) == 2
    assert "expected train.hard_negatives=0 as the run began with, got 3 " in capfd.readouterr().err
    assert main(options(fifty, run, "train.epochs=4")) == 0
    assert main(options(fifty, tmp_path / "at once", "train.epochs=4")) == 0
    assert_same_run(run, tmp_path / "at once")


def test_resume_takes_the_former_behaviour_if_a_new_option_has_another_default(fifty, tmp_path, capfd):
    run = tmp_path / "run"
    line = options(fifty, run, "train.epochs=1", "network.item_features=[category]", "train.feature_rate=1")
    assert main(line) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["train"]["feature_rate"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(line[:-1]) == 2
    assert "expected train.feature_rate=1.0 as the run began with, got 0.2 " in capfd.readouterr().err
    assert main(line) == 0


def test_resume_from_a_checkpoint_with_other_networks_is_refused(fifty, undisturbed, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["network"]["feedback_actions"] = False
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(options(fifty, run, "network.feedback_actions=false", "train.epochs=4")) == 2
    assert "model.feedback_features.actions.weight is in the checkpoint only" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("trained", "continued", "problem"),
    [
        ("[category]", "[]", "table item_features is in the checkpoint only"),
        ("[]", "[category]", "table item_features is not in the checkpoint"),
    ],
)
def test_resume_from_a_checkpoint_with_other_tables_is_refused(fifty, tmp_path, capfd, trained, continued, problem):
    run, plain = tmp_path / "run", ("model=gru4rec", "train.ppmi_start=0")
    assert main(options(fifty, run, *plain, f"network.item_features={trained}", "train.epochs=1")) == 0
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["network"]["item_features"] = yaml.safe_load(continued)
    path.write_text(yaml.safe_dump(config))
    assert main(options(fifty, run, *plain, f"network.item_features={continued}", "train.epochs=2")) == 2
    assert problem in capfd.readouterr().err


def test_damaged_files_of_a_run_are_a_plain_error_or_written_again(fifty, undisturbed, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    metrics = (run / "metrics.jsonl").read_bytes()
    for summary, tail in (("null", b"5\n"), ("[]", b"\xff\xfe"), ("3", b"{}\n")):
        (run / "summary.json").write_text(summary)
        (run / "metrics.jsonl").write_bytes(metrics + tail)
        assert main(options(fifty, run)) == 0
        assert json.loads((run / "summary.json").read_text())["best_epoch"]
        assert len(read_metrics(run / "metrics.jsonl")) == len(metrics.splitlines())
    config = (run / "config.yaml").read_text()
    assert "  epochs: 3\n" in config
    (run / "config.yaml").write_text(config.replace("  epochs: 3\n", "  epochs: two\n"))
    capfd.readouterr()
    assert main(options(fifty, run)) == 2
    assert capfd.readouterr().err.startswith("error: expected the configuration of a run in ")


def test_resume_with_another_dataset_is_refused(undisturbed, tmp_path, capfd):
    rows = [(u, 1 + (u + i) % 12, 1, 0, i % 2, 0, "c", 1, 1, 1) for u in range(1, 9) for i in range(14)]
    other = build(
        [
            f"input={write_log(tmp_path / 'log.csv', rows)}",
            f"output={tmp_path / 'data'}",
            "scenario=qb_video",
            "shards=1",
        ]
    )
    assert main(options(other, undisturbed)) == 2
    assert "error: expected dataset=" in capfd.readouterr().err


def test_sigterm_stops_a_run_with_few_steps_an_epoch_after_the_epoch_and_leaves_no_request(fifty, tmp_path, capfd):
    few = ["train.batch_tokens=4096", "train.epochs=3"]
    with terminated_at_step(0):
        main(options(fifty, tmp_path / "run", *few))
    assert "stopped after step 1; the same command resumes from there\n" in capfd.readouterr().err
    assert latest(tmp_path / "run" / "checkpoints").name == "step-000000001"
    assert not (tmp_path / "run" / ".stop").exists()
    assert main(options(fifty, tmp_path / "run", *few)) == 0


def test_log_of_a_run_killed_between_the_last_step_and_the_end_of_an_epoch_has_each_line_once(tmp_path):
    """The checkpoint of the epoch's last step has its step number, but the epoch is validated again."""
    log = RunLog(tmp_path, 0, 0, refit=False)
    log.write(8, 1, "train", {"loss/next": 2.0})
    log.write(10, 1, "valid", {"ndcg@20": 0.1})
    log.write(10, 1, "train-epoch", {"loss/next": 2.0})
    log.close()
    again = RunLog(tmp_path, 10, 0, refit=False)
    assert [line["split"] for line in read_metrics(again.path)] == ["train"]
    again.write(10, 1, "valid", {"ndcg@20": 0.1})
    again.close()
    assert [line["split"] for line in read_metrics(RunLog(tmp_path, 10, 1, refit=False).path)] == ["train", "valid"]
    assert len(read_metrics(RunLog(tmp_path, 3, 0, refit=True).path)) == 2  # the refit keeps the lines of training


def test_kill_while_the_log_is_rewritten_loses_no_line(tmp_path, monkeypatch):
    log = RunLog(tmp_path, 0, 0, refit=False)
    for step in range(50, 500, 50):
        log.write(step, 1, "train", {"loss/next": 2.0})
    log.close()
    before, write = read_metrics(log.path), Path.write_text

    def killed(path, text, *more):
        write(path, text[: len(text) // 2], *more)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        RunLog(tmp_path, 400, 0, refit=False)
    assert read_metrics(log.path) == before
    assert len(before) == 9


def test_start_refused_while_the_run_is_trained_changes_nothing(fifty, undisturbed, tmp_path, monkeypatch, capfd):
    """The run that is trained has 4 epochs; the refused start asks for 5."""
    run, five = tmp_path / "run", options(fifty, tmp_path / "run", "train.epochs=5")
    shutil.copytree(undisturbed, run)
    monkeypatch.setattr("etl.runtime.locks.time", mock.Mock(monotonic=itertools.count(0, 100).__next__))

    def training(*arguments):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert main(five) == 2
        assert "expected an output that no other process is writing" in capfd.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        raise Killed

    with mock.patch("trainer.launch.train", training), pytest.raises(Killed):
        main(options(fifty, run, "train.epochs=4"))
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["epochs"] == 4
    assert main(five) == 0
    assert json.loads((run / "summary.json").read_text())["epochs"] == 5


def test_start_that_waited_for_a_run_compares_its_options_with_that_one(fifty, tmp_path):
    """Both see a fresh folder; the one that gets the lock first writes its configuration."""
    run = tmp_path / "new" / "run"
    locked = RunFolder.locked

    def second(self, **more):
        with mock.patch.object(RunFolder, "locked", locked):
            prepare(options(fifty, run))
        return locked(self, **more)

    with mock.patch.object(RunFolder, "locked", second), pytest.raises(InputError, match="seed=0 as the run began"):
        prepare(options(fifty, run, "seed=3"))
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 0


def lines_within(run):
    return [line for line in read_metrics(run / "metrics.jsonl") if line["split"] == "valid-within"]


@pytest.mark.parametrize("at", [9, 13, 29])
def test_killed_run_is_validated_within_epochs_at_the_same_steps(fifty, undisturbed, tmp_path, at):
    often = "train.validate_steps=4"
    assert main(options(fifty, tmp_path / "often", often)) == 0
    with killed_at_step(at):
        main(options(fifty, tmp_path / "killed", often))
    assert main(options(fifty, tmp_path / "killed", often)) == 0
    assert lines_within(tmp_path / "killed") == lines_within(tmp_path / "often") != []
    assert_same_run(undisturbed, tmp_path / "killed")


def test_checkpoint_of_a_version_that_did_not_save_the_first_step_of_the_epoch_is_read(fifty, undisturbed, tmp_path):
    with killed_at_step(8):
        main(options(fifty, tmp_path / "run"))
    path = latest(tmp_path / "run" / "checkpoints") / STATE
    state = json.loads(path.read_text())
    assert state["progress"].pop("first_step") == 0
    path.write_text(json.dumps(state))
    assert main(options(fifty, tmp_path / "run")) == 0
    assert_same_run(undisturbed, tmp_path / "run")
