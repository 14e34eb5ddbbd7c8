"""Runs on Ray workers: killed, stopped, and the same bits in the end."""

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
"""So many that workers do not get to the end before they hear that their driver is gone."""


@dataclass(frozen=True)
class Head:
    """A running Ray: its first process, and the variables by which drivers find it and come in."""

    pid: int
    env: dict[str, str]


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    """One Ray of two cores for all drivers here that name it (`RAY_ADDRESS`)."""
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
    """`python -m trainer` on the shared Ray, or on one of its own that starts and ends with it."""
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
    """The same run in another folder, in its second epoch or later."""
    process = driver(fifty, run, head, *TWO_WORKERS, env=env)
    deadline = time.monotonic() + 300
    while latest_epoch(run) < 1:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    return process


def test_two_ray_workers_one_killed_end_with_the_bits_of_an_undisturbed_run(fifty, head, calm, tmp_path):
    """`kill -9` of a worker: Ray starts the group again, which goes on from the latest checkpoint."""
    process = started(fifty, tmp_path / "run", head)
    assert kill_one_worker(head.pid)
    assert not (tmp_path / "run" / "summary.json").exists()
    finish(process)
    assert_same_run(calm, tmp_path / "run")


@pytest.mark.parametrize("whom", ["driver", "all"])
def test_kill_9_of_the_driver_or_of_all_and_the_same_command_ends_with_the_same_bits(fifty, head, calm, tmp_path, whom):
    """A driver with a Ray of its own, which ends by itself when its driver is gone, and leaves no token at home."""
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
    for child in children:  # Ray's agents look for their parent once in a while
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    assert not (tmp_path / ".ray").exists()
    assert not (run / "summary.json").exists()
    finish(driver(fifty, run, head if whom == "driver" else None, *TWO_WORKERS))
    assert_same_run(calm, run)


def test_from_two_workers_to_one_each_sample_is_trained_on_once(fifty, head, calm, stopped, tmp_path):
    """Other sums, so other last bits: the parameters agree closely and the counts of targets exactly."""
    run = shutil.copytree(stopped, tmp_path / "run")
    fewer = [o for o in TWO_WORKERS if not o.startswith("ray.")] + ["ray.workers=1"]
    finish(driver(fifty, run, head, *fewer))
    left, right = (json.loads((path / "summary.json").read_text()) for path in (calm, run))
    assert left["steps"] == right["steps"]
    assert (left["workers"], right["workers"]) == (2, 1)
    progress = [read_progress(latest(path / "checkpoints")) for path in (calm, run)]
    assert progress[0].examples == progress[1].examples


def test_losses_that_are_not_finite_end_all_workers_with_one_plain_line(fifty, head, tmp_path):
    wild = ["ray.workers=2", "train.learning_rate=1e30", "train.epochs=2"]
    process = driver(fifty, tmp_path / "run", head, *wild, stderr=subprocess.PIPE, text=True)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("error: expected finite losses and gradients, got ")
    assert "Traceback" not in errors


def test_sigterm_stops_two_ray_workers_and_the_same_command_ends_with_the_same_bits(
    fifty, head, calm, stopped, tmp_path
):
    run = shutil.copytree(stopped, tmp_path / "run")
    finish(driver(fifty, run, head, *TWO_WORKERS))
    assert_same_run(calm, run)


def latest_epoch(run: Path) -> int:
    """Epochs that are done."""
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
