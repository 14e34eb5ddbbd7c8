"""File names of a dataset folder, and a check for a complete one. Has no heavy imports."""

from __future__ import annotations

from pathlib import Path

from etl.runtime.output_folder import OutputFolderType, listed_files

MANIFEST = "manifest.json"
"""Written last: a folder without it is not a dataset."""
ITEMS = "items.parquet"
DATASET = OutputFolderType(
    "a dataset", MANIFEST, lambda data: listed_files(data, {"scenario", "protocol", "source"}, MANIFEST)
)


def is_dataset(path: Path) -> bool:
    """Whether a folder is a finished dataset with all its files."""
    return DATASET.has_all_files(path)
