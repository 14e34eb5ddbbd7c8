"""Checks that a server accepts connections, since clients would wait for minutes."""

from __future__ import annotations

import socket
import time
from contextlib import closing

from etl.runtime.errors import InputError

CONNECT_SECONDS = 5.0
RETRY_SECONDS = 0.5


def refusal(host: str, port: int, patience: float = 3.0) -> str | None:
    """Why an address does not accept connections; None if it does.

    Args:
        host: name or address.
        port: TCP port.
        patience: seconds to retry a server that does not respond; an unknown name is not retried.
    """
    deadline = time.monotonic() + patience
    while True:
        timeout = max(RETRY_SECONDS, min(CONNECT_SECONDS, deadline - time.monotonic()))
        try:
            with closing(socket.create_connection((host, port), timeout)):
                return None
        except socket.gaierror:
            return f"no host of the name {host}"
        except OSError as error:
            if time.monotonic() + RETRY_SECONDS > deadline:
                return f"no answer from {host}:{port} ({error.strerror or error})"
        time.sleep(RETRY_SECONDS)


def split_address(address: str, default_port: int) -> tuple[str, int] | None:
    """Host and port of `HOST:PORT`, `HOST` or `[IPv6]:PORT`; None for other texts.

    >>> split_address("head:6379", 1), split_address("[::1]:7077", 1), split_address("head", 1)
    (('head', 6379), ('::1', 7077), ('head', 1))
    """
    host, colon, port = address.rpartition(":") if not address.endswith("]") else (address, "", "")
    if not colon:
        host, port = address, str(default_port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        return None
    return host, int(port)


def require_master(master: str) -> None:
    """Check that one of the masters of a `spark://` address accepts connections; skip other addresses.

    Raises:
        InputError: none does.
    """
    if not master.startswith("spark://"):
        return
    addresses = [split_address(address, default_port=7077) for address in master.removeprefix("spark://").split(",")]
    refusals = [refusal(*address) if address else "no HOST:PORT" for address in addresses]
    if all(refusals):
        hint = "start it (python -m cluster action=up), or correct the address"
        raise InputError(f"a Spark master at {master}", "; ".join(map(str, refusals)), hint)
