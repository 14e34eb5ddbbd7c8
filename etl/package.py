"""`python -m etl.package ARCHIVE.zip`: archive this package for the workers of a Spark cluster."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def package(path: Path) -> None:
    """Write the package `etl` as a zip archive."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(HERE.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                archive.write(file, file.relative_to(HERE.parent))


if __name__ == "__main__":
    package(Path(sys.argv[1]))
