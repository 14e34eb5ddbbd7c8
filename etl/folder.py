"""Output folders that are whole or absent, and the one kind of error a user can cause.

A folder is built beside its final place and moved there by one rename, so a reader never meets half
of one, and a run that is killed leaves the old output as it was.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any


class InputError(Exception):
    """Wrong input or option: shown as one line without traceback, exit status 2."""

    def __init__(self, expected: str, got: object, cure: str) -> None:
        self.expected, self.got, self.cure = expected, got, cure
        super().__init__(f"expected {expected}, got {got} ({cure})")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, object, str]]:
        # Crosses process borders (Spark and Ray pickle exceptions by their arguments).
        return InputError, (self.expected, self.got, self.cure)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint_of(value: Any) -> str:
    """SHA-256 in hex of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is complete or absent, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as stream:
        json.dump(value, stream, indent=2, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def staged(output: Path, *, overwrite: bool, is_whole: Callable[[Path], bool]) -> Iterator[Path]:
    """A fresh folder that becomes `output` when the block ends well.

    An existing `output` stays until the new folder is whole. One process at a time may build the
    same output; leftovers of a killed one are removed.

    Raises:
        InputError: `output` exists and is not ours to replace, another process builds it, or the disk is full.
    """
    output = output.absolute()
    refuse_existing(output, overwrite=overwrite, is_whole=is_whole)
    output.parent.mkdir(parents=True, exist_ok=True)
    building, old = (output.with_name(f".{output.name}.{state}") for state in ("building", "old"))
    with locked(output):
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        try:
            yield building
        except BaseException as error:
            shutil.rmtree(building, ignore_errors=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                cure = "free some, or write to another disk; nothing was left of this attempt"
                raise InputError(f"room on the disk of {output.parent}", "a full disk", cure) from None
            raise
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
            output.rename(old)
        building.rename(output)
        shutil.rmtree(old, ignore_errors=True)


def refuse_existing(output: Path, *, overwrite: bool, is_whole: Callable[[Path], bool]) -> None:
    """Check that `output` may be written.

    A folder left by a killed replacement is moved back first. An output of another kind, or a file,
    is never replaced, since `overwrite=true` is no licence to delete a home directory.

    Raises:
        InputError: something stands at `output` that may not be replaced.
    """
    old = output.with_name(f".{output.name}.old")
    if not output.exists() and is_whole(old):
        old.rename(output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise InputError("an output folder that does not exist yet", output, "add overwrite=true")
    if not is_whole(output):
        raise InputError("an output of this program to overwrite", output, "give another output, or remove it")


@contextlib.contextmanager
def locked(output: Path, *, wait_seconds: float = 30.0) -> Iterator[None]:
    """Hold the lock of `output`; the kernel frees it however the process ends.

    Raises:
        InputError: another process still holds it after `wait_seconds`.
    """
    path = output.with_name(f".{output.name}.lock")
    deadline = time.monotonic() + wait_seconds
    while (stream := _try_lock(path)) is None:
        if time.monotonic() > deadline:
            raise InputError("an output that no other process is writing", output, "wait for it to end")
        time.sleep(0.2)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        stream.close()


def _try_lock(path: Path) -> IO[str] | None:
    """The open, locked file, or None while another process holds it."""
    stream = path.open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder before us may have unlinked the file that we opened: then it locks nothing.
        if path.exists() and os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
            return stream
    except (BlockingIOError, FileNotFoundError):
        pass
    stream.close()
    return None
