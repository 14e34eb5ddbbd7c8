"""Checkpoints on full and on slow disks."""

from __future__ import annotations

import errno
import os
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

import trainer.checkpoint
from tests.trainer.test_run import assert_same_run, options, undisturbed
from trainer.__main__ import main
from trainer.checkpoint import TENSORS

__all__ = ["undisturbed"]


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(fifty, undisturbed, tmp_path, monkeypatch, capfd):
    save, written = trainer.checkpoint.save_file, 0

    def full(tensors, path):
        nonlocal written
        written += 1
        if written in (2, 3):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path)

    monkeypatch.setattr(trainer.checkpoint, "save_file", full)
    assert main(options(fifty, tmp_path / "run")) == 0
    assert capfd.readouterr().err.count("warning: no room on the disk for a checkpoint") == 2
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert_same_run(undisturbed, tmp_path / "run")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_disk_that_is_really_full_ends_plainly_and_the_run_goes_on_elsewhere(fifty, undisturbed, tmp_path, capfd):
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=True)
    try:
        assert main(options(fifty, small / "run")) == 2
        err = capfd.readouterr().err.splitlines()[-1]
        assert err.startswith("error: expected ")
        assert not (small / "run" / "summary.json").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        assert main(options(fifty, small / "run")) == 0
        assert_same_run(undisturbed, small / "run")
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_checkpoint_is_of_the_step_it_names_though_training_went_on(fifty, undisturbed, tmp_path, monkeypatch):
    """A slow disk: every write ends after further steps have changed the parameters."""
    write = trainer.checkpoint.write

    def slow(*given, **more):
        time.sleep(0.2)
        write(*given, **more)

    monkeypatch.setattr(trainer.checkpoint, "write", slow)
    assert main(options(fifty, tmp_path / "run")) == 0
    assert_same_run(undisturbed, tmp_path / "run")
    for path in (undisturbed / "checkpoints").glob("step-*"):
        there = load_file(tmp_path / "run" / "checkpoints" / path.name / TENSORS)
        assert all(torch.equal(tensor, there[name]) for name, tensor in load_file(path / TENSORS).items())
