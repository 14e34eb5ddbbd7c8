"""Names of the files and folders of a run folder, and whether a run is finished. Has no heavy imports."""

from __future__ import annotations

import json
from pathlib import Path

CONFIG = "config.yaml"
"""The resolved configuration: every run folder has it."""
CHECKPOINTS, REFIT_CHECKPOINTS = "checkpoints", "checkpoints-refit"
"""Folders of the checkpoints: of training with selection, and of a refit."""
SUMMARY = "summary.json"
"""Written last: a run folder with it is finished."""


def is_finished(run: Path) -> bool:
    """Whether a run folder holds a finished run."""
    try:
        return bool(json.loads((run / SUMMARY).read_text())["best_epoch"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
