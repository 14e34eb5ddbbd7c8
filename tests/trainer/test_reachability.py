"""Reachability between workers, with local sockets in place of hosts."""

import socket

import psutil
import pytest

from etl.runtime.errors import InputError
from trainer import reachability
from trainer.reachability import check, first_of_each_host, listen, own_address, stop_listening, unreachable


@pytest.fixture(autouse=True)
def closed():
    yield
    stop_listening()


def test_closed_ports_are_reported_as_unreachable():
    opened = listen("127.0.0.1")
    with socket.create_server(("127.0.0.2", 0)) as server:
        closed = server.getsockname()
    assert unreachable([opened, closed], patience=0.1) == ["127.0.0.2"]
    stop_listening()
    assert unreachable([opened], patience=0.1) == ["127.0.0.1"]
    assert reachability._listening == []


def test_address_is_that_of_gloo_socket_ifname(monkeypatch):
    loopback = next(
        name for name, actual in psutil.net_if_addrs().items() if "127.0.0.1" in [a.address for a in actual]
    )
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", loopback)
    assert own_address("10.0.0.9") == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none")
    assert own_address("10.0.0.9") == "10.0.0.9"


def test_first_disconnected_worker_is_reported_with_the_hosts_it_misses():
    addresses = [("a", 1), ("a", 2), ("b", 3), ("c", 4)]
    assert first_of_each_host(addresses) == [("a", 1), ("b", 3), ("c", 4)]
    check(addresses, [[], [], [], []])
    with pytest.raises(InputError, match="got no connection from b to a, c"):
        check(addresses, [[], [], ["a", "c"], ["b"]])
