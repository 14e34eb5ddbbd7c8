"""Three hosts on one machine: network namespaces, connected to the machine by a bridge. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest


def needed() -> str | None:
    """The reason why hosts cannot be created here; None if they can."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    if shutil.which("ip") is None:
        return "needs ip (apt-get install iproute2)"
    probe = subprocess.run(["ip", "netns", "add", f"nx{os.getpid()}p"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", f"nx{os.getpid()}p"], capture_output=True)
    return None if probe.returncode == 0 else f"needs network namespaces: {probe.stderr.strip()}"


NUMBERS = (1, 2, 3)
START_SECONDS = 300
BUSY = {"RAY_raylet_start_wait_time_s": "200", "RAY_memory_monitor_refresh_ms": "0", "RAY_worker_niceness": "0"}
"""For Ray on a machine that is used by others too: it may start slowly, does not kill workers because of other
programs' memory, and does not lower its workers' priority."""


@dataclass
class Started:
    """A process on a host, its log, and the text that its log contains once it is ready."""

    process: subprocess.Popen
    log: Path
    ready: str

    def wait(self) -> None:
        """Wait until it is ready."""
        deadline = time.monotonic() + START_SECONDS
        while self.ready not in self.log.read_text(errors="replace"):
            message = self.log.read_text(errors="replace")[-3000:]
            assert self.runs, message
            assert time.monotonic() < deadline, message
            time.sleep(0.1)

    @property
    def runs(self) -> bool:
        return self.process.poll() is None


class Hosts:
    """The hosts, each a namespace with the interface `eth0`; the machine reaches them over the bridge."""

    def __init__(self, logs: Path) -> None:
        self.tag, self.logs = f"nx{os.getpid() % 10_000}", logs
        self.net = f"10.{77 + os.getpid() % 50}.{os.getpid() % 250}"
        self.processes: list[subprocess.Popen] = []

    def address(self, host: int) -> str:
        return f"{self.net}.{host}"

    def space(self, host: int) -> str:
        return f"{self.tag}h{host}"

    def up(self) -> None:
        bridge = f"{self.tag}b"
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", f"{self.net}.254/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for host in NUMBERS:
            space, here, there = self.space(host), f"{self.tag}v{host}", f"{self.tag}e{host}"
            ip("netns", "add", space)
            ip("link", "add", here, "type", "veth", "peer", "name", there)
            ip("link", "set", here, "master", bridge, "up")
            ip("link", "set", there, "netns", space)
            for line in (
                ("link", "set", there, "name", "eth0"),
                ("addr", "add", f"{self.address(host)}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("link", "set", "lo", "up"),
            ):
                ip("-n", space, *line)

    def down(self) -> None:
        for host in NUMBERS:
            self.kill(host)
        for process in self.processes:
            process.wait(timeout=20)
        for host in NUMBERS:
            subprocess.run(["ip", "netns", "del", self.space(host)], capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self.tag}b"], capture_output=True)

    def on(self, host: int, *command: str) -> list[str]:
        """The command line that runs a command on a host."""
        return ["ip", "netns", "exec", self.space(host), *command]

    def start(self, host: int, name: str, command: list[str], env: dict[str, str], ready: str) -> Started:
        """Start a process on a host; it is ready when its log contains `ready`."""
        log = self.logs / f"{name}.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                self.on(host, *command), env=os.environ | env, stdout=stream, stderr=stream, start_new_session=True
            )
        self.processes.append(process)
        return Started(process, log, ready)

    def pids(self, host: int) -> list[int]:
        """Process ids of a host."""
        actual = subprocess.run(["ip", "netns", "pids", self.space(host)], capture_output=True, text=True)
        return [int(pid) for pid in actual.stdout.split()]

    def run(self, host: int, program: str) -> bool:
        """Whether a host runs a process whose command line contains `program`."""
        for pid in self.pids(host):
            with contextlib.suppress(psutil.NoSuchProcess):
                if program in " ".join(psutil.Process(pid).cmdline()):
                    return True
        return False

    def kill(self, host: int) -> None:
        """Kill all processes of a host at once, with SIGKILL."""
        pids = self.pids(host)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            if process.pid in pids:
                process.wait(timeout=20)

    def link(self, host: int, state: str) -> None:
        """Set the host's network link `up` or `down`."""
        ip("link", "set", f"{self.tag}v{host}", state)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def kill_family(pid: int) -> None:
    """Kill a process and its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=20)


@contextlib.contextmanager
def three_hosts(logs: Path) -> Iterator[Hosts]:
    """Hosts for a block; skips the test with the reason if they cannot be created."""
    reason = needed()
    if reason:
        pytest.skip(reason)
    hosts = Hosts(logs)
    try:
        hosts.up()
        yield hosts
    finally:
        hosts.down()
