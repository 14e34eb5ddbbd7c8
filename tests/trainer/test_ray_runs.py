"""Runs on Ray workers: killed, stopped, and the same bits in the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.trainer.test_run import assert_same_run, options
from trainer.run.checkpoint import latest, read_progress

TWO_WORKERS = ["ray.workers=2", "train.epochs=12", "train.early_stopping_patience=12"]


@pytest.fixture(scope="module")
def calm(fifty, tmp_path_factory) -> Path:
    """An undisturbed run of two Ray workers."""
    run = tmp_path_factory.mktemp("calm") / "run"
    subprocess.run([sys.executable, "-m", "trainer", *options(fifty, run, *TWO_WORKERS)], check=True)
    return run


def started(fifty, run: Path) -> subprocess.Popen:
    """The same run in another folder, in its third epoch or later."""
    process = subprocess.Popen([sys.executable, "-m", "trainer", *options(fifty, run, *TWO_WORKERS)])
    deadline = time.monotonic() + 120
    while latest_epoch(run) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    return process


@pytest.mark.cluster
def test_two_ray_workers_one_killed_end_with_the_bits_of_an_undisturbed_run(fifty, calm, tmp_path):
    """`kill -9` of a worker: Ray starts the group again, which goes on from the latest checkpoint."""
    process = started(fifty, tmp_path / "run")
    assert kill_one_worker(process.pid)
    assert process.wait(timeout=300) == 0
    assert_same_run(calm, tmp_path / "run")


@pytest.mark.cluster
@pytest.mark.parametrize("whom", ["driver", "all"])
def test_kill_9_of_the_driver_or_of_all_and_the_same_command_ends_with_the_same_bits(fifty, calm, tmp_path, whom):
    run = tmp_path / "run"
    process = started(fifty, run)
    children = psutil.Process(process.pid).children(recursive=True)
    for victim in [psutil.Process(process.pid), *(children if whom == "all" else [])]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()
    psutil.wait_procs(children, timeout=60)  # without their driver Ray's processes end by themselves
    assert not (run / "summary.json").exists()
    subprocess.run([sys.executable, "-m", "trainer", *options(fifty, run, *TWO_WORKERS)], check=True)
    assert_same_run(calm, run)


@pytest.mark.cluster
def test_from_two_workers_to_one_each_sample_is_trained_on_once(fifty, calm, tmp_path):
    """Other sums, so other last bits: the parameters agree closely and the counts of targets exactly."""
    run = tmp_path / "run"
    process = started(fifty, run)
    process.terminate()
    assert process.wait(timeout=120) == 143
    fewer = [o for o in TWO_WORKERS if not o.startswith("ray.")] + ["ray.workers=[1,2]"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-m", "trainer", *options(fifty, run, *fewer)], check=True, env=env)
    left, right = (json.loads((path / "summary.json").read_text()) for path in (calm, run))
    assert left["steps"] == right["steps"]
    progress = [read_progress(latest(path / "checkpoints")) for path in (calm, run)]
    assert progress[0].examples == progress[1].examples


@pytest.mark.cluster
def test_losses_that_are_not_finite_end_all_workers_with_one_plain_line(fifty, tmp_path, capfd):
    wild = ["ray.workers=2", "train.learning_rate=1e30", "train.epochs=2"]
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *options(fifty, tmp_path / "run", *wild)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: expected finite losses and gradients, got ")
    assert "Traceback" not in done.stderr


@pytest.mark.cluster
def test_sigterm_stops_two_ray_workers_and_the_same_command_ends_with_the_same_bits(fifty, calm, tmp_path):
    process = started(fifty, tmp_path / "run")
    process.terminate()
    assert process.wait(timeout=120) == 143
    assert not (tmp_path / "run" / "summary.json").exists()
    assert latest(tmp_path / "run" / "checkpoints")
    subprocess.run([sys.executable, "-m", "trainer", *options(fifty, tmp_path / "run", *TWO_WORKERS)], check=True)
    assert_same_run(calm, tmp_path / "run")


def latest_epoch(run: Path) -> int:
    try:
        return max((json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()), default=0)
    except (OSError, ValueError):
        return 0


def kill_one_worker(driver: int) -> bool:
    for process in psutil.Process(driver).children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            return True
    return False
