"""File hashes, fingerprints of values, atomic files and folders."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint_of(value: Any) -> str:
    """SHA-256 in hex of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """A temporary path next to `path` that replaces it if the block succeeds, and is removed otherwise.

    Readers see either the old or the new file; concurrent writers do not interfere.

    Args:
        path: path of the file; its folder is created.
        sync: whether to flush the file to disk first, so that a power cut leaves no empty file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{os.urandom(4).hex()}{path.suffix}")
    try:
        yield temporary
        if sync:
            sync_to_disk(temporary)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """An empty folder next to `path` that replaces it if the block succeeds, and is removed otherwise.

    One writer at a time: leftovers of a killed writer are removed.

    Args:
        path: path of the folder.
        sync: whether to flush the files and the new name to disk.
    """
    building = path.with_name(f".{path.name}.writing")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        if sync:
            for entry in building.iterdir():
                sync_to_disk(entry)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)  # free the disk space
        raise
    shutil.rmtree(path, ignore_errors=True)
    building.rename(path)
    if sync:
        sync_to_disk(path.parent)


def sync_to_disk(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, also in case of a power cut."""
    with atomic_file(path, sync=True) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
