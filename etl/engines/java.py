"""Finds the Java that Spark would start, and checks its version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from etl.runtime.errors import InputError

OLDEST_JAVA = 17
INSTALL = "apt-get install openjdk-17-jre-headless, set JAVA_HOME, or make sessions without Spark: engine=local"


@dataclass(frozen=True)
class Java:
    """The Java that Spark would start.

    Attributes:
        path: the executable; None if not found.
        version: major version; None if unknown.
        output: its output, or why it could not be started, on one line.
    """

    path: str | None
    version: int | None
    output: str = ""


def find_java() -> Java:
    """Find the Java of `JAVA_HOME`, else the first on `PATH`, and its version."""
    home = os.environ.get("JAVA_HOME")
    path = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    if not path:
        return Java(None, None)
    try:
        done = subprocess.run([path, "-version"], capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        return Java(path, None, error.strerror or str(error))
    output = " ".join((done.stderr + done.stdout).split())
    version = re.search(r'version "(?:1\.)?(\d+)', output)
    return Java(path, int(version.group(1)) if version else None, output)


def java_version() -> int | None:
    """Major version of the Java that Spark would start, or None without one."""
    return find_java().version


def require_java() -> None:
    """Check for a Java that Spark can use.

    Raises:
        InputError: none of version 17 or newer; names the one found and its output.
    """
    java = find_java()
    if java.version is not None and java.version >= OLDEST_JAVA:
        return
    if java.path is None:
        raise InputError(f"Java {OLDEST_JAVA} or newer", "none", INSTALL)
    origin = " of JAVA_HOME" if os.environ.get("JAVA_HOME") else ""
    result = f"Java {java.version}" if java.version else f"'{java.output[:200] or 'no version'}'"
    raise InputError(f"Java {OLDEST_JAVA} or newer", f"{result} from {java.path}{origin}", INSTALL)
