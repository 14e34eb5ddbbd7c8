"""Names of a run's bundles, and a check for a complete one. Has no heavy imports."""

from __future__ import annotations

from etl.runtime.dataset_folder import MANIFEST
from etl.runtime.output_folder import OutputFolderType, listed_files

RUN_BUNDLE, SELECTED = "bundle", "bundle-selected"
"""Folders of a training run: its bundle, and for a refit model that of before the refit."""
BUNDLE = OutputFolderType(
    "a bundle", MANIFEST, lambda data: listed_files(data, {"dataset", "refit", "n_items"}, MANIFEST)
)
