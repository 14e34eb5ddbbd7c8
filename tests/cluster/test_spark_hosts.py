"""Sessions on a standalone Spark cluster over three hosts, with a secret: a host killed in the middle, a stranger."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.local import MASTER, WORKER, spark_defaults, write_secret
from etl.engines.java import OLDEST_JAVA, java_version
from tests.etl.test_cluster import ROOT, etl, hashes, run_twin
from tests.support.hosts import three_hosts

pytestmark = [
    pytest.mark.spark,
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif((java_version() or 0) < OLDEST_JAVA, reason=f"needs Java {OLDEST_JAVA} or newer"),
]


@pytest.fixture
def spark_hosts(tmp_path):
    """The hosts, the master's address and the folder with the secret."""
    import pyspark

    home = Path(pyspark.__file__).parent
    with three_hosts(tmp_path) as hosts:
        conf, url = tmp_path / "conf", f"spark://{hosts.address(1)}:7077"
        settings = spark_defaults(secrets.token_hex(32)).replace("127.0.0.1", hosts.address(1))
        write_secret(conf / "spark-defaults.conf", settings)
        spark = str(home / "bin" / "spark-class")

        def env(host: int) -> dict[str, str]:
            return {"SPARK_HOME": str(home), "SPARK_CONF_DIR": str(conf), "SPARK_LOCAL_IP": hosts.address(host)}

        master = [spark, MASTER, "--host", hosts.address(1), "--port", "7077", "--webui-port", "0"]
        hosts.start(1, "master", master, env(1), "I have been elected leader")
        for host in (2, 3):
            own = ["--host", hosts.address(host), "-c", "1", "-m", "1g", "--webui-port", "0"]
            work = str(tmp_path / f"work-{host}")
            hosts.start(
                host, f"worker-{host}", [spark, WORKER, *own, "-d", work, url], env(host), "Successfully registered"
            )
        yield hosts, url, conf


def test_a_host_killed_in_the_middle_costs_time_only_and_a_stranger_is_refused(spark_hosts, tmp_path):
    hosts, url, conf = spark_hosts
    log = tmp_path / "log.csv"
    run_twin(log, scenario="qk_video", users=60_000, seed=1)
    options = [f"input={log}", "scenario=qk_video", "shards=4", "spark.executor_memory=512m"]
    undisturbed = etl(*options, f"output={tmp_path / 'a'}", 'spark.master="local[2]"')
    assert undisturbed.wait(240) == 0

    line = [sys.executable, "-m", "etl", *options, f'spark.master="{url}"']
    own = os.environ | {"SPARK_LOCAL_IP": hosts.address(1)}
    stranger = subprocess.run([*line, f"output={tmp_path / 's'}"], cwd=ROOT, env=own, capture_output=True, timeout=240)
    assert stranger.returncode != 0
    assert not (tmp_path / "s").exists()

    process = subprocess.Popen(
        [*line, f"output={tmp_path / 'b'}"],
        cwd=ROOT,
        env=own | {"SPARK_CONF_DIR": str(conf)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 180
    while not list((tmp_path / ".b.building" / "_work" / "splits").glob("[0-9]*.json")):
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    hosts.kill(3)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
