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
    """Set variables of this process for the block (None: unset); afterwards they are as before it."""
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


def of_own_ray() -> dict[str, str | None]:
    """Variables for a Ray that this process starts, which asks for a token by itself: one that is written nowhere.

    Without it Ray writes a token to the user's home folder, and all later ones take it from there. Whoever has chosen a
    token, or none, keeps it.
    """
    mode = os.environ.get(MODE)  # Ray reads it once, when it is imported, and sets it by itself
    if (mode or "token") != "token" or os.environ.get(TOKEN) or os.environ.get(TOKEN_PATH):
        return {MODE: mode}
    return {MODE: mode, TOKEN: _own_token()}


@functools.cache
def _own_token() -> str:
    # Ray reads its token once in a process.
    return secrets.token_hex(32)


def token_header() -> dict[str, str]:
    """The header by which Ray's job server knows its users; none where there is no token.

    It is read where Ray itself looks: `RAY_AUTH_TOKEN`, the file that `RAY_AUTH_TOKEN_PATH` names, `~/.ray/auth_token`.

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
