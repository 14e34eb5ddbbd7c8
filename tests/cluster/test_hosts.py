"""Ray over three hosts, with a token: hosts killed, cut off and brought back."""

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
from tests.retrieval.test_query_files import split_files, without_times
from tests.support.hosts import ip, kill_family
from tests.support.readme_cluster import TRAINING
from tests.support.runs import assert_same_run
from trainer.__main__ import main as train
from trainer.run.checkpoint import latest

pytestmark = pytest.mark.cluster
SECOND_EPOCH = 25
"""A step of the second epoch of five."""


def finish(process: subprocess.Popen, seconds: float = 400) -> str:
    """The job's output, once it has ended well."""
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, out[-4000:]
    return out


def training(pipeline, run: Path, *more: str) -> list[str]:
    """The pipeline's own training, in another folder; a worker takes all cores of its host."""
    return [f"data={pipeline.data}", f"output={run}", "model=hybrid", *TRAINING, "ray.workers=2", "ray.cores=2", *more]


def in_the_middle(run: Path, process: subprocess.Popen, after: int = SECOND_EPOCH) -> int:
    """Return once a training has written a checkpoint of a step beyond `after`; the step, which is not the last."""
    deadline = time.monotonic() + 300
    while (step := latest_step(run)) <= after:
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return step


def latest_step(run: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*")), default=0)


def disturbed(run: Path, process: subprocess.Popen, disturb: Callable[[], None], after: int = SECOND_EPOCH) -> None:
    """Do something to a training that is under way, and be sure that it still was."""
    in_the_middle(run, process, after)
    disturb()
    assert not (run / "summary.json").exists()


def test_a_host_killed_and_started_again_changes_nothing(cluster, pipeline, tmp_path):
    process = cluster.submit("train", training(pipeline, tmp_path / "run"))
    disturbed(tmp_path / "run", process, lambda: cluster.hosts.kill(3))
    cluster.start(3, programs=("ray",))
    finish(process)
    assert_same_run(pipeline.run, tmp_path / "run")


def test_a_cable_pulled_for_twenty_seconds_ends_well_or_fails_clearly(cluster, pipeline, tmp_path):
    run = tmp_path / "run"
    process = cluster.submit("train", training(pipeline, run))
    disturbed(run, process, lambda: cluster.hosts.link(3, "down"))
    time.sleep(20)
    cluster.hosts.link(3, "up")
    out, _ = process.communicate(timeout=400)  # a hang would end here
    if cluster.ray_nodes() < 3:  # Ray may have given the host up meanwhile, which ends its processes
        cluster.hosts.kill(3)
        cluster.start(3, programs=("ray",))
    if process.returncode:
        assert process.returncode == 2, out[-4000:]
        finish(cluster.submit("train", training(pipeline, run)))
    assert_same_run(pipeline.run, run)


def test_workers_that_miss_each_other_though_the_head_sees_both_are_named(cluster, pipeline, tmp_path):
    hosts = cluster.hosts
    route = ["blackhole", f"{hosts.address(2)}/32"]
    ip("-n", hosts.space(3), "route", "add", *route)
    try:
        process = cluster.submit("train", training(pipeline, tmp_path / "run"))
        out, _ = process.communicate(timeout=300)
    finally:
        ip("-n", hosts.space(3), "route", "del", *route)
    assert process.returncode == 2, out[-4000:]
    # Neither hears of the other: the error names the worker of the lower rank first, which may be on either host.
    named = [f"got no connection from {hosts.address(a)} to {hosts.address(b)}" for a, b in ((2, 3), (3, 2))]
    errors = [f"error: expected training workers that reach one another, {missing}" for missing in named]
    assert any(error in out for error in errors), out[-4000:]


def test_a_host_that_never_returns_leaves_an_elastic_run_with_fewer_workers(cluster, pipeline, tmp_path):
    run = tmp_path / "run"
    # Ray may count with the lost host for 20 s, and gives up at the fourth start that fails.
    python = impatient(tmp_path, 20)
    process = cluster.submit("train", training(pipeline, run, "ray.workers=[1,2]"), python=python)
    disturbed(run, process, lambda: cluster.hosts.kill(3))
    finish(process)
    left, right = (json.loads((path / "summary.json").read_text()) for path in (pipeline.run, run))
    assert (left["steps"], right["workers"]) == (right["steps"], 1)


def impatient(folder: Path, seconds: int) -> str:
    """An interpreter under which Ray waits not a minute for workers that should start, but some seconds.

    The first start has no more, and a busy machine is slow to see that a host is lost: four times 8 s were too few.
    """
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nRAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S={seconds} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.fixture(scope="module")
def given_up(cluster, pipeline, tmp_path_factory) -> tuple[Path, int, str]:
    """A run of two workers whose second host died and stayed away: folder, exit status, output."""
    cluster.mend()  # this comes before what is done for each test
    folder = tmp_path_factory.mktemp("given-up")
    run = folder / "run"
    process = cluster.submit("train", training(pipeline, run), python=impatient(folder, 15))  # four times
    disturbed(run, process, lambda: cluster.hosts.kill(3))
    out, _ = process.communicate(timeout=300)
    return run, process.returncode, out


def test_a_host_that_never_returns_ends_a_run_of_fixed_size_in_an_error(given_up):
    run, status, out = given_up
    assert status == 2, out[-4000:]
    assert "error: expected a cluster that can start 2 workers" in out
    assert not (run / "summary.json").exists()


def test_evaluation_over_two_hosts_one_killed_is_that_of_one_process(cluster, tiny):
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


def test_the_head_killed_and_a_resubmission_resumes(cluster, pipeline, given_up):
    """The run that was given up goes on when it is submitted again, and once more after the head has died."""
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


def test_one_search_runs_its_trials_on_two_hosts(cluster, pipeline, tmp_path):
    shared = [option for option in TRAINING if not option.startswith("train.epochs")]
    search = tmp_path / "search"
    options = [f"data={pipeline.data}", f"output={search}", "model=gru4rec", "trials=6", "epochs=2", "scheduler=none"]
    # A trial takes all cores of its host, so that none has two.
    process = cluster.submit("tune", [*options, "cores=2", shlex.quote(f"options={shlex.join(shared)}")])
    out, seen = cluster.watched(process, "ray::ImplicitFunc")
    assert process.returncode == 0, out[-4000:]
    assert seen == {2, 3}
    table = pq.read_table(search / "trials.parquet").to_pylist()
    assert sorted(row["trial"] for row in table) == list(range(6))
    assert {row["state"] for row in table} == {"finished"}
    # The best one again, by the line that the search printed, on this machine.
    best = table[0]
    line = shlex.split(out.strip().splitlines()[-1])[3:]
    assert train([option.replace("output=RUN", f"output={tmp_path / 'run'}") for option in line]) == 0
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert again["best_epoch"] == best["best_epoch"]
    assert again["valid"]["ndcg@20"] == pytest.approx(best["valid/ndcg@20"], abs=1e-6)
