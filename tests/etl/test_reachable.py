"""Servers that listen, do not listen, start late, or have an unknown host name."""

import socket
import threading

import pytest

from etl.runtime.reachable import refusal, split_address


def test_listening_server_is_reached_and_closed_port_is_reported():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert refusal("127.0.0.1", port) is None
    assert refusal("127.0.0.1", port, patience=0.1) == f"no answer from 127.0.0.1:{port} (Connection refused)"


def test_waits_for_a_server_that_starts_late():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    servers = []
    late = threading.Timer(0.3, lambda: servers.append(socket.create_server(("127.0.0.1", port))))
    late.start()
    assert refusal("127.0.0.1", port, patience=20) is None
    late.join()
    servers[0].close()


def test_unknown_host_name_fails_without_waiting():
    assert refusal("no-such-host.invalid", 1, patience=600) == "no host of the name no-such-host.invalid"


@pytest.mark.parametrize("wrong", ["", ":1", "h:", "h:x", "h:70000", "h:0"])
def test_invalid_addresses_are_rejected(wrong):
    assert split_address(wrong, 1) is None
