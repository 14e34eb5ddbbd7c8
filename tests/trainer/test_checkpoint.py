"""Checkpoints on full and on slow disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

import trainer.run.checkpoint
from tests.support.mounts import resize, small_disk
from tests.support.runs import assert_same_run, options
from trainer.__main__ import main
from trainer.run.checkpoint import STATE, TENSORS, latest
from trainer.run.progress import Progress
from trainer.show import main as show


def test_full_disk_skips_a_checkpoint_and_the_run_continues(fifty, undisturbed, tmp_path, monkeypatch, capfd):
    save, written = trainer.run.checkpoint.save_file, 0

    def full(tensors, path):
        nonlocal written
        written += 1
        if written in (2, 3):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path)

    monkeypatch.setattr(trainer.run.checkpoint, "save_file", full)
    assert main(options(fifty, tmp_path / "run")) == 0
    assert capfd.readouterr().err.count("warning: no room on the disk for a checkpoint") == 2
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert_same_run(undisturbed, tmp_path / "run")


def test_permanently_full_disk_is_a_plain_error_and_the_run_can_be_resumed(fifty, undisturbed, tmp_path, capfd):
    with small_disk(tmp_path / "small", "64k") as small:
        assert main(options(fifty, small / "run")) == 2
        err = capfd.readouterr().err.splitlines()[-1]
        assert err.startswith("error: expected ")
        assert not (small / "run" / "summary.json").exists()
        resize(small, "64m")
        assert main(options(fifty, small / "run")) == 0
        assert_same_run(undisturbed, small / "run")


def test_checkpoint_holds_its_step_even_if_written_slowly(fifty, undisturbed, tmp_path, monkeypatch):
    """A slow disk: every write finishes after later steps have changed the parameters."""
    write = trainer.run.checkpoint.write

    def slow(*arguments, **more):
        time.sleep(0.2)
        write(*arguments, **more)

    monkeypatch.setattr(trainer.run.checkpoint, "write", slow)
    assert main(options(fifty, tmp_path / "run")) == 0
    assert_same_run(undisturbed, tmp_path / "run")
    for path in (undisturbed / "checkpoints").glob("step-*"):
        there = load_file(tmp_path / "run" / "checkpoints" / path.name / TENSORS)
        assert all(torch.equal(tensor, there[name]) for name, tensor in load_file(path / TENSORS).items())


def test_damaged_best_checkpoint_is_reported_and_nothing_is_exported(fifty, undisturbed, tmp_path, capfd):
    """64 bytes of its tensors are changed; the latest checkpoint, of a later epoch, is intact."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    newest = latest(run / "checkpoints")
    state = json.loads((newest / STATE).read_text())
    best = run / "checkpoints" / "step-000000001"
    shutil.copytree(newest, best)
    state["progress"] |= {"best_step": 1, "best_epoch": 1}
    (newest / STATE).write_text(json.dumps(state))
    data = bytearray((best / TENSORS).read_bytes())
    data[-64:] = bytes(64)
    (best / TENSORS).write_bytes(bytes(data))
    (run / "summary.json").unlink()
    shutil.rmtree(run / "bundle")
    assert main(options(fifty, run)) == 2
    err = capfd.readouterr().err
    assert "error: expected the checkpoint of the best epoch, step-000000001, as it was written, got its tensors" in err
    assert not (run / "bundle").exists()
    shutil.copy(undisturbed / "summary.json", run)
    assert show([f"run={run}"]) == 2
    assert "error: expected the checkpoint of the best epoch" in capfd.readouterr().err


def test_best_epoch_whose_checkpoint_a_full_disk_has_lost_is_replaced_by_the_best_on_the_disk(
    fifty, undisturbed, tmp_path, monkeypatch, capfd
):
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    scores = {line["epoch"]: line["value"] for line in lines if line["name"] == "ndcg@20"}
    best, second, _ = sorted(scores, key=lambda epoch: -scores[epoch])
    write = trainer.run.checkpoint.write

    def full(folder, tensors, progress, **more):
        if progress.epoch == best and progress.sample == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(folder, tensors, progress, **more)

    monkeypatch.setattr(trainer.run.checkpoint, "write", full)
    run = tmp_path / "run"
    assert main(options(fifty, run, "train.keep_checkpoints=9")) == 0
    err = capfd.readouterr().err
    assert f"warning: the checkpoint of the best epoch, {best}, is lost: taking epoch {second}\n" in err
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["best_epoch"], summary["valid"]["ndcg@20"]) == (second, pytest.approx(scores[second], abs=1e-6))
    assert show([f"run={run}"]) == 0  # opens the run from its checkpoints
    assert main(options(fifty, run, "train.keep_checkpoints=9")) == 0
    assert "already finished" in capfd.readouterr().out


def test_best_epoch_lost_before_a_restart_is_replaced_by_the_best_on_the_disk(fifty, undisturbed, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    newest = latest(run / "checkpoints")
    state = json.loads((newest / STATE).read_text())
    state["progress"] |= {"best_epoch": 1, "best_step": 1, "best_score": 0.9}
    (newest / STATE).write_text(json.dumps(state))
    (run / "summary.json").unlink()
    shutil.rmtree(run / "bundle")
    assert main(options(fifty, run)) == 0
    best = json.loads((undisturbed / "summary.json").read_text())["best_epoch"]
    assert f"warning: the checkpoint of the best epoch, 1, is lost: taking epoch {best}\n" in capfd.readouterr().err
    assert json.loads((run / "summary.json").read_text())["best_epoch"] == best
    assert_same_run(undisturbed, run)


def written(folder, *states, keep=1):
    """Steps of the checkpoints left after writing those of some progress."""
    for progress in states:
        trainer.run.checkpoint.write(folder, {"x": torch.zeros(1)}, progress, keep=keep)
    return [int(path.name.removeprefix("step-")) for path in sorted(folder.iterdir())]


def test_best_checkpoint_left_is_kept_while_that_of_the_best_epoch_is_lost(tmp_path):
    lost = {"best_epoch": 2, "best_step": 20, "best_score": 0.9}
    third = Progress(step=30, epoch=3, score=0.5, **lost)
    assert written(tmp_path, third) == [30]
    within = Progress(step=35, epoch=3, sample=5, score=0.5, **lost)
    assert written(tmp_path, within, Progress(step=40, epoch=4, score=0.2, **lost)) == [30, 40]
    (tmp_path / "step-000000040" / STATE).write_text("half")
    assert written(tmp_path, Progress(step=50, epoch=5, score=0.3, **lost), keep=2) == [30, 40, 50]
    sixth = Progress(step=60, epoch=6, score=0.95, best_epoch=6, best_step=60, best_score=0.95)
    assert written(tmp_path, sixth) == [60]
    assert written(tmp_path / "refit", *(Progress(step=step, epoch=step) for step in range(1, 5)), keep=2) == [3, 4]


def test_damaged_checkpoint_of_a_later_step_does_not_displace_a_new_one(tmp_path):
    assert written(tmp_path, Progress(step=10), Progress(step=20, best_step=10)) == [10, 20]
    (tmp_path / "step-000000020" / TENSORS).write_bytes(b"half")
    assert written(tmp_path, Progress(step=15, sample=5, best_step=10)) == [10, 15]
