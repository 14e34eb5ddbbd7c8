"""Servers that answer, do not answer, come late, or have no name."""

import socket
import threading

import pytest

from etl.runtime.reachable import refusal, split_address


def test_a_server_that_listens_is_reached_and_one_that_has_gone_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert refusal("127.0.0.1", port) is None
    assert refusal("127.0.0.1", port, patience=0.1) == f"no answer from 127.0.0.1:{port} (Connection refused)"


def test_a_server_that_comes_late_is_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    servers = []
    late = threading.Timer(0.3, lambda: servers.append(socket.create_server(("127.0.0.1", port))))
    late.start()
    assert refusal("127.0.0.1", port, patience=20) is None
    late.join()
    servers[0].close()


def test_a_name_that_does_not_exist_is_not_waited_for():
    assert refusal("no-such-host.invalid", 1, patience=600) == "no host of the name no-such-host.invalid"


@pytest.mark.parametrize("wrong", ["", ":1", "h:", "h:x", "h:70000", "h:0"])
def test_what_is_no_address(wrong):
    assert split_address(wrong, 1) is None
