"""File locks: one writer at a time per output folder.

Unlike `filelock`, removes the lock file on release, so that nothing is left next to an output.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from etl.runtime.errors import InputError
from etl.runtime.output_path import hidden_sibling, os_errors_as_input_error

UNLOCKED = "an output that no other process is writing"
"""What was expected where another process holds the lock."""


@contextlib.contextmanager
def locked(output: Path, *, wait_seconds: float = 30.0) -> Iterator[None]:
    """Hold the lock of `output`; the kernel releases it when the process ends.

    Raises:
        InputError: another process still holds it after `wait_seconds`.
    """
    with os_errors_as_input_error(output):
        path = hidden_sibling(output, "lock")
    deadline = time.monotonic() + wait_seconds
    while (stream := _try_lock(path)) is None:
        if time.monotonic() > deadline:
            raise InputError(UNLOCKED, output, "wait for it to end")
        time.sleep(0.2)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        stream.close()


def _try_lock(path: Path) -> IO[str] | None:
    """The open, locked file, or None while another process holds it."""
    with os_errors_as_input_error(path):
        stream = path.open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The previous holder may have unlinked the file that we opened: then the lock is void.
        if path.exists() and os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
            return stream
    except (BlockingIOError, FileNotFoundError):
        pass
    stream.close()
    return None
