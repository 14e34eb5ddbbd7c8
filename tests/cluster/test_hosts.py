"""Ray over three hosts, with a token: hosts killed, disconnected and restarted."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from retrieval.config import load
from retrieval.evaluate import evaluate
from tests.retrieval.test_parts import split_files, without_times
from tests.support.hosts import ip, kill_family
from tests.support.readme_cluster import TRAINING
from tests.support.runs import assert_same_run
from trainer.__main__ import main as train
from trainer.run.checkpoint import latest

pytestmark = pytest.mark.cluster
SECOND_EPOCH = 25
"""A step of the second epoch of five."""


def finish(process: subprocess.Popen, seconds: float = 400) -> str:
    """Output of the job after it has succeeded."""
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, out[-4000:]
    return out


def training(pipeline, run: Path, *more: str) -> list[str]:
    """The training of the pipeline, in another folder; a worker takes all cores of its host."""
    return [f"data={pipeline.data}", f"output={run}", "model=hybrid", *TRAINING, "ray.workers=2", "ray.cores=2", *more]


def in_the_middle(run: Path, process: subprocess.Popen, after: int = SECOND_EPOCH) -> int:
    """Wait until a training has written a checkpoint of a step beyond `after`, and return the step."""
    deadline = time.monotonic() + 300
    while (step := latest_step(run)) <= after:
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return step


def latest_step(run: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*")), default=0)


def disturbed(run: Path, process: subprocess.Popen, disturb: Callable[[], None], after: int = SECOND_EPOCH) -> None:
    """Call `disturb` during a training, and check that the training had not finished."""
    in_the_middle(run, process, after)
    disturb()
    assert not (run / "summary.json").exists()


def test_run_with_a_host_killed_and_restarted_equals_the_undisturbed_run(cluster, pipeline, tmp_path):
    process = cluster.submit("train", training(pipeline, tmp_path / "run"))
    disturbed(tmp_path / "run", process, lambda: cluster.hosts.kill(3))
    cluster.start(3, programs=("ray",))
    finish(process)
    assert_same_run(pipeline.run, tmp_path / "run")


def test_network_partition_of_20_seconds_is_survived_or_fails_with_exit_status_2(cluster, pipeline, tmp_path):
    run = tmp_path / "run"
    process = cluster.submit("train", training(pipeline, run))
    disturbed(run, process, lambda: cluster.hosts.link(3, "down"))
    time.sleep(20)
    cluster.hosts.link(3, "up")
    out, _ = process.communicate(timeout=400)  # a hang fails here
    if cluster.ray_nodes() < 3:  # Ray may have declared the host dead, which ends its processes
        cluster.hosts.kill(3)
        cluster.start(3, programs=("ray",))
    if process.returncode:
        assert process.returncode == 2, out[-4000:]
        finish(cluster.submit("train", training(pipeline, run)))
    assert_same_run(pipeline.run, run)


def test_workers_that_cannot_reach_each_other_are_reported_with_addresses(cluster, pipeline, tmp_path):
    hosts = cluster.hosts
    route = ["blackhole", f"{hosts.address(2)}/32"]
    ip("-n", hosts.space(3), "route", "add", *route)
    try:
        process = cluster.submit("train", training(pipeline, tmp_path / "run"))
        out, _ = process.communicate(timeout=300)
    finally:
        ip("-n", hosts.space(3), "route", "del", *route)
    assert process.returncode == 2, out[-4000:]
    # Neither reaches the other: the error names the worker of lower rank first, which may be on either host.
    named = [f"got no connection from {hosts.address(a)} to {hosts.address(b)}" for a, b in ((2, 3), (3, 2))]
    errors = [f"error: expected training workers that reach one another, {missing}" for missing in named]
    assert any(error in out for error in errors), out[-4000:]


def test_elastic_run_continues_with_fewer_workers_after_losing_a_host(cluster, pipeline, tmp_path):
    run = tmp_path / "run"
    # Ray may count on the lost host for 20 s, and gives up after four failed starts.
    python = impatient(tmp_path, 20)
    process = cluster.submit("train", training(pipeline, run, "ray.workers=[1,2]"), python=python)
    disturbed(run, process, lambda: cluster.hosts.kill(3))
    finish(process)
    left, right = (json.loads((path / "summary.json").read_text()) for path in (pipeline.run, run))
    assert (left["steps"], right["workers"]) == (right["steps"], 1)


def impatient(folder: Path, seconds: int) -> str:
    """An interpreter under which Ray waits `seconds` instead of a minute for workers to start.

    A busy machine is slow to notice that a host is lost: four times 8 s were too few.
    """
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nRAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S={seconds} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.fixture(scope="module")
def given_up(cluster, pipeline, tmp_path_factory) -> tuple[Path, int, str]:
    """A run of two workers whose second host was killed and not restarted: folder, exit status, output."""
    cluster.mend()  # module fixtures run before the per-test one
    folder = tmp_path_factory.mktemp("given-up")
    run = folder / "run"
    process = cluster.submit("train", training(pipeline, run), python=impatient(folder, 15))  # four times
    disturbed(run, process, lambda: cluster.hosts.kill(3))
    out, _ = process.communicate(timeout=300)
    return run, process.returncode, out


def test_run_of_fixed_size_fails_after_losing_a_host(given_up):
    run, status, out = given_up
    assert status == 2, out[-4000:]
    assert "error: expected a cluster that can start 2 workers" in out
    assert not (run / "summary.json").exists()


def test_evaluation_on_two_hosts_with_one_killed_equals_a_single_process(cluster, tiny):
    split_files(tiny, rows=1)
    options = [f"bundle={tiny / 'bundle'}", f"data={tiny / 'data'}", "cutoffs=[1,2,5]", "index=ivf_flat"]
    options.append("part_queries=1")
    alone = evaluate(load([*options, f"output={tiny / 'alone'}"]))
    process = cluster.submit("evaluate", [*options, f"output={tiny / 'many'}"])
    deadline = time.monotonic() + 120
    while not list(tiny.glob(".many.parts/*/valid-*")):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    cluster.hosts.kill(2)
    assert not (tiny / "many" / "metrics.json").exists()
    finish(process)
    actual = json.loads((tiny / "many" / "metrics.json").read_text())
    assert without_times(actual) == json.loads(json.dumps(without_times(alone)))
    for name in ("ranks.parquet", "topk.parquet"):
        assert pq.read_table(tiny / "many" / name).equals(pq.read_table(tiny / "alone" / name))


def test_resubmitted_run_resumes_after_the_head_was_killed(cluster, pipeline, given_up):
    """The failed run resumes when it is submitted again, and once more after the head was killed."""
    run, _, _ = given_up
    before = latest_step(run)
    assert before
    process = cluster.submit("train", training(pipeline, run))
    disturbed(run, process, lambda: cluster.kill("ray", 1, 2, 3), after=before)
    kill_family(process.pid)
    assert latest(run / "checkpoints")
    cluster.start(1, 2, 3, programs=("ray",))
    finish(cluster.submit("train", training(pipeline, run)))
    assert_same_run(pipeline.run, run)


def test_hyperparameter_search_runs_trials_on_two_hosts(cluster, pipeline, tmp_path):
    shared = [option for option in TRAINING if not option.startswith("train.epochs")]
    search = tmp_path / "search"
    options = [f"data={pipeline.data}", f"output={search}", "model=gru4rec", "trials=6", "epochs=2", "scheduler=none"]
    # A trial takes all cores of its host, so no host runs two at once.
    process = cluster.submit("tune", [*options, "cores=2", shlex.quote(f"options={shlex.join(shared)}")])
    out, seen = cluster.watched(process, "ray::ImplicitFunc")
    assert process.returncode == 0, out[-4000:]
    assert seen == {2, 3}
    table = pq.read_table(search / "trials.parquet").to_pylist()
    assert sorted(row["trial"] for row in table) == list(range(6))
    assert {row["state"] for row in table} == {"finished"}
    # Train the best trial again on this machine, with the command that the search printed.
    best = table[0]
    line = shlex.split(out.strip().splitlines()[-1])[3:]
    assert train([option.replace("output=RUN", f"output={tmp_path / 'run'}") for option in line]) == 0
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert again["best_epoch"] == best["best_epoch"]
    assert again["valid"]["ndcg@20"] == pytest.approx(best["valid/ndcg@20"], abs=1e-6)
