"""Ray and Spark over three hosts, started by README's commands; two of the hosts do not have the code."""

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
"""Gives a host its own `/tmp/ray` (for unpacked packages and the head's address), in its mount namespace."""
HIDE = "".join(f"mount -t tmpfs tmpfs {path}\n" for path in CODE)
"""Hides the code from a host."""
READY = {
    ("ray", True): "Ray runtime started",
    ("ray", False): "Ray runtime started",
    ("spark", True): "I have been elected leader",
    ("spark", False): "Successfully registered",
}
"""Text in the log of a program once it is ready, on the first host and on the others."""
TRAINING = [
    *(o for o in SMALL if not o.startswith(("ray.", "train.epochs"))),
    "train.epochs=5",
    "train.early_stopping_patience=5",
]
"""Options of a training that is short, but long enough to be disturbed in the middle."""
RAY_PORT, DASHBOARD_PORT, SPARK_PORT = 6379, 8265, 7077


def readme_commands() -> list[str]:
    """Commands of the section on several hosts: keys, every host, the first host, each other host, the pipeline."""
    section = (ROOT / "docs" / "cluster.md").read_text().split("\n## Several hosts\n")[1].split("\n## ")[0]
    return re.findall(r"^```\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)


class ReadmeCluster:
    """A head on host 1 without workers; on hosts 2 and 3 a Ray node of two cores and a Spark worker of one.

    Args:
        hosts: with nothing running yet.
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
        """Commands with the addresses and folder of this cluster filled in."""
        text = text.replace("HEAD", self.hosts.address(1)).replace("OWN=OWN", f"OWN={self.hosts.address(host)}")
        return text.replace("/shared", str(self.shared))

    def on_every_host(self, host: int = 1) -> str:
        """The commands that README runs first on every host."""
        return f'PATH="{Path(sys.executable).parent}:$PATH"\n' + self.filled(self.every, host)

    def start(self, *hosts: int, programs: tuple[str, ...] = ("ray", "spark")) -> None:
        """Start programs that do not run on these hosts: those of the first host, then all others at once."""
        for group in ([h for h in hosts if h == 1], [h for h in hosts if h > 1]):
            started = [self._start(host, program) for host in group for program in programs]
            for program in started:
                program.wait()

    def _start(self, host: int, program: str) -> Started:
        before = self.running.get((host, program))
        if before and before.runs:
            return before
        lines = self.filled(self.first if host == 1 else self.others, host)
        # In the foreground, so that its exit is noticed; with a fixed number of cores on any machine.
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
        """Kill a program and its descendants on these hosts."""
        for host in hosts:
            kill_family(self.running[host, program].process.pid)

    def mend(self) -> None:
        """Restart the Ray that an earlier test left dead or disconnected, so that one failure does not cause others."""
        for host in NUMBERS:
            self.hosts.link(host, "up")
        if not self.running[1, "ray"].runs:
            self.kill("ray", 2, 3)
        self.start(*NUMBERS, programs=("ray",))

    def logs(self, host: int, program: str) -> str:
        """All logs of a program on a host."""
        return "".join(path.read_text(errors="replace") for path in self.folder.glob(f"{program}-{host}-*.log"))

    def ray_nodes(self) -> int:
        """Number of nodes that Ray considers alive."""
        request = urllib.request.Request(
            self.ray + "/nodes?view=summary", headers={"Authorization": f"Bearer {self.token.read_text().strip()}"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            nodes = json.loads(reply.read())["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def env(self) -> dict[str, str]:
        """The variables that README exports on every host, for clients that submit."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "SPARK_CONF_DIR": str(self.spark_conf),
        }

    def submit(self, what: str, options: list[str], *, python: str = sys.executable, **env: str) -> subprocess.Popen:
        """Run `python -m cluster submit=…` against the head."""
        line = [sys.executable, "-m", "cluster", f"submit={what}", "target=ray", f"address={self.ray}"]
        line += [f"python={python}", "interface=eth0", f"options={' '.join(options)}"]
        return self.popen(line, **env)

    def watched(self, process: subprocess.Popen, program: str) -> tuple[str, frozenset[int]]:
        """Wait for a process; return its output, and which of hosts 2 and 3 ran a program meanwhile."""
        seen = set[int]()
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(process.communicate)
            while not reading.done():
                seen |= {host for host in (2, 3) if self.hosts.run(host, program)}
                time.sleep(0.2)
        return reading.result()[0], frozenset(seen)

    def popen(self, line: list[str], host: int | None = None, **env: str) -> subprocess.Popen:
        """Run a command on this machine, or on a host, with the cluster's keys."""
        return subprocess.Popen(
            self.hosts.on(host, *line) if host else line,
            cwd=ROOT,
            env=os.environ | self.env() | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
