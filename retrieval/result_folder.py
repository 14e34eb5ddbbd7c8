"""File names of a result folder, and a check for one. Has no heavy imports."""

from __future__ import annotations

import json
from pathlib import Path

from etl.runtime.output_folder import OutputFolderType, listed_files

METRICS = "metrics.json"
"""Written last: a folder without it is not a result."""
REPORT = "report.html"
TOPK = "topk.parquet"
RANKS = "ranks.parquet"


def _files(data: bytes) -> set[str] | None:
    return listed_files(data, {"ties", "candidates", "files"}, METRICS) or _unlisted_files(data)


def _unlisted_files(data: bytes) -> set[str] | None:
    """Possible files of results from before files were listed."""
    try:
        return {METRICS, REPORT, TOPK, RANKS} if {"ties", "candidates"} <= json.loads(data).keys() else None
    except (ValueError, AttributeError):
        return None


RESULT = OutputFolderType("a result", METRICS, _files)


def is_result(path: Path) -> bool:
    """Whether a folder is a finished result with all its files."""
    return RESULT.has_all_files(path)
