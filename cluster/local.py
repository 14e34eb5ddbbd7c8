"""A local cluster of several processes: a Ray head with nodes, a Spark master with workers.

Everything listens on the loopback. Ray requires a token, Spark a secret; both are in the state folder, readable only by
its owner, with the logs and process ids. Only these processes are ever terminated.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import psutil

from cluster.config import LocalOptions
from etl.engines.java import require_java
from etl.runtime.errors import InputError
from etl.runtime.files import write_json

HOST = "127.0.0.1"
STATE = "state.json"
START_SECONDS = 90.0
MASTER, WORKER = "org.apache.spark.deploy.master.Master", "org.apache.spark.deploy.worker.Worker"


def free_ports(n: int) -> list[int]:
    """Distinct free ports of the loopback interface."""
    held = [socket.create_server((HOST, 0)) for _ in range(n)]
    ports = [int(s.getsockname()[1]) for s in held]
    for s in held:
        s.close()
    return ports


def write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)


def spark_defaults(secret: str) -> str:
    """Spark settings for authentication and encryption."""
    settings = {
        "spark.authenticate": "true",
        "spark.authenticate.secret": secret,
        "spark.network.crypto.enabled": "true",
        "spark.ui.enabled": "false",
        # The REST server, on by default, starts applications without authentication.
        "spark.master.rest.enabled": "false",
        # The master's web page would let unauthenticated clients kill applications and remove workers.
        "spark.ui.killEnabled": "false",
        "spark.master.ui.decommission.allow.mode": "DENY",
        "spark.driver.host": HOST,
        "spark.driver.bindAddress": HOST,
    }
    return "".join(f"{name} {value}\n" for name, value in settings.items())


class Starter:
    """Starts processes and records them.

    Args:
        folder: the state folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.started, self.lock = folder, list[dict[str, Any]](), Lock()
        # A Ray job joins the cluster named in Ray's temporary folder; the default folder is shared by all clusters.
        self.temporary = tempfile.mkdtemp(prefix="ray-")

    def state(self) -> dict[str, Any]:
        """The recorded state: processes and Ray's temporary folder."""
        return {"processes": self.started, "temporary": self.temporary}

    def start(self, name: str, command: list[str], env: dict[str, str], ready: str) -> None:
        """Start a process in a new session, and wait until `ready` is in its log.

        Raises:
            InputError: it ended or timed out.
        """
        log = self.folder / f"{name}.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, env=os.environ | env, stdout=stream, stderr=stream, start_new_session=True
            )
        entry = {"name": name, "pid": process.pid, "created": psutil.Process(process.pid).create_time()}
        with self.lock:
            self.started.append(entry)
            write_json(self.folder / STATE, self.state())
        deadline = time.monotonic() + START_SECONDS
        while ready not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise InputError(f"{name} to start", f"an error in {log}", "fix it and run action=up again")
            time.sleep(0.1)


def at_once(calls: Sequence[Callable[[], None]]) -> None:
    """Run blocking calls in threads; after all have ended, re-raise the first exception."""
    with ThreadPoolExecutor(len(calls)) as pool:
        for made in [pool.submit(call) for call in calls]:
            made.result()


def up(options: LocalOptions) -> list[str]:
    """Start the cluster; returns instructions.

    Raises:
        InputError: a cluster is already running, Java is missing, or a process does not start.
    """
    folder = Path(options.state).absolute()
    if any(alive(entry) for entry in read_state(folder)["processes"]):
        raise InputError("no running cluster", folder, "python -m cluster action=down first")
    require_java()
    token, conf = folder / "token", folder / "spark"
    write_secret(token, secrets.token_hex(32))
    write_secret(conf / "spark-defaults.conf", spark_defaults(secrets.token_hex(32)))
    starter, (gcs, dashboard, spark) = Starter(folder), free_ports(3)
    try:
        at_once(
            [
                lambda: start_ray(starter, options, token, gcs, dashboard),
                lambda: start_spark(starter, options, conf, spark),
            ]
        )
    except BaseException:
        down(options)
        raise
    write_json(
        folder / STATE,
        starter.state() | {"ray": f"http://{HOST}:{dashboard}", "spark": f"spark://{HOST}:{spark}"},
    )
    return [*status(options), "", *usage(folder, gcs, dashboard, spark)]


def usage(folder: Path, gcs: int, dashboard: int, spark: int) -> list[str]:
    """Instructions: lines to copy."""
    return [
        f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={folder / 'token'} SPARK_CONF_DIR={folder / 'spark'}",
        f"python -m cluster submit=train target=ray address=http://{HOST}:{dashboard} options='data=… output=…'",
        f"python -m cluster submit=etl target=standalone address=spark://{HOST}:{spark} options='input=… output=…'",
        f"or, without submitting: RAY_ADDRESS={HOST}:{gcs} python -m trainer …",
    ]


def start_ray(starter: Starter, options: LocalOptions, token: Path, gcs: int, dashboard: int) -> None:
    """Start a head without cores, and nodes with one core each."""
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
    ray += ["--node-ip-address", HOST, "--temp-dir", starter.temporary]
    agents = free_ports(options.nodes + 1)  # nodes on one machine would use the same port
    ray += ["--dashboard-agent-listen-port"]
    head = [
        "--head",
        "--port",
        str(gcs),
        "--num-cpus",
        "0",
        "--dashboard-host",
        HOST,
        "--dashboard-port",
        str(dashboard),
    ]
    starter.start("ray-head", [*ray, str(agents[0]), *head], env, "Ray runtime started")
    nodes = []
    for number in range(options.nodes):
        node = [*ray, str(agents[number + 1]), "--address", f"{HOST}:{gcs}", "--num-cpus", "1"]
        nodes.append(partial(starter.start, f"ray-node-{number + 1}", node, env, "Ray runtime started"))
    at_once(nodes)


def start_spark(starter: Starter, options: LocalOptions, conf: Path, port: int) -> None:
    """Start a master, and workers with one core each."""
    import pyspark

    home = Path(pyspark.__file__).parent
    # SPARK_LOCAL_IP is also the address of the web pages of master and workers.
    env = {"SPARK_HOME": str(home), "SPARK_CONF_DIR": str(conf), "SPARK_LOCAL_IP": HOST}
    spark = str(home / "bin" / "spark-class")
    master = [spark, MASTER, "--host", HOST, "--port", str(port), "--webui-port", "0"]
    starter.start("spark-master", master, env, "I have been elected leader")
    workers = []
    for number in range(options.nodes):
        name = f"spark-worker-{number + 1}"
        work = str(starter.folder / name)
        worker = [spark, WORKER, "--host", HOST, "-c", "1", "-m", options.memory, "--webui-port", "0", "-d", work]
        worker.append(f"spark://{HOST}:{port}")
        workers.append(partial(starter.start, name, worker, env, "Successfully registered"))
    at_once(workers)


def read_state(folder: Path) -> dict[str, Any]:
    """The recorded state (`Starter.state`); without processes if there is none."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
        return state if isinstance(state["processes"], list) else {"processes": []}
    except (OSError, ValueError, KeyError, TypeError):
        return {"processes": []}


def alive(entry: dict[str, Any]) -> bool:
    """Whether a process is still running, and its id was not reused."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(entry["pid"])
        return process.create_time() == entry["created"] and process.status() != psutil.STATUS_ZOMBIE
    return False


def status(options: LocalOptions) -> list[str]:
    """One line per process.

    Raises:
        InputError: there is no cluster.
    """
    folder = Path(options.state).absolute()
    state = read_state(folder)
    entries = state["processes"]
    if not entries:
        raise InputError(f"a cluster in {folder}", "none", "python -m cluster action=up starts one")
    lines = [f"{e['name']:<16} {'running' if alive(e) else 'ended':<8} process {e['pid']}" for e in entries]
    return lines + [f"{name}: {state[name]}" for name in ("ray", "spark") if name in state]


def down(options: LocalOptions) -> list[str]:
    """Terminate the processes and their children; removes tokens, state and Ray's files, keeps our logs."""
    folder = Path(options.state).absolute()
    ended, state = [], read_state(folder)
    for entry in reversed(state["processes"]):
        if not alive(entry):
            continue
        process = psutil.Process(entry["pid"])
        processes = [process, *process.children(recursive=True)]
        process.terminate()
        psutil.wait_procs(processes, timeout=10)
        for member in processes:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(processes, timeout=10)
        ended.append(f"{entry['name']} ended")
    if "temporary" in state:
        shutil.rmtree(state["temporary"], ignore_errors=True)
    for path in (folder / STATE, folder / "token", folder / "spark" / "spark-defaults.conf"):
        path.unlink(missing_ok=True)
    return ended or ["nothing was running"]
