"""One cluster over three hosts for all tests that need hosts, and the undisturbed reference run."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from etl.engines.java import OLDEST_JAVA, java_version
from tests.support.hosts import three_hosts
from tests.support.logs import generated_log
from tests.support.readme_cluster import TRAINING, ReadmeCluster


@dataclass(frozen=True)
class Pipeline:
    """The output of README's pipeline over three hosts."""

    work: Path
    returncode: int
    output: str
    trained_on: frozenset[int]
    """Hosts that had a training worker."""

    @property
    def data(self) -> Path:
        return self.work / "data"

    @property
    def run(self) -> Path:
        return self.work / "hybrid"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """The three hosts with Ray and Spark; a test that stops programs restarts them."""
    if (java_version() or 0) < OLDEST_JAVA:
        pytest.skip(f"needs Java {OLDEST_JAVA} or newer")
    folder = tmp_path_factory.mktemp("hosts")
    with three_hosts(folder) as hosts:
        cluster = ReadmeCluster(hosts, folder)
        subprocess.run(["sh", "-ec", cluster.filled(cluster.keys)], check=True)
        cluster.start(1, 2, 3)
        yield cluster


@pytest.fixture(autouse=True)
def whole(request) -> None:
    """Every test on the hosts begins with Ray running on all three, whatever the previous test did."""
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").mend()


@pytest.fixture(scope="session")
def pipeline(cluster, tmp_path_factory) -> Pipeline:
    """README's pipeline on fifty generated users, undisturbed, with the short training of the other tests."""
    log = generated_log(tmp_path_factory.mktemp("log") / "log.csv", users=50, items=60, seed=1)
    line = cluster.filled(cluster.pipeline).replace("recipe=small", " ".join(TRAINING)).rstrip()
    line = re.sub(r"(pipeline\.etl=\S+)", r"'\1 shards=3'", line)
    line += f" pipeline.input={log} pipeline.scenario=qb_video pipeline.models=[hybrid]"
    process = cluster.popen(["sh", "-ec", cluster.on_every_host() + line])
    output, trained_on = cluster.watched(process, "RayTrainWorker")
    return Pipeline(cluster.shared / "work", process.returncode, output, trained_on)
