"""Names of a run's bundles and of what is made from them, and a check for a complete one. Has no heavy imports."""

from __future__ import annotations

from etl.runtime.dataset_folder import MANIFEST
from etl.runtime.output_folder import OutputFolderType, listed_files

RUN_BUNDLE, SELECTED = "bundle", "bundle-selected"
"""Folders of a training run: its bundle, and for a refit model that of before the refit."""
SEARCH_FOLDER = "indexes"
"""Folder next to a bundle: its indexes and counted sources."""
BUNDLE = OutputFolderType(
    "a bundle", MANIFEST, lambda data: listed_files(data, {"dataset", "refit", "n_items"}, MANIFEST)
)
