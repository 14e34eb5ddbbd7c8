"""The job on a standalone cluster of two workers: the same bytes, also when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from etl.java import OLDEST_JAVA, java_version
from etl.spark import jvm_memory
from tests.etl.test_sessions import Options, check, command
from tests.support.logs import generated_log
from tests.support.reference import sessionize

pytestmark = [
    pytest.mark.spark,
    pytest.mark.cluster,
    pytest.mark.skipif((java_version() or 0) < OLDEST_JAVA, reason=f"needs Java {OLDEST_JAVA} or newer"),
]
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def standalone(tmp_path):
    """Master URL and the two workers' processes, each leader of a group that holds its executors."""
    import pyspark

    home = Path(pyspark.__file__).parent
    port = free_port()
    url = f"spark://127.0.0.1:{port}"
    started = []

    def start(name: str, *args: str) -> subprocess.Popen:
        env = os.environ | {"SPARK_HOME": str(home), "SPARK_LOCAL_DIRS": str(tmp_path / name)}
        with (tmp_path / f"{name}.log").open("w") as log:
            run = [str(home / "bin" / "spark-class"), *args]
            started.append(subprocess.Popen(run, env=env, stdout=log, stderr=log, start_new_session=True))
        return started[-1]

    def wait_for(name: str, text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in (tmp_path / f"{name}.log").read_text():
            assert time.monotonic() < deadline, (tmp_path / f"{name}.log").read_text()
            time.sleep(0.2)

    master = "org.apache.spark.deploy.master.Master"
    start("master", master, "--host", "127.0.0.1", "--port", str(port), "--webui-port", "0")
    wait_for("master", "Starting Spark master")
    workers = []
    for name in ("one", "two"):
        options = ["--host", "127.0.0.1", "-c", "1", "-m", "1g", "--webui-port", "0", "-d", str(tmp_path / name)]
        workers.append(start(name, "org.apache.spark.deploy.worker.Worker", *options, url))
    for name in ("one", "two"):
        wait_for(name, "Successfully registered")
    yield url, workers
    for process in started:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """End a process with all that it started."""
    import psutil

    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait(20)


def etl(*options: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "etl", *options]
    return subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_twin(output: Path, **options: int | str) -> None:
    line = [sys.executable, "-m", "etl.twin", f"output={output}", *(f"{k}={v}" for k, v in options.items())]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True)


def hashes(folder: Path) -> list[tuple[str, str]]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return [(f["path"], f["sha256"]) for f in manifest["files"]]


@pytest.mark.parametrize("scenario", ["qb_video", "qk_article", "qb_article"])
def test_one_thread_two_threads_and_a_cluster_give_the_bytes_of_the_slow_sessionizer(standalone, tmp_path, scenario):
    from etl.contract import open_dataset

    url, _ = standalone
    log = tmp_path / "log.csv"
    run_twin(log, scenario=scenario, users=60, seed=4)
    text = log.read_text()
    options = Options(min_clicks=5, max_clicks=12)
    results = []
    for name, master in (("a", "local[1]"), ("b", "local[2]"), ("c", url)):
        (tmp_path / name).mkdir()
        more = [f'spark.master="{master}"', "spark.executor_memory=512m"]
        line = command(tmp_path / name, [text], options, *more, scenario=scenario)
        process = etl(*line)
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        results.append(hashes(tmp_path / name / "out"))
        check(open_dataset(tmp_path / name / "out"), sessionize([text], options))
    assert results[0] == results[1] == results[2]


def test_a_worker_killed_in_the_middle_costs_time_only(standalone, tmp_path):
    url, workers = standalone
    log = tmp_path / "log.csv"
    run_twin(log, scenario="qk_video", users=60_000, seed=1)
    options = [f"input={log}", "scenario=qk_video", "shards=4", "spark.executor_memory=512m"]
    undisturbed = etl(*options, f"output={tmp_path / 'a'}", 'spark.master="local[2]"')
    assert undisturbed.wait(240) == 0
    process = etl(*options, f"output={tmp_path / 'b'}", f'spark.master="{url}"')
    first = tmp_path / ".b.building" / "_work" / "splits"
    deadline = time.monotonic() + 120
    while not list(first.glob("[0-9]*.json")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill(workers[0])
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_spark_submit_runs_the_packaged_job(standalone, tmp_path):
    import pyspark

    url, _ = standalone
    log = generated_log(tmp_path / "log.csv", users=30, items=40, seed=5)
    package = tmp_path / "nextclick.zip"
    subprocess.run(["make", "package", f"PACKAGE={package}"], cwd=ROOT, check=True, capture_output=True)
    submit = [str(Path(pyspark.__file__).parent / "bin" / "spark-submit"), "--master", url]
    submit += ["--conf", "spark.executor.memory=512m", "--py-files", str(package), str(ROOT / "cluster" / "etl_job.py")]
    options = [f"input={log}", f"output={tmp_path / 'out'}", "scenario=qb_video", "shards=2"]
    env = os.environ | {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    done = subprocess.run([*submit, *options], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sessions" in done.stdout
    assert len(hashes(tmp_path / "out")) == 5


def test_memory_follows_the_size_of_the_log_within_the_machine():
    assert jvm_memory(0, 64 << 30) == "1024m"
    assert jvm_memory(16 << 30, 64 << 30) == "3072m"
    assert jvm_memory(1 << 50, 64 << 30) == "8192m"
    assert jvm_memory(1 << 50, 16 << 30) == "4096m"
    assert jvm_memory(0, 1 << 30) == "1024m"
