"""Environment variables for Ray, and the authentication token of a local Ray cluster and its clients."""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etl.runtime.errors import InputError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Set environment variables within the block (None = unset) and restore them afterwards."""
    before = {name: os.environ.get(name) for name in values}
    try:
        _set(values)
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def local_ray_environment() -> dict[str, str | None]:
    """Variables for a Ray started by this process: token authentication with a token that is not written to disk.

    Otherwise Ray writes a token to the user's home folder and reuses it later. A token or mode set by the user is kept.
    """
    mode = os.environ.get(MODE)  # Ray reads it once, on import, and may set it
    if (mode or "token") != "token" or os.environ.get(TOKEN) or os.environ.get(TOKEN_PATH):
        return {MODE: mode}
    return {MODE: mode, TOKEN: _own_token()}


@functools.cache
def _own_token() -> str:
    # Ray reads its token once per process.
    return secrets.token_hex(32)


def token_header() -> dict[str, str]:
    """The authentication header for Ray's job server; empty without a token.

    Read where Ray looks: `RAY_AUTH_TOKEN`, the file that `RAY_AUTH_TOKEN_PATH` names, `~/.ray/auth_token`.

    Raises:
        InputError: the file cannot be read.
    """
    if os.environ.get(MODE, "token").lower() != "token":
        return {}
    token = os.environ.get(TOKEN, "")
    path = Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")
    try:
        token = token or path.read_text().strip()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise InputError(f"Ray's token in {path}", str(error), f"set {TOKEN_PATH} to the cluster's file") from None
    return {"Authorization": f"Bearer {token}"} if token else {}
