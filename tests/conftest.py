"""What tests share: one Spark session, and a small dataset made without it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from xdist.scheduler import LoadFileScheduling

from etl.config import SparkOptions
from etl.dataset import Dataset
from etl.engines.java import OLDEST_JAVA, java_version
from etl.engines.spark import spark_session
from tests.data import TINY
from tests.support.engine import build
from tests.support.logs import generated_log

# Models of tests are tiny: threads would wait for one another, and four times as long where a core is busy elsewhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests are of the CPU wherever they run; those of a GPU (`-m gpu`) by `python -m tests.benchmarks gpu`, which says so.
if not os.environ.get("NEXTCLICK_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Hundreds of datasets of a few rows are written and removed again: on a disk that takes longer than making them.
MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 << 30:
    tempfile.tempdir = str(MEMORY)


SHARED_HOSTS = ("test_exposure.py", "test_hosts.py", "test_readme_hosts.py", "test_spark_hosts.py")
"""Files whose tests share one cluster of three hosts: one process runs them all."""


class FilesOfOneCluster(LoadFileScheduling):
    """Files to processes, as `--dist loadfile` does, but those that share a cluster to the same one."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "hosts" if Path(file).name in SHARED_HOSTS else file


class FailuresAtOnce:
    """Prints each failure when it happens: a suite that is stopped on the way still says what failed."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            reporter = self.config.pluginmanager.get_plugin("terminalreporter")
            reporter.write_line(f"\nfailed in {report.when} after {report.duration:.0f} s: {report.nodeid}")
            reporter.write_line(report.longreprtext[-4000:])


def pytest_configure(config):
    """Called once at the start, in every process of pytest-xdist; only the first reports to the terminal."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailuresAtOnce(config))


def pytest_xdist_make_scheduler(config, log):
    """Called where pytest-xdist distributes tests."""
    return FilesOfOneCluster(config, log)


@pytest.fixture(scope="session")
def spark(tmp_path_factory):
    """One Spark session for all tests; the job's own `spark_session` finds and keeps it."""
    if (java_version() or 0) < OLDEST_JAVA:
        pytest.skip(f"needs Java {OLDEST_JAVA} or newer")
    with spark_session(SparkOptions(master="local[2]"), tmp_path_factory.mktemp("spark")) as session:
        yield session


@pytest.fixture(scope="session")
def fifty(tmp_path_factory) -> Dataset:
    """Sessions of fifty generated users with exposures and feedback."""
    folder = tmp_path_factory.mktemp("fifty")
    log = generated_log(folder / "log.csv", users=50, items=60, seed=1, late=3)
    return build([f"input={log}", f"output={folder / 'data'}", "scenario=qb_video", "shards=3"])


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A writable copy of the frozen data set (`data`), bundle (`bundle`) and result (`result`)."""
    shutil.copytree(TINY, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def no_report() -> Iterator[None]:
    """Results without their page, whose charts take longer than all else; `test_report.py` has it."""
    with mock.patch("retrieval.evaluate.write_report", lambda path, *_: path.touch() or ""):
        yield
