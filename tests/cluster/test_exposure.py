"""Network exposure over three hosts: clients without a token, and the open ports listed in `docs/security.md`."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cluster.local import write_secret
from tests.cluster.test_local_cluster import SUBMISSION
from tests.support.readme_cluster import RAY_PORT, SPARK_PORT

pytestmark = pytest.mark.cluster
RAY = str(Path(sys.executable).with_name("ray"))
SPARK_WORKER = "UNAVAILABLE UNAVAILABLE UNAVAILABLE"
"""Spark's encrypted RPC closes the connection of clients that speak another protocol."""


def test_clients_without_the_token_are_refused(cluster, tmp_path):
    wrong = tmp_path / "wrong"
    write_secret(wrong, secrets.token_hex(32))
    before = cluster.ray_nodes()
    unknown = [{"RAY_AUTH_TOKEN_PATH": str(path)} for path in (wrong, tmp_path / "none")]
    submitting = [cluster.submit("train", ["data=x"], **env) for env in unknown]
    node = [RAY, "start", "--address", f"{cluster.hosts.address(1)}:{RAY_PORT}"]
    node += ["--node-ip-address", cluster.hosts.address(3), "--num-cpus", "1"]
    joining = cluster.popen(node, host=3, **unknown[0])
    for path in ("/api/jobs/", "/api/cluster_status", "/nodes?view=summary"):
        for header in ({}, {"Authorization": "Bearer 0000"}):
            request = urllib.request.Request(cluster.ray + path, headers=header)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=20)
            assert refused.value.code in (401, 403)
    for process in submitting:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 2, out
        assert out.strip().splitlines()[-1].startswith("error: expected ")
    out, _ = joining.communicate(timeout=120)
    assert joining.returncode != 0, out
    assert cluster.ray_nodes() == before == 3


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


def test_every_open_port_of_a_node_requires_the_token_or_serves_metrics(cluster):
    """Every port of host 2, probed from host 3: exactly those in the table of `docs/security.md`."""
    cluster.start(1, 2, 3)
    hosts = cluster.hosts
    command = hosts.on(3, sys.executable, "-c", SCAN, hosts.address(2))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    answers = sorted(json.loads(done.stdout).values())
    assert answers == [SPARK_WORKER, "metrics", *["token"] * 5]


POST = """
import http.client, sys, urllib.request
for url in sys.argv[2:]:
    request = urllib.request.Request(url, sys.argv[1].encode(), {"Content-Type": "application/json"})
    try:
        print("taken", urllib.request.urlopen(request, timeout=20).read())
    except (OSError, http.client.HTTPException) as error:
        print("refused", error)
"""


LISTENING = """
import json, psutil, sys
found = psutil.Process(int(sys.argv[1])).net_connections()
print(json.dumps([c.laddr for c in found if c.status == psutil.CONN_LISTEN]))
"""


def listening(cluster, host: int) -> list[tuple[str, int]]:
    """Addresses and ports on which the Spark process of a host listens, as seen on that host."""
    pid = str(cluster.running[host, "spark"].process.pid)
    command = cluster.hosts.on(host, sys.executable, "-c", LISTENING, pid)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return sorted((ip.removeprefix("::ffff:"), port) for ip, port in json.loads(done.stdout))


def test_spark_refuses_job_submissions_from_another_host(cluster):
    """Port 6066 of Spark's REST server, which needs no secret, is closed; only RPC and the web pages listen."""
    cluster.start(1, 2, 3)
    master, worker = (cluster.hosts.address(host) for host in (1, 2))
    assert listening(cluster, 1) == [(master, SPARK_PORT), ("127.0.0.1", 8080)]
    (address, rpc), page = listening(cluster, 2)
    assert (address, page) == (worker, ("127.0.0.1", 8081))
    ports = [(master, 6066), (master, SPARK_PORT), (worker, rpc)]
    urls = [f"http://{host}:{port}/v1/submissions/create" for host, port in ports]
    command = cluster.hosts.on(3, sys.executable, "-c", POST, json.dumps(SUBMISSION), *urls)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["refused"] * 3, done.stdout
    assert "Asked to launch driver" not in cluster.logs(2, "spark") + cluster.logs(3, "spark")
