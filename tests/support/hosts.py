"""Three hosts on one machine: this one, and two network namespaces, joined by a bridge. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest


def needed() -> str | None:
    """Why there can be no hosts here; None where there can."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    if shutil.which("ip") is None:
        return "needs ip (apt-get install iproute2)"
    probe = subprocess.run(["ip", "netns", "add", f"nx{os.getpid()}p"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", f"nx{os.getpid()}p"], capture_output=True)
    return None if probe.returncode == 0 else f"needs network namespaces: {probe.stderr.strip()}"


class Hosts:
    """The hosts: number 1 is this machine, 2 and 3 are namespaces; each has the interface `eth0` or the bridge."""

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
        ip("addr", "add", f"{self.address(1)}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for host in (2, 3):
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
        for host in (2, 3):
            self.kill(host)
        for process in self.processes:
            kill_family(process.pid)
        for host in (2, 3):
            subprocess.run(["ip", "netns", "del", self.space(host)], capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self.tag}b"], capture_output=True)

    def start(self, host: int, name: str, command: list[str], env: dict[str, str], ready: str = "") -> subprocess.Popen:
        """Start a process on a host and wait until its log holds `ready`."""
        log = self.logs / f"{name}.log"
        prefix = ["ip", "netns", "exec", self.space(host)] if host > 1 else []
        with log.open("w") as stream:
            process = subprocess.Popen(
                [*prefix, *command], env=os.environ | env, stdout=stream, stderr=stream, start_new_session=True
            )
        self.processes.append(process)
        deadline = time.monotonic() + 120
        while ready not in log.read_text(errors="replace"):
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(0.2)
        return process

    def kill(self, host: int) -> None:
        """All processes of a host, at once and without a word."""
        pids = subprocess.run(["ip", "netns", "pids", self.space(host)], capture_output=True, text=True).stdout.split()
        for pid in map(int, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def link(self, host: int, state: str) -> None:
        """The host's cable: `up` or `down`."""
        ip("link", "set", f"{self.tag}v{host}", state)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def kill_family(pid: int) -> None:
    """A process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=20)


@contextlib.contextmanager
def three_hosts(logs: Path) -> Iterator[Hosts]:
    """Hosts for a block; the test is skipped with the reason where there can be none."""
    reason = needed()
    if reason:
        pytest.skip(reason)
    hosts = Hosts(logs)
    try:
        hosts.up()
        yield hosts
    finally:
        hosts.down()
