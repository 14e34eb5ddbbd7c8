"""Engines of the sessions job: same bytes from each, and failures of local workers."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import psutil
import pytest

import etl.sessions
from etl.config import EtlConfig, SparkOptions, load
from etl.dataset import Manifest, open_dataset
from etl.engines.engine import LOCAL_BYTES, runs_locally
from etl.engines.local import local_engine, partial_users
from etl.logs.splits import LogFile, Split
from etl.messages import QUARANTINE
from etl.runtime.errors import InputError
from etl.sessions import make_job
from etl.stages.task_files import Job, count_shards
from tests.etl.test_ctr_rows import ctr_log
from tests.support.logs import generated_log

ROOT = Path(__file__).parents[2]


def files_of(manifest: Manifest) -> list[tuple[str, str]]:
    return [(file.path, file.sha256) for file in manifest.files]


def test_compressed_log_in_many_blocks_that_arrive_in_any_order_gives_the_same_sessions(tmp_path, monkeypatch):
    log = generated_log(tmp_path / "log.csv", users=20, items=30, seed=3)
    lines = log.read_text().splitlines(keepends=True)
    lines[301:301] = ["1,x,1,0,0,0,0,1,1,1\n"]  # malformed
    log.write_text("".join(lines))
    (tmp_path / "log.gz").write_bytes(gzip.compress(log.read_bytes()))
    common = ["scenario=qb_video", "shards=2", "processes=1"]
    plain = etl.sessions.build(load([f"input={log}", f"output={tmp_path / 'a'}", *common]))
    monkeypatch.setattr("etl.logs.splits.BLOCK_BYTES", 2_000)
    monkeypatch.setattr("etl.engines.local.partial_users", lambda *of: reversed(list(partial_users(*of))))
    blocks = etl.sessions.build(load([f"input={tmp_path / 'log.gz'}", f"output={tmp_path / 'b'}", *common]))
    sessions = [[file for file in files_of(each) if file[0].startswith("sessions")] for each in (plain, blocks)]
    assert sessions[0] == sessions[1]
    bad = [json.loads((tmp_path / name / QUARANTINE).read_text()) for name in "ab"]
    assert bad[0]["byte_offset"] == bad[1]["byte_offset"] == len("".join(lines[:301]))


@pytest.mark.spark
@pytest.mark.parametrize("scenario", ["qb_video", "ctr"])
def test_one_process_two_processes_and_spark_give_the_same_bytes(spark, tmp_path, monkeypatch, scenario):
    monkeypatch.setattr("etl.sessions.SESSIONS_PER_SHARD", 10)
    log = tmp_path / "log.csv"
    if scenario == "ctr":
        ctr_log(log, rows=2_000, seed=1)
    else:
        generated_log(log, users=40, items=50, seed=3)
    engines = {
        "one": ["engine=local", "processes=1"],
        "two": ["engine=local", "processes=2"],
        "spark": ["engine=spark"],
    }
    arguments = [f"input={log}", f"scenario={scenario}", "split_bytes=15000"]
    options = [[*arguments, f"output={tmp_path / name}", *engine] for name, engine in engines.items()]
    manifests = [etl.sessions.build(load(line)) for line in options]
    assert {m.fingerprint for m in manifests} == {manifests[0].fingerprint}
    assert files_of(manifests[0]) == files_of(manifests[1]) == files_of(manifests[2])
    assert manifests[0].counts["rows_read"] > 1_000
    if scenario == "qb_video":  # item filters first count over all users: one more pass
        for line in options[1:]:
            etl.sessions.build(load([*line, "protocol.min_item_clicks=20", "overwrite=true"]))
        ours, theirs = (open_dataset(tmp_path / name).manifest for name in ("two", "spark"))
        assert files_of(ours) == files_of(theirs) != files_of(manifests[0])
        assert len(open_dataset(tmp_path / "two").session_files) == 4  # at most 40 sessions, 10 per file


@pytest.mark.parametrize(
    ("changes", "uri", "size", "local"),
    [
        ({}, "log.csv", LOCAL_BYTES, True),
        ({}, "log.csv", LOCAL_BYTES + 1, False),
        ({}, "log.csv.gz", LOCAL_BYTES // 2, False),
        ({"engine": "local"}, "log.csv", 1 << 40, True),
        ({"engine": "spark"}, "log.csv", 1, False),
        ({"spark": SparkOptions(master="local[2]")}, "log.csv", 1, False),
        ({"spark": SparkOptions(driver_memory="4g")}, "log.csv", 1, False),
    ],
)
def test_auto_engine_is_spark_for_large_logs_or_if_spark_is_configured(changes, uri, size, local, monkeypatch):
    config = EtlConfig(input=uri, output="out", scenario="qb_video", **changes)
    splits = [Split(0, LogFile(uri, size, (), 0, size, "gzip" if uri.endswith(".gz") else None), 0, size)]
    assert runs_locally(config, splits) is local
    monkeypatch.setenv("PYSPARK_GATEWAY_PORT", "1")  # started by spark-submit
    assert runs_locally(config, splits) is (config.engine == "local")


@pytest.mark.parametrize(("rows", "shards"), [(0, 1), (40, 1), (4_096, 1), (4_097, 2), (1 << 30, 64)])
def test_shard_count_follows_from_the_number_of_sessions(rows, shards):
    assert count_shards(rows, 4_096) == shards


def job_in(folder: Path) -> Job:
    return make_job(EtlConfig(input="log.csv", output="out", scenario="qb_video"), folder, log_bytes=1)


def die(number: int) -> int:
    if number:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def refuse(number: int) -> int:
    raise InputError("a thing", f"another {number}", "change it")


def test_worker_error_is_reraised_and_a_killed_worker_is_one_plain_error(tmp_path):
    job = job_in(tmp_path)
    with (
        pytest.raises(InputError, match=r"expected a thing, got another 0 \(change it\)"),
        local_engine(job, 4, 2) as two,
    ):
        two.map(refuse, 4)
    message = "2 worker processes until the job's end, got one that was killed"
    with pytest.raises(InputError, match=message), local_engine(job, 4, 2) as two:
        two.map(die, 4)
    assert not active_children()


def test_workers_exit_if_their_parent_is_killed_and_a_rerun_succeeds(tmp_path):
    log = generated_log(tmp_path / "log.csv", users=200, items=90, seed=6)
    options = [f"input={log}", f"output={tmp_path / 'out'}", "scenario=qb_video", "processes=2", "split_bytes=50000"]
    line = [sys.executable, "-m", "etl", *options]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(line, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / ".out.building").glob("_work/splits/*.json")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)  # so that it starts nothing between listing and killing
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 3  # two workers, and multiprocessing's resource tracker
    process.kill()
    process.wait(20)
    psutil.wait_procs(workers, timeout=20)
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
    assert not (tmp_path / "out").exists()
    subprocess.run(line, env=env, check=True, capture_output=True)
    assert open_dataset(tmp_path / "out").manifest.counts["sessions"] == 200
    assert not (tmp_path / ".out.building").exists()


@pytest.mark.spark
def test_etl_modules_do_not_shadow_the_standard_library(spark):
    """Spark workers and other subprocesses have the parent folder of `etl` on their path, and not `etl` itself."""
    code = "import statistics, etl.statistics; print(statistics.fmean([1.0, 2.0]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("1.5\n", "")

    def mean(rows):
        import statistics

        return [statistics.fmean(rows)]

    assert spark.sparkContext.parallelize([1.0, 2.0], 1).mapPartitions(mean).collect() == [1.5]
