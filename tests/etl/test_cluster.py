"""The sessions job on a standalone Spark cluster of two workers: same bytes, even if one of them dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from etl.dataset import open_dataset
from etl.engines.java import OLDEST_JAVA, java_version
from etl.engines.spark import jvm_memory
from etl.twin.__main__ import main as twin
from tests.support.logs import generated_log
from tests.support.reference import Options, sessionize
from tests.support.session_logs import check, command

pytestmark = [
    pytest.mark.spark,
    pytest.mark.cluster,
    pytest.mark.skipif((java_version() or 0) < OLDEST_JAVA, reason=f"needs Java {OLDEST_JAVA} or newer"),
]
ROOT = Path(__file__).parents[2]
SCENARIOS = ["qb_video", "qk_article", "qb_article"]
USERS, SPLIT_BYTES, LEAST_SPLITS = 3_000, 200_000, 30
"""A log of this many users, read in small splits: a worker can die when some are read and others pending."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Standalone:
    """A Spark master and two workers, each in a process group with its executors.

    Args:
        folder: for logs and the workers' files.
    """

    def __init__(self, folder: Path) -> None:
        import pyspark

        self.folder, self.home = folder, Path(pyspark.__file__).parent
        self.url = f"spark://127.0.0.1:{free_port()}"
        self.running: dict[str, subprocess.Popen] = {}

    def start(self, *names: str) -> None:
        """Start those of `master`, `one` and `two` that are named and not running, and wait until they are ready."""
        started = [name for name in names if name not in self.running or self.running[name].poll() is not None]
        for name in started:
            own = ["--host", "127.0.0.1", "--webui-port", "0"]
            if name == "master":
                line = ["org.apache.spark.deploy.master.Master", *own, "--port", self.url.rsplit(":", 1)[1]]
            else:
                line = ["org.apache.spark.deploy.worker.Worker", *own, "-c", "1", "-m", "1g"]
                line += ["-d", str(self.folder / name), self.url]
            env = os.environ | {"SPARK_HOME": str(self.home), "SPARK_LOCAL_DIRS": str(self.folder / name)}
            with self.log(name).open("w") as log:
                run = [str(self.home / "bin" / "spark-class"), *line]
                self.running[name] = subprocess.Popen(run, env=env, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 300
        for name in started:
            ready = "Starting Spark master" if name == "master" else "Successfully registered"
            while ready not in self.log(name).read_text():
                assert time.monotonic() < deadline, self.log(name).read_text()
                time.sleep(0.1)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """One standalone cluster for all tests here."""
    standalone = Standalone(tmp_path_factory.mktemp("standalone"))
    try:
        standalone.start("master")
        yield standalone
    finally:
        for process in standalone.running.values():
            kill(process)


@pytest.fixture
def standalone(machines) -> Standalone:
    """The cluster with both workers running, even if an earlier test has killed one."""
    machines.start("one", "two")
    return machines


def kill(process: subprocess.Popen) -> None:
    """Kill a process and its descendants."""
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
    assert twin([f"output={output}", *(f"{k}={v}" for k, v in options.items())]) == 0


def hashes(folder: Path) -> list[tuple[str, str]]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return [(f["path"], f["sha256"]) for f in manifest["files"]]


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> dict[str, Path]:
    """A generated log of each scenario, and one with many splits."""
    folder = tmp_path_factory.mktemp("logs")
    for scenario in SCENARIOS:
        run_twin(folder / f"{scenario}.csv", scenario=scenario, users=60, seed=4)
    run_twin(folder / "many-splits.csv", scenario="qk_video", users=USERS, seed=1)
    return {path.stem: path for path in folder.glob("*.csv")}


OPTIONS = Options(min_clicks=5, max_clicks=12)
MANY_SPLITS = ["scenario=qk_video", "shards=4", f"split_bytes={SPLIT_BYTES}"]


@pytest.fixture(scope="module")
def made(machines, logs, tmp_path_factory) -> dict[str, Path]:
    """Datasets built by one thread, by two threads and by the cluster: one folder each, with one dataset per log."""
    machines.start("one", "two")
    folders, processes = {}, []
    for name, master in (("one", "local[1]"), ("two", "local[2]"), ("cluster", machines.url)):
        folders[name] = tmp_path_factory.mktemp(name)
        jobs = []
        for scenario in SCENARIOS:
            (folders[name] / scenario).mkdir()
            jobs.append(command(folders[name] / scenario, [logs[scenario].read_text()], OPTIONS, scenario=scenario))
        if name == "two":
            jobs.append([f"input={logs['many-splits']}", f"output={folders[name] / 'many-splits'}", *MANY_SPLITS])
        line = [sys.executable, "-m", "tests.support.spark_jobs", master]
        processes.append(subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        processes[-1].stdin.write(json.dumps(jobs))
        processes[-1].stdin.close()
    for process in processes:
        errors = process.stderr.read()
        assert process.wait(500) == 0, errors
    return folders


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_one_thread_two_threads_and_a_cluster_equal_the_reference_sessionizer(made, logs, scenario):
    outputs = [folder / scenario / "out" for folder in made.values()]
    expected = sessionize([logs[scenario].read_text()], OPTIONS)
    for output in outputs:
        check(open_dataset(output), expected)
    assert hashes(outputs[0]) == hashes(outputs[1]) == hashes(outputs[2])


def test_killed_worker_does_not_change_the_output(made, standalone, logs, tmp_path):
    options = [f"input={logs['many-splits']}", *MANY_SPLITS, "spark.executor_memory=512m"]
    process = etl(*options, f"output={tmp_path / 'b'}", f'spark.master="{standalone.url}"')
    kill_after_a_split(process, tmp_path / "b", lambda: kill(standalone.running["one"]))
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert hashes(made["two"] / "many-splits") == hashes(tmp_path / "b")


def kill_after_a_split(process: subprocess.Popen, output: Path, kill: Callable[[], None]) -> None:
    """Call `kill` once a job has read a split of its log, and check that it had splits left to read."""
    done = output.with_name(f".{output.name}.building") / "_work" / "splits"
    deadline = time.monotonic() + 400
    while not (finished := len(list(done.glob("[0-9]*.json")))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill()
    assert finished < LEAST_SPLITS


def test_spark_submit_runs_the_packaged_job(standalone, tmp_path):
    log = generated_log(tmp_path / "log.csv", users=30, items=40, seed=5)
    package = tmp_path / "nextclick.zip"
    subprocess.run(["make", "package", f"PACKAGE={package}"], cwd=ROOT, check=True, capture_output=True)
    submit = [str(standalone.home / "bin" / "spark-submit"), "--master", standalone.url]
    submit += ["--conf", "spark.executor.memory=512m", "--py-files", str(package), str(ROOT / "cluster" / "etl_job.py")]
    options = [f"input={log}", f"output={tmp_path / 'out'}", "scenario=qb_video", "shards=2"]
    env = os.environ | {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    done = subprocess.run([*submit, *options], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sessions" in done.stdout
    assert len(hashes(tmp_path / "out")) == 5


def test_jvm_memory_grows_with_the_log_up_to_the_machines_limit():
    assert jvm_memory(0, 64 << 30) == "1024m"
    assert jvm_memory(16 << 30, 64 << 30) == "3072m"
    assert jvm_memory(1 << 50, 64 << 30) == "8192m"
    assert jvm_memory(1 << 50, 16 << 30) == "4096m"
    assert jvm_memory(0, 1 << 30) == "1024m"
