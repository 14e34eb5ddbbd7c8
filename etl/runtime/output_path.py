"""Paths of outputs while they are written: hidden siblings, mount points, file system errors."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from etl.runtime.errors import InputError

OTHER_OUTPUT = "choose another output, or check the folder and its permissions"


@contextlib.contextmanager
def os_errors_as_input_error(output: Path) -> Iterator[None]:
    """Convert errors of the file system to `InputError`."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        got = f"{output}: {error.strerror or error}"
        raise InputError("an output folder that can be written", got, OTHER_OUTPUT) from None


def is_mount_point(output: Path) -> bool:
    """Whether a folder is a mount point: writable, but cannot be renamed."""
    if not output.is_dir():
        return False
    return output.is_mount() or str(output) in _mount_points() or not os.access(output.parent, os.W_OK)


def _mount_points() -> set[str]:
    """All mount points, including bind mounts of the same disk, which `Path.is_mount` misses."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return set()
    return {re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines}


def hidden_sibling(output: Path, state: str) -> Path:
    """The hidden path next to `output` (inside it, if it is a mount point) for a state of its construction."""
    return output / f".{state}" if is_mount_point(output) else output.with_name(f".{output.name}.{state}")
