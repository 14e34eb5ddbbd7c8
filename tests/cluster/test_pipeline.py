"""All three programs in a row, as processes, on fifty generated users; killed and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from tests.support.logs import generated_log

SMALL = (
    'pipeline.trainer="network.dimension=8 network.hidden=8 network.experts=2 network.tower=8 train.batch_tokens=64 '
    'train.negatives=20 train.epochs=6 train.patience=6 train.checkpoint_steps=5 ray.workers=0"'
)


def command(tmp_path, name):
    return [
        sys.executable,
        "-m",
        "cluster",
        f"pipeline.input={tmp_path / 'log.csv'}",
        f"pipeline.work={tmp_path / name}",
        'pipeline.etl="shards=2"',
        "pipeline.models=[hybrid]",
        SMALL,
    ]


def result(tmp_path, name):
    metrics = json.loads((tmp_path / name / "hybrid-result" / "metrics.json").read_text())
    return {split: {k: v for k, v in metrics[split].items() if k != "ranking_seconds"} for split in ("valid", "test")}


@pytest.mark.spark
@pytest.mark.cluster
def test_the_chain_runs_skips_what_is_whole_and_survives_kill_9_in_every_step(spark, tmp_path):
    generated_log(tmp_path / "log.csv", users=50, items=60, seed=1)
    first = subprocess.run(command(tmp_path, "calm"), capture_output=True, text=True, check=True)
    for step in ("sessions", "train hybrid", "evaluate hybrid"):
        assert f"{step}: " in first.stdout
        assert "GiB at most" in first.stdout
    assert "popularity" in first.stdout
    again = subprocess.run(command(tmp_path, "calm"), capture_output=True, text=True, check=True)
    assert again.stdout.count("already done") == 3
    for program, seconds in (("etl", 4.0), ("trainer", 4.0), ("retrieval", 0.7)):
        kill_during(command(tmp_path, "killed"), program, seconds)
    last = subprocess.run(command(tmp_path, "killed"), capture_output=True, text=True, check=True)
    assert "report of hybrid" in last.stdout
    assert result(tmp_path, "killed") == result(tmp_path, "calm")


def kill_during(line: list[str], program: str, seconds: float) -> None:
    """Start a pipeline, let a program work for some seconds, and kill the pipeline with SIGKILL."""
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    child = None
    while child is None:
        assert time.monotonic() < deadline
        if process.poll() is not None:
            return  # it was done before the program could be met
        with suppress(psutil.Error):  # a step may end while it is looked at
            child = next((c for c in psutil.Process(process.pid).children() if program in c.cmdline()), None)
        time.sleep(0.02)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(200):
        if not child.is_running() or child.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    pytest.fail(f"{program} outlived its pipeline")


def test_changed_options_run_anew_and_keep_the_former_output_once(tmp_path):
    from cluster.steps import Step, run_step

    log = tmp_path / "out"

    def step(*more):
        return Step("write", ["tests.support.touch", str(log), *more], log, [], lambda p: p.is_file())

    run_step(step("a"), tmp_path / "steps")
    assert log.read_text() == "a"
    stamp = log.stat().st_mtime_ns
    run_step(step("a"), tmp_path / "steps")
    assert log.stat().st_mtime_ns == stamp
    run_step(step("b"), tmp_path / "steps")
    assert log.read_text() == "b"
    assert (tmp_path / "out.previous").read_text() == "a"


@pytest.mark.parametrize(
    "wrong", [["pipeline=none"], ["nosuch=1"], ["pipeline.models=[]"], ["pipeline.input=/no/file"]]
)
def test_wrong_options_end_with_a_plain_line(tmp_path, wrong):
    done = subprocess.run(
        [sys.executable, "-m", "cluster", f"pipeline.work={tmp_path / 'work'}", *wrong],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: expected " in done.stderr
    assert "Traceback" not in done.stderr
