"""Names of files in a result folder, and whether a result is finished. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

METRICS = "metrics.json"
"""Written last: a folder without it is no result."""
REPORT = "report.html"


def is_result(path: Path) -> bool:
    """Whether a folder is a finished result."""
    return (path / METRICS).is_file()
