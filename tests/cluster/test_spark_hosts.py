"""Sessions on a standalone Spark cluster over three hosts, with a secret: a killed host, a client without it."""

from __future__ import annotations

import sys

import pytest

from etl.__main__ import main as etl
from etl.engines.java import OLDEST_JAVA, java_version
from tests.etl.test_cluster import SPLIT_BYTES, USERS, hashes, kill_after_a_split, run_twin

pytestmark = [
    pytest.mark.spark,
    pytest.mark.cluster,
    pytest.mark.skipif((java_version() or 0) < OLDEST_JAVA, reason=f"needs Java {OLDEST_JAVA} or newer"),
]


def test_killed_host_does_not_change_the_output_and_clients_need_the_secret(cluster, tmp_path):
    cluster.start(1, 2, 3, programs=("spark",))
    log = tmp_path / "log.csv"
    run_twin(log, scenario="qk_video", users=USERS, seed=1)
    options = [f"input={log}", "scenario=qk_video", "shards=4", f"split_bytes={SPLIT_BYTES}"]
    line = [sys.executable, "-m", "etl", *options, "spark.executor_memory=512m", f'spark.master="{cluster.spark}"']
    own = {"SPARK_LOCAL_IP": cluster.hosts.address(1)}
    stranger = cluster.popen([*line, f"output={tmp_path / 's'}"], host=1, **own, SPARK_CONF_DIR=str(tmp_path / "none"))
    process = cluster.popen([*line, f"output={tmp_path / 'b'}"], host=1, **own)
    kill_after_a_split(process, tmp_path / "b", lambda: cluster.hosts.kill(3))
    assert etl([*options, f"output={tmp_path / 'a'}", "engine=local"]) == 0  # undisturbed
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out[-3000:]
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")

    stranger.communicate(timeout=240)
    assert stranger.returncode != 0
    assert not (tmp_path / "s").exists()
