"""Shared fixtures: one Spark session, and a small dataset built without Spark."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

from etl.config import SparkOptions
from etl.dataset import Dataset
from etl.engines.java import OLDEST_JAVA, java_version
from etl.engines.spark import spark_session
from tests.data import TINY
from tests.support.engine import build
from tests.support.logs import generated_log

# Test models are tiny: threads would mostly wait for each other, four times as long if a core is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# An example may take long on a busy machine.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

# Tests run on the CPU everywhere; `python -m tests.benchmarks gpu` sets NEXTCLICK_GPU and runs those marked `gpu`.
if not os.environ.get("NEXTCLICK_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Hundreds of tiny datasets are written and removed: on a disk that takes longer than computing them.
MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 << 30:
    tempfile.tempdir = str(MEMORY)


SHARED_HOSTS = ("test_exposure.py", "test_hosts.py", "test_readme_hosts.py", "test_spark_hosts.py")
"""Files whose tests share one cluster of three hosts: one process runs them all."""


class FilesOfOneCluster(LoadFileScheduling):
    """Like `--dist loadfile`, but all files that share a cluster go to the same process."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "hosts" if Path(file).name in SHARED_HOSTS else file


class FailuresAtOnce:
    """Print each failure when it happens, so that an interrupted suite still reports it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            reporter = self.config.pluginmanager.get_plugin("terminalreporter")
            reporter.write_line(f"\nfailed in {report.when} after {report.duration:.0f} s: {report.nodeid}")
            reporter.write_line(report.longreprtext[-4000:])


def pytest_configure(config):
    """Called once in every pytest-xdist process; only the main process reports to the terminal."""
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
    """Results without `report.html`, whose charts take longest; `test_report.py` covers the page."""
    with mock.patch("retrieval.evaluate.write_report", lambda path, *_: path.touch() or ""):
        yield
