"""The pipeline of all three programs, as processes, on fifty generated users; killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from etl.engines.java import OLDEST_JAVA, java_version
from tests.support.logs import generated_log

SMALL = (
    'pipeline.trainer="network.embedding_dim=8 network.hidden_size=8 network.experts=2 network.tower=8 '
    "train.batch_tokens=64 train.negatives=20 train.epochs=4 train.early_stopping_patience=4 "
    'train.checkpoint_steps=5 ray.workers=0"'
)


def command(tmp_path, name, engine="local"):
    return [
        sys.executable,
        "-m",
        "cluster",
        f"pipeline.input={tmp_path / 'log.csv'}",
        f"pipeline.work={tmp_path / name}",
        f'pipeline.etl="shards=2 split_bytes=20000 engine={engine}"',
        "pipeline.models=[hybrid]",
        SMALL,
    ]


def result(tmp_path, name):
    metrics = json.loads((tmp_path / name / "hybrid-result" / "metrics.json").read_text())
    return {split: {k: v for k, v in metrics[split].items() if k != "ranking_seconds"} for split in ("valid", "test")}


@pytest.mark.spark
@pytest.mark.cluster
@pytest.mark.skipif((java_version() or 0) < OLDEST_JAVA, reason=f"needs Java {OLDEST_JAVA} or newer")
def test_pipeline_skips_complete_steps_and_survives_kill_9_in_every_step(tmp_path):
    generated_log(tmp_path / "log.csv", users=50, items=60, seed=1)
    first = subprocess.run(command(tmp_path, "calm"), capture_output=True, text=True, check=True)
    for step in ("sessions", "train hybrid", "evaluate hybrid"):
        assert f"{step}: " in first.stdout
        assert "GiB at most" in first.stdout
    assert "popularity" in first.stdout
    again = subprocess.run(command(tmp_path, "calm"), capture_output=True, text=True, check=True)
    assert again.stdout.count("already done") == 3
    work = tmp_path / "killed"
    for program, under_way, whole in (
        ("etl", ".data.building/_work/splits/0*.json", "data/manifest.json"),
        ("trainer", "hybrid/checkpoints/step-*", "hybrid/summary.json"),
        ("retrieval", ".hybrid-result.parts/*/valid-*", "hybrid-result/metrics.json"),
    ):
        kill_during(command(tmp_path, "killed", "spark"), program, lambda p=under_way: any(work.glob(p)))
        assert not (work / whole).exists(), f"{program} was done before it could be killed"
    last = subprocess.run(command(tmp_path, "killed", "spark"), capture_output=True, text=True, check=True)
    assert last.stdout.count("already done") == 2  # sessions and training, finished by later attempts
    assert "report of hybrid" in last.stdout
    assert result(tmp_path, "killed") == result(tmp_path, "calm")


def kill_during(line: list[str], program: str, under_way: Callable[[], bool]) -> None:
    """Start a pipeline, and send SIGKILL as soon as a program has done part of its work."""
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not under_way():
        assert time.monotonic() < deadline
        assert process.poll() is None, f"the pipeline ended before {program} was under way"
        time.sleep(0.01)
    (child,) = [c for c in psutil.Process(process.pid).children() if program in c.cmdline()]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(200):
        if not child.is_running() or child.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    pytest.fail(f"{program} outlived its pipeline")


@pytest.mark.parametrize(
    "wrong",
    [
        ["pipeline=none"],
        ["nosuch=1"],
        ["pipeline.models=[]"],
        ["pipeline.input=/no/file"],
        ["pipeline=qk_video"],
        ["pipeline.models=[data model=gru4rec]"],
        ["pipeline.models=[g model=gru4rec,g model=hybrid]"],
        ["pipeline.models=[g model=gru4rec,g-result model=hybrid]"],
        ["pipeline.work=s3://bucket/work"],
        ["pipeline.trainer=tasks='[next"],
        ["pipeline.models=[g 'model=gru4rec]"],
    ],
)
def test_invalid_options_fail_with_a_plain_error(tmp_path, wrong):
    done = subprocess.run(
        [sys.executable, "-m", "cluster", f"pipeline.work={tmp_path / 'work'}", *wrong],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: expected " in done.stderr
    assert "Traceback" not in done.stderr
