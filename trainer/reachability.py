"""Checks that workers reach one another, since gloo and NCCL wait for minutes without naming the host.

Each worker opens a port, then connects to one worker of every other host. Independent of Ray.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil

from etl.runtime.errors import InputError
from etl.runtime.reachable import refusal

PATIENCE_SECONDS = 45.0
"""Tolerated outage of a host, for example while its network recovers."""
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

Address = tuple[str, int]

_listening: list[socket.socket] = []
"""This process's open port, from `listen` to `stop_listening`."""


def own_address(node_address: str) -> str:
    """The address that other workers connect to: of the configured network interface, else the node's."""
    for name in filter(None, map(os.environ.get, INTERFACE_VARIABLES)):
        for address in psutil.net_if_addrs().get(name, []):
            if address.family == socket.AF_INET:
                return address.address
    return node_address


def listen(node_address: str) -> Address:
    """Open a port at this worker's address; the kernel accepts connections until `stop_listening`."""
    server = socket.create_server((own_address(node_address), 0), backlog=1_024)
    _listening.append(server)
    return str(server.getsockname()[0]), int(server.getsockname()[1])


def unreachable(targets: Sequence[Address], patience: float = PATIENCE_SECONDS) -> list[str]:
    """The hosts of `targets` that this worker cannot connect to."""
    with ThreadPoolExecutor(max_workers=max(1, min(64, len(targets)))) as pool:
        refusals = pool.map(lambda target: refusal(target[0], target[1], patience), targets)
        return [host for (host, _), why in zip(targets, refusals, strict=True) if why]


def stop_listening() -> None:
    """Close this worker's port."""
    while _listening:
        _listening.pop().close()


def first_of_each_host(addresses: Sequence[Address]) -> list[Address]:
    """One worker's address of every host.

    >>> first_of_each_host([("a", 1), ("a", 2), ("b", 3)])
    [('a', 1), ('b', 3)]
    """
    first: dict[str, Address] = {}
    for host, port in addresses:
        first.setdefault(host, (host, port))
    return list(first.values())


def check(addresses: Sequence[Address], missing: Sequence[Sequence[str]]) -> None:
    """Raise an error if a worker did not reach another.

    Args:
        addresses: addresses of all workers, by rank.
        missing: the hosts that each worker did not reach.

    Raises:
        InputError: names the first worker that is cut off, and from which hosts.
    """
    for (host, _), hosts in zip(addresses, missing, strict=True):
        if hosts:
            raise InputError(
                "training workers that reach one another",
                f"no connection from {host} to {', '.join(hosts)}",
                "open the network between these hosts to all ports, or name theirs: interface=…",
            )
