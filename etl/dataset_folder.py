"""Names of files in a dataset folder, and whether a folder is one. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

MANIFEST = "manifest.json"
"""Written last: a folder without it is no dataset."""
ITEMS = "items.parquet"


def is_dataset(path: Path) -> bool:
    """Whether a folder is a finished dataset."""
    return (path / MANIFEST).is_file() and (path / ITEMS).is_file()
