"""What README says of several hosts, line by line, as a new user would; two of the three do not have the code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.local import free_ports
from etl.engines.java import OLDEST_JAVA, java_version
from tests.support.hosts import Hosts, three_hosts
from tests.support.logs import generated_log

pytestmark = [
    pytest.mark.spark,
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif((java_version() or 0) < OLDEST_JAVA, reason=f"needs Java {OLDEST_JAVA} or newer"),
]
ROOT = Path(__file__).parents[2]
CODE = [ROOT / name for name in ("etl", "trainer", "retrieval", "cluster", "tests")]
HIDE = "mkdir -p /tmp/ray\n" + "".join(f"mount -t tmpfs tmpfs {path}\n" for path in (*CODE, "/tmp/ray"))
"""Hides the code from a host, and gives it a folder of its own for what Ray unpacks, in its mount namespace."""


def blocks() -> list[str]:
    """The section's commands: keys, every host, the first host, each other host, the pipeline."""
    section = (ROOT / "README.md").read_text().split("**Several hosts.**")[1].split("\n**")[0]
    return re.findall(r"^```\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)


def filled(text: str, hosts: Hosts, shared: Path, host: int, ports: list[int]) -> str:
    """Commands with this test bed's addresses, ports and folder."""
    text = text.replace("HEAD", hosts.address(1)).replace("OWN=OWN", f"OWN={hosts.address(host)}")
    for known, port in zip(("6379", "8265", "7077"), ports, strict=True):
        text = text.replace(known, str(port))
    return text.replace("/shared", str(shared))


def test_the_whole_pipeline_over_three_hosts_by_readmes_commands_alone(tmp_path):
    keys, every, first, others, pipeline = blocks()
    shared = tmp_path / "shared"
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    with three_hosts(tmp_path) as hosts:
        ports = free_ports(3)
        subprocess.run(["sh", "-ec", filled(keys, hosts, shared, 1, ports)], check=True)
        for host in (1, 2, 3):
            # In the foreground, so that the test can end what it has started.
            lines = filled(first if host == 1 else others, hosts, shared, host, ports)
            lines = lines.replace("ray start", "ray start --block").replace("nohup ", "")
            ray, spark = lines.splitlines()
            ready = ("I have been elected leader", "Successfully registered")[host > 1]
            export = (HIDE if host > 1 else "") + filled(every, hosts, shared, host, ports)
            hosts.start(host, f"ray-{host}", ["sh", "-ec", export + ray], env, "Ray runtime started")
            hosts.start(host, f"spark-{host}", ["sh", "-ec", export + spark.split(">")[0]], env, ready)
        log = generated_log(tmp_path / "log.csv", users=300, items=200, seed=3)
        small = "train.epochs=2 network.embedding_dim=8 train.negatives=16"
        line = filled(pipeline, hosts, shared, 1, ports).replace("recipe=small", small).rstrip()
        line = re.sub(r"(pipeline\.etl=\S+)", r"'\1 shards=4'", line)
        line += f" pipeline.input={log} pipeline.scenario=qb_video pipeline.models=[hybrid]"
        command = ["sh", "-ec", filled(every, hosts, shared, 1, ports) + line]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | env, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        for host in (2, 3):
            assert "Executor" in (tmp_path / f"spark-{host}.log").read_text()
    assert (shared / "work" / "hybrid-result" / "report.html").is_file()
    assert json.loads((shared / "work" / "hybrid" / "summary.json").read_text())["workers"] == 2
