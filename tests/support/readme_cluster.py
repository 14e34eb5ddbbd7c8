"""Ray and Spark over three hosts, by README's own commands; two of the hosts do not have the code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.hosts import BUSY, NUMBERS, Hosts, Started, kill_family
from tests.support.runs import SMALL

ROOT = Path(__file__).parents[2]
CODE = [ROOT / name for name in ("etl", "trainer", "retrieval", "cluster", "tests")]
OWN_FOLDER = "mkdir -p /tmp/ray\nmount -t tmpfs tmpfs /tmp/ray\n"
"""Gives a host a folder of its own for what Ray unpacks and for the head's address, in its mount namespace."""
HIDE = "".join(f"mount -t tmpfs tmpfs {path}\n" for path in CODE)
"""Hides the code from a host."""
READY = {
    ("ray", True): "Ray runtime started",
    ("ray", False): "Ray runtime started",
    ("spark", True): "I have been elected leader",
    ("spark", False): "Successfully registered",
}
"""What the log of a program holds, on the first host and on others, once it can be used."""
TRAINING = [
    *(o for o in SMALL if not o.startswith(("ray.", "train.epochs"))),
    "train.epochs=5",
    "train.early_stopping_patience=5",
]
"""Options of a training that is short, and long enough to be disturbed in the middle."""
RAY_PORT, DASHBOARD_PORT, SPARK_PORT = 6379, 8265, 7077


def readme_commands() -> list[str]:
    """Of the section on several hosts: keys, every host, the first host, each other host, the pipeline."""
    section = (ROOT / "docs" / "cluster.md").read_text().split("\n## Several hosts\n")[1].split("\n## ")[0]
    return re.findall(r"^```\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)


class ReadmeCluster:
    """A head on host 1 that computes nothing; on hosts 2 and 3 a Ray node of two cores and a Spark worker of one.

    Args:
        hosts: on which nothing runs yet.
        folder: for the shared folder and the logs.
    """

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder, self.shared = hosts, folder, folder / "shared"
        self.keys, self.every, self.first, self.others, self.pipeline = readme_commands()
        self.token, self.spark_conf = self.shared / "keys" / "token", self.shared / "keys"
        self.running: dict[tuple[int, str], Started] = {}
        self.starts = 0

    @property
    def ray(self) -> str:
        return f"http://{self.hosts.address(1)}:{DASHBOARD_PORT}"

    @property
    def spark(self) -> str:
        return f"spark://{self.hosts.address(1)}:{SPARK_PORT}"

    def filled(self, text: str, host: int = 1) -> str:
        """Commands with this test bed's addresses and folder."""
        text = text.replace("HEAD", self.hosts.address(1)).replace("OWN=OWN", f"OWN={self.hosts.address(host)}")
        return text.replace("/shared", str(self.shared))

    def on_every_host(self, host: int = 1) -> str:
        """What README has every host do first, in its environment."""
        return f'PATH="{Path(sys.executable).parent}:$PATH"\n' + self.filled(self.every, host)

    def start(self, *hosts: int, programs: tuple[str, ...] = ("ray", "spark")) -> None:
        """Start what does not run on these hosts, all at once but for the first host's, which the others need."""
        for group in ([h for h in hosts if h == 1], [h for h in hosts if h > 1]):
            started = [self._start(host, program) for host in group for program in programs]
            for program in started:
                program.wait()

    def _start(self, host: int, program: str) -> Started:
        before = self.running.get((host, program))
        if before and before.runs:
            return before
        lines = self.filled(self.first if host == 1 else self.others, host)
        # In the foreground, so that its end is seen; as many cores on any machine.
        lines = lines.replace("ray start", "ray start --block").replace("nohup ", "")
        ray, spark = (line.split(" >")[0] for line in lines.splitlines())
        line = ray if program == "ray" else spark
        if host > 1:
            line += " --num-cpus=2" if program == "ray" else " --cores 1 --memory 1g"
        self.starts += 1
        script = OWN_FOLDER + (HIDE if host > 1 else "") + self.on_every_host(host) + "exec " + line
        env = BUSY | {"RAY_USAGE_STATS_ENABLED": "0", "SPARK_WORKER_DIR": str(self.folder / f"work-{host}")}
        ready = READY[program, host == 1]
        started = self.hosts.start(host, f"{program}-{host}-{self.starts}", ["sh", "-ec", script], env, ready)
        self.running[host, program] = started
        return started

    def kill(self, program: str, *hosts: int) -> None:
        """A program with all that it has started, on these hosts at once."""
        for host in hosts:
            kill_family(self.running[host, program].process.pid)

    def mend(self) -> None:
        """Bring back the Ray that an earlier test left dead or cut off, so that one failure is one failure."""
        for host in NUMBERS:
            self.hosts.link(host, "up")
        if not self.running[1, "ray"].runs:
            self.kill("ray", 2, 3)
        self.start(*NUMBERS, programs=("ray",))

    def logs(self, host: int, program: str) -> str:
        """All that a host's program has written."""
        return "".join(path.read_text(errors="replace") for path in self.folder.glob(f"{program}-{host}-*.log"))

    def ray_nodes(self) -> int:
        """Nodes that Ray counts with."""
        request = urllib.request.Request(
            self.ray + "/nodes?view=summary", headers={"Authorization": f"Bearer {self.token.read_text().strip()}"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            nodes = json.loads(reply.read())["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def env(self) -> dict[str, str]:
        """What README has every host export, for whoever submits."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "SPARK_CONF_DIR": str(self.spark_conf),
        }

    def submit(self, what: str, options: list[str], *, python: str = sys.executable, **env: str) -> subprocess.Popen:
        """`python -m cluster submit=…` to the head."""
        line = [sys.executable, "-m", "cluster", f"submit={what}", "target=ray", f"address={self.ray}"]
        line += [f"python={python}", "interface=eth0", f"options={' '.join(options)}"]
        return self.popen(line, **env)

    def watched(self, process: subprocess.Popen, program: str) -> tuple[str, frozenset[int]]:
        """Follow a process to its end: its output, and which of hosts 2 and 3 ran a program meanwhile."""
        seen = set[int]()
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(process.communicate)
            while not reading.done():
                seen |= {host for host in (2, 3) if self.hosts.run(host, program)}
                time.sleep(0.2)
        return reading.result()[0], frozenset(seen)

    def popen(self, line: list[str], host: int | None = None, **env: str) -> subprocess.Popen:
        """A command of this machine, or of a host, with the cluster's keys."""
        return subprocess.Popen(
            self.hosts.on(host, *line) if host else line,
            cwd=ROOT,
            env=os.environ | self.env() | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
