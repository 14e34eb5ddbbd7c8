"""`python -m etl.package ARCHIVE.zip`: archive this package for the workers of a Spark cluster."""

from __future__ import annotations

import argparse
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
    parser = argparse.ArgumentParser(
        "python -m etl.package", description="Archive the package etl for the workers of a Spark cluster."
    )
    parser.add_argument("archive", type=Path, help="zip file to write, for spark-submit's --py-files")
    archive: Path = parser.parse_args().archive
    archive.parent.mkdir(parents=True, exist_ok=True)
    package(archive)
