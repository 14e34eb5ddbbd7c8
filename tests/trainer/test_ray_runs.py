"""Runs on Ray workers: killed or stopped, and bit-identical after resuming."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.local import free_ports, write_secret
from tests.support.hosts import BUSY, kill_family
from tests.support.runs import assert_same_run, options
from trainer.run.checkpoint import latest, read_progress

pytestmark = [pytest.mark.cluster]
TWO_WORKERS = ["ray.workers=2", "train.epochs=10", "train.early_stopping_patience=10"]
"""Enough epochs that workers do not finish before they notice that their driver is gone."""


@dataclass(frozen=True)
class Head:
    """A running Ray: its first process, and the variables with which drivers find it and authenticate."""

    pid: int
    env: dict[str, str]


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    """One Ray cluster of two cores, shared by all drivers here that set `RAY_ADDRESS`."""
    folder, (port, agent) = tmp_path_factory.mktemp("ray"), free_ports(2)
    log, token = folder / "head.log", folder / "token"
    write_secret(token, secrets.token_hex(32))
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    line = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"]
    line += ["--node-ip-address", "127.0.0.1", "--port", str(port), "--num-cpus", "2", "--include-dashboard", "false"]
    line += ["--dashboard-agent-listen-port", str(agent)]
    with log.open("w") as stream:
        process = subprocess.Popen(
            line, env=os.environ | BUSY | env, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 300
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield Head(process.pid, env | {"RAY_ADDRESS": f"127.0.0.1:{port}"})
    finally:
        kill_family(process.pid)


def driver(
    fifty, run: Path, head: Head | None, *more: str, env: dict[str, str] | None = None, **settings: object
) -> subprocess.Popen:
    """`python -m trainer` on the shared Ray, or on its own Ray that starts and ends with it."""
    env = os.environ | BUSY | (head.env if head else {}) | (env or {})
    return subprocess.Popen([sys.executable, "-m", "trainer", *options(fifty, run, *more)], env=env, **settings)


def finish(process: subprocess.Popen) -> None:
    assert process.wait(timeout=500) == 0


@pytest.fixture(scope="module")
def calm(fifty, head, tmp_path_factory) -> Path:
    """An undisturbed run of two Ray workers."""
    run = tmp_path_factory.mktemp("calm") / "run"
    finish(driver(fifty, run, head, *TWO_WORKERS))
    return run


@pytest.fixture(scope="module")
def stopped(fifty, head, tmp_path_factory) -> Path:
    """The same run, stopped by SIGTERM in its second epoch or later."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    process = started(fifty, run, head)
    process.terminate()
    assert process.wait(timeout=300) == 143
    assert not (run / "summary.json").exists()
    assert latest(run / "checkpoints")
    return run


def started(fifty, run: Path, head: Head | None, **env: str) -> subprocess.Popen:
    """Start the same run in another folder, and return when it is in its second epoch or later."""
    process = driver(fifty, run, head, *TWO_WORKERS, env=env)
    deadline = time.monotonic() + 300
    while latest_epoch(run) < 1:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    return process


def test_run_with_a_killed_ray_worker_is_bit_identical(fifty, head, calm, tmp_path):
    """`kill -9` of a worker: Ray restarts the worker group, which resumes from the latest checkpoint."""
    process = started(fifty, tmp_path / "run", head)
    assert kill_one_worker(head.pid)
    assert not (tmp_path / "run" / "summary.json").exists()
    finish(process)
    assert_same_run(calm, tmp_path / "run")


@pytest.mark.parametrize("whom", ["driver", "all"])
def test_run_resumes_bit_identical_after_kill_9_of_the_driver_or_all_processes(fifty, head, calm, tmp_path, whom):
    """A driver with its own Ray, which exits by itself when the driver is gone and leaves no token in HOME."""
    run = tmp_path / "run"
    process = started(fifty, run, None, HOME=str(tmp_path))
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]
    assert workers
    if whom == "all":
        kill_family(process.pid)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert not alive
    for child in children:  # Ray's agents check for their parent only periodically
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    assert not (tmp_path / ".ray").exists()
    assert not (run / "summary.json").exists()
    finish(driver(fifty, run, head if whom == "driver" else None, *TWO_WORKERS))
    assert_same_run(calm, run)


def test_resuming_with_fewer_workers_trains_on_each_sample_once(fifty, head, calm, stopped, tmp_path):
    """Sums in another order differ in rounding, so only the counts of targets agree exactly."""
    run = shutil.copytree(stopped, tmp_path / "run")
    fewer = [o for o in TWO_WORKERS if not o.startswith("ray.")] + ["ray.workers=1"]
    finish(driver(fifty, run, head, *fewer))
    left, right = (json.loads((path / "summary.json").read_text()) for path in (calm, run))
    assert left["steps"] == right["steps"]
    assert (left["workers"], right["workers"]) == (2, 1)
    progress = [read_progress(latest(path / "checkpoints")) for path in (calm, run)]
    assert progress[0].examples == progress[1].examples


def test_non_finite_losses_end_all_workers_with_a_one_line_error(fifty, head, tmp_path):
    wild = ["ray.workers=2", "train.learning_rate=1e30", "train.epochs=2"]
    process = driver(fifty, tmp_path / "run", head, *wild, stderr=subprocess.PIPE, text=True)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("error: expected finite losses and gradients, got ")
    assert "Traceback" not in errors


def test_run_on_two_ray_workers_resumes_bit_identical_after_sigterm(fifty, head, calm, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    finish(driver(fifty, run, head, *TWO_WORKERS))
    assert_same_run(calm, run)


def latest_epoch(run: Path) -> int:
    """Number of finished epochs."""
    try:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return 0
    return max((line["epoch"] for line in lines if line["split"] == "valid"), default=0)


def kill_one_worker(driver: int) -> bool:
    for process in psutil.Process(driver).children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            return True
    return False
