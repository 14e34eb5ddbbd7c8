"""Ray over three hosts, with a token: hosts killed, cut off and brought back; who may not come in."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.local import free_ports, write_secret
from retrieval.config import load
from retrieval.evaluate import evaluate
from tests.retrieval.test_parts import split_files, without_times
from tests.support.hosts import Hosts, kill_family, three_hosts
from tests.trainer.test_run import SMALL, assert_same_run
from trainer.run.checkpoint import latest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
RAY = str(Path(sys.executable).with_name("ray"))
ROOT = Path(__file__).parents[2]
LONG = ["train.epochs=14", "train.early_stopping_patience=14"]
"""Long enough to be killed in the middle."""


@dataclass
class RayCluster:
    """A head on host 1 that computes nothing, and a node of one core on each of hosts 2 and 3."""

    hosts: Hosts
    token: Path
    gcs: int
    dashboard: int
    starts: int = 0

    @property
    def address(self) -> str:
        return f"http://{self.hosts.address(1)}:{self.dashboard}"

    def env(self) -> dict[str, str]:
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "GLOO_SOCKET_IFNAME": "eth0",
        }

    def start(self, host: int) -> subprocess.Popen:
        self.starts += 1
        own = ["--node-ip-address", self.hosts.address(host)]
        if host == 1:
            role = ["--head", "--port", str(self.gcs), "--num-cpus", "0"]
            role += ["--dashboard-host", self.hosts.address(1), "--dashboard-port", str(self.dashboard)]
        else:
            role = ["--address", f"{self.hosts.address(1)}:{self.gcs}", "--num-cpus", "1"]
        line = [RAY, "start", "--block", "--disable-usage-stats", *own, *role]
        return self.hosts.start(host, f"ray-{host}-{self.starts}", line, self.env(), "Ray runtime started")

    def submit(self, what: str, options: list[str], *, python: str = sys.executable, **env: str) -> subprocess.Popen:
        line = [sys.executable, "-m", "cluster", f"submit={what}", "target=ray", f"address={self.address}"]
        line += [f"python={python}", "interface=eth0", f"options={' '.join(options)}"]
        return subprocess.Popen(
            line,
            cwd=ROOT,
            env=os.environ | self.env() | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray-hosts")
    with three_hosts(folder) as hosts:
        write_secret(folder / "token", secrets.token_hex(32))
        gcs, dashboard = free_ports(2)
        cluster = RayCluster(hosts, folder / "token", gcs, dashboard)
        for host in (1, 2, 3):
            cluster.start(host)
        yield cluster


def finish(process: subprocess.Popen, seconds: float = 400) -> str:
    """The job's output, once it has ended well."""
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, out[-4000:]
    return out


def training(fifty, run: Path, *more: str) -> list[str]:
    small = [o for o in SMALL if not o.startswith("ray.")]
    return [f"data={fifty.path}", f"output={run}", "model=hybrid", *small, *LONG, "ray.workers=2", *more]


def wait_for_epoch(run: Path, epoch: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while True:
        lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").is_file() else []
        epochs = [json.loads(line)["epoch"] for line in lines if line.endswith("}")]
        if max(epochs, default=0) >= epoch:
            return
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def calm(ray_cluster, fifty, tmp_path_factory) -> Path:
    """An undisturbed run over two hosts."""
    run = tmp_path_factory.mktemp("calm") / "run"
    out = finish(ray_cluster.submit("train", training(fifty, run)))
    assert "best epoch" in out
    return run


def test_strangers_are_refused(ray_cluster, tmp_path):
    wrong = tmp_path / "wrong"
    write_secret(wrong, secrets.token_hex(32))
    for env in ({"RAY_AUTH_TOKEN_PATH": str(wrong)}, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}):
        process = ray_cluster.submit("train", ["data=x"], **env)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 2, out
        assert out.strip().splitlines()[-1].startswith("error: expected ")
    for path in ("/api/jobs/", "/api/cluster_status", "/nodes?view=summary"):
        for header in ({}, {"Authorization": "Bearer 0000"}):
            request = urllib.request.Request(ray_cluster.address + path, headers=header)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=20)
            assert refused.value.code in (401, 403)
    hosts, before = ray_cluster.hosts, ray_nodes(ray_cluster)
    joining = [RAY, "start", "--address", f"{hosts.address(1)}:{ray_cluster.gcs}"]
    joining += ["--node-ip-address", hosts.address(3), "--num-cpus", "1"]
    command = ["ip", "netns", "exec", hosts.space(3), *joining]
    env = os.environ | ray_cluster.env() | {"RAY_AUTH_TOKEN_PATH": str(wrong)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert ray_nodes(ray_cluster) == before == 3


SCAN = """
import json, socket, sys, urllib.error, urllib.request
from concurrent.futures import ThreadPoolExecutor
import grpc

host = sys.argv[1]
METHODS = ["NodeManagerService/GetNodeStats", "ObjectManagerService/Pull", "LogService/ListLogs"]

def listens(port):
    with socket.socket() as s:
        s.settimeout(2)
        return s.connect_ex((host, port)) == 0

def answer(port):
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/", timeout=10) as reply:
            return "metrics" if reply.read(7) == b"# HELP " else "open"
    except urllib.error.HTTPError as error:
        return "token" if error.code == 401 else f"HTTP {error.code}"
    except Exception:
        pass
    channel, codes = grpc.insecure_channel(f"{host}:{port}"), []
    for method in METHODS:
        call = channel.unary_unary(f"/ray.rpc.{method}", request_serializer=bytes, response_deserializer=bytes)
        try:
            call(b"", timeout=10)
            return f"open: {method}"
        except grpc.RpcError as error:
            codes.append(error.code().name)
    return "token" if "UNAUTHENTICATED" in codes else " ".join(codes)

with ThreadPoolExecutor(64) as pool:
    ports = [port for port, found in zip(range(1, 65536), pool.map(listens, range(1, 65536))) if found]
print(json.dumps({port: answer(port) for port in ports}))
"""


def test_all_that_listens_on_a_node_asks_for_the_token_or_is_metrics(ray_cluster):
    """Every port of host 2, tried from host 3: what README's table lists, and no more."""
    hosts = ray_cluster.hosts
    command = ["ip", "netns", "exec", hosts.space(3), sys.executable, "-c", SCAN, hosts.address(2)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    answers = sorted(json.loads(done.stdout).values())
    assert answers == ["metrics", *["token"] * 5]


def ray_nodes(ray_cluster) -> int:
    """Nodes that are alive."""
    token = ray_cluster.token.read_text()
    request = urllib.request.Request(
        ray_cluster.address + "/nodes?view=summary", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        nodes = json.loads(reply.read())["data"]["summary"]
    return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)


def test_a_host_killed_and_started_again_changes_nothing(ray_cluster, fifty, calm, tmp_path):
    process = ray_cluster.submit("train", training(fifty, tmp_path / "run"))
    wait_for_epoch(tmp_path / "run", 3, process)
    ray_cluster.hosts.kill(3)
    time.sleep(2)
    ray_cluster.start(3)
    finish(process)
    assert_same_run(calm, tmp_path / "run")


def test_a_cable_pulled_for_twenty_seconds_ends_well_or_fails_clearly(ray_cluster, fifty, calm, tmp_path):
    run = tmp_path / "run"
    process = ray_cluster.submit("train", training(fifty, run))
    wait_for_epoch(run, 3, process)
    ray_cluster.hosts.link(3, "down")
    time.sleep(20)
    ray_cluster.hosts.link(3, "up")
    out, _ = process.communicate(timeout=600)  # a hang would end here
    if ray_nodes(ray_cluster) < 3:  # Ray may have given the host up meanwhile, which ends its processes
        ray_cluster.hosts.kill(3)
        ray_cluster.start(3)
    if process.returncode:
        assert process.returncode == 2, out[-4000:]
        finish(ray_cluster.submit("train", training(fifty, run)))
    assert_same_run(calm, run)


def test_a_host_that_never_returns_leaves_an_elastic_run_with_fewer_workers(ray_cluster, fifty, calm, tmp_path):
    run = tmp_path / "run"
    process = ray_cluster.submit("train", training(fifty, run, "ray.workers=[1,2]"))
    wait_for_epoch(run, 3, process)
    ray_cluster.hosts.kill(3)
    finish(process)
    left, right = (json.loads((path / "summary.json").read_text()) for path in (calm, run))
    assert (left["steps"], right["workers"]) == (right["steps"], 1)
    ray_cluster.start(3)


def test_a_host_that_never_returns_ends_a_run_of_fixed_size_in_an_error(ray_cluster, fifty, calm, tmp_path):
    """Four waits of a minute are Ray's; here they are shorter, for the test's sake."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nRAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=20 exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    run = tmp_path / "run"
    process = ray_cluster.submit("train", training(fifty, run), python=str(python))
    wait_for_epoch(run, 3, process)
    ray_cluster.hosts.kill(3)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 2, out[-4000:]
    assert "error: expected a cluster that can start 2 workers" in out
    ray_cluster.start(3)
    finish(ray_cluster.submit("train", training(fifty, run)))
    assert_same_run(calm, run)


def test_evaluation_over_two_hosts_one_killed_is_that_of_one_process(ray_cluster, tiny, monkeypatch):
    split_files(tiny, rows=1)
    given = [f"bundle={tiny / 'bundle'}", f"data={tiny / 'data'}", "cutoffs=[1,2,5]", "index=ivf_flat"]
    given.append("part_queries=1")
    alone = evaluate(load([*given, f"output={tiny / 'alone'}"]))
    process = ray_cluster.submit("evaluate", [*given, f"output={tiny / 'many'}"])
    deadline = time.monotonic() + 120
    while not list(tiny.glob(".many.parts/*/valid-*")):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ray_cluster.hosts.kill(2)
    finish(process)
    ray_cluster.start(2)
    found = json.loads((tiny / "many" / "metrics.json").read_text())
    assert without_times(found) == json.loads(json.dumps(without_times(alone)))
    for name in ("ranks.parquet", "topk.parquet"):
        assert pq.read_table(tiny / "many" / name).equals(pq.read_table(tiny / "alone" / name))


def test_the_head_killed_and_a_resubmission_resumes(ray_cluster, fifty, calm, tmp_path):
    """Last, since it ends the cluster that the other tests share."""
    run, hosts = tmp_path / "run", ray_cluster.hosts
    process = ray_cluster.submit("train", training(fifty, run))
    wait_for_epoch(run, 3, process)
    for started in hosts.processes:
        kill_family(started.pid)
    for host in (2, 3):
        hosts.kill(host)
    kill_family(process.pid)
    assert latest(run / "checkpoints")
    assert not (run / "summary.json").exists()
    for host in (1, 2, 3):
        ray_cluster.start(host)
    finish(ray_cluster.submit("train", training(fifty, run)))
    assert_same_run(calm, run)
