"""Atomic output folders, written under a lock.

A folder is built next to its final path and moved there by one rename, so a reader never sees a
partial folder, and a killed run leaves the old output unchanged.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from etl.runtime.errors import InputError
from etl.runtime.locks import locked
from etl.runtime.output_path import OTHER_OUTPUT, hidden_sibling, is_mount_point, os_errors_as_input_error


@dataclass(frozen=True)
class OutputFolderType:
    """The output folder type of a program.

    Attributes:
        name: name for error messages.
        last: the file that is written last and marks the folder as complete.
        files: parses the bytes of `last` to the paths of all files of the folder; None if not of this kind.
    """

    name: str
    last: str
    files: Callable[[bytes], set[str] | None]

    def listed(self, folder: Path) -> set[str] | None:
        """The files of a complete folder of this kind; None for other folders."""
        try:
            return self.files((folder / self.last).read_bytes())
        except OSError:
            return None

    def is_complete(self, folder: Path) -> bool:
        """Whether a folder is a complete one of this kind."""
        return self.listed(folder) is not None

    def has_all_files(self, folder: Path) -> bool:
        """Whether a folder is a complete one of this kind and none of its files was deleted since."""
        listed = self.listed(folder)
        return listed is not None and all((folder / name).is_file() for name in listed)


def listed_files(data: bytes, keys: set[str], last: str) -> set[str] | None:
    """The files that a manifest lists under `files`, and itself; None if it lacks one of `keys`."""
    try:
        manifest = json.loads(data)
        if not keys <= manifest.keys():
            return None
        return {last, *(entry if isinstance(entry, str) else str(entry["path"]) for entry in manifest["files"])}
    except (ValueError, AttributeError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def staged(output: Path, kind: OutputFolderType, *, overwrite: bool, inputs: Iterable[str] = ()) -> Iterator[Path]:
    """A new folder that becomes `output` if the block succeeds.

    An existing `output` stays until the new folder is complete. One process at a time may build an output;
    leftovers of a killed one are removed. A symbolic link stays, its target is replaced. If `output` cannot
    be renamed (a mount point, or a read-only parent folder), the new folder is built inside it and its
    entries are moved.

    Raises:
        InputError: `output` cannot be written or may not be replaced, another process builds it, or the disk
            is full.
    """
    output = output.resolve()
    with os_errors_as_input_error(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    with locked(output):
        refuse_existing(output, kind, overwrite=overwrite, inputs=inputs)
        building = hidden_sibling(output, "building")
        with os_errors_as_input_error(output):
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
        try:
            yield building
            with os_errors_as_input_error(output):
                _replace(output, building, kind.last)
        except BaseException as error:
            shutil.rmtree(building, ignore_errors=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                hint = "free disk space, or write to another disk"
                raise InputError(f"room on the disk of {output.parent}", "a full disk", hint) from None
            raise


def refuse_existing(output: Path, kind: OutputFolderType, *, overwrite: bool, inputs: Iterable[str] = ()) -> None:
    """Check that `output` may be written.

    A folder left by a killed replacement is moved back first. Folders of other programs or users are never replaced,
    so that `overwrite=true` cannot delete a home directory.

    Args:
        output: the folder.
        kind: the kind of folder that may be replaced.
        overwrite: whether to replace it.
        inputs: paths of the inputs.

    Raises:
        InputError: an existing `output` may not be replaced, or `output` cannot be written.
    """
    output = output.resolve()
    with os_errors_as_input_error(output):
        _refuse_unwritable(output)
        _restore_interrupted(output, kind)
        entries = _entries(output)
    refuse_inputs(output, inputs)
    if not entries:
        return
    listed = kind.listed(output)
    if not overwrite:
        hint = "add overwrite=true" if listed is not None else "choose another output"
        raise InputError("an output folder that does not exist yet", output, hint)
    if listed is None:
        raise InputError(f"{kind.name} to overwrite, an output of this program", output, "choose another output")
    refuse_unlisted(output, _files(output) - listed)


def refuse_unlisted(output: object, unlisted: set[str]) -> None:
    """Raise `InputError` if files would be deleted that no manifest lists."""
    if unlisted:
        names = ", ".join(sorted(unlisted)[:3])
        more = f" and {len(unlisted) - 3:,} more" if len(unlisted) > 3 else ""
        raise InputError(f"no files of others in {output}", f"{names}{more}", "move them, or choose another output")


def refuse_inputs(output: Path, inputs: Iterable[str]) -> None:
    """Raise `InputError` if an input is the output, or is inside it."""
    for name in inputs:
        path = Path(name).resolve()
        if "://" not in name and (path == output or output in path.parents):
            raise InputError(f"inputs outside the output {output}", name, "choose another output")


def _refuse_unwritable(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise InputError("an output folder", f"the file {output}", "choose another output")
    nearest = next(path for path in (output, *output.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "a folder that cannot be written" if nearest.is_dir() else "a file"
        raise InputError("an output folder that can be written", f"{output}, where {nearest} is {what}", OTHER_OUTPUT)


STATES = ("building", "old", "lock")
"""Hidden siblings of an output (or entries, if siblings are impossible): new folder, replaced folder, lock."""


def _entries(output: Path) -> list[Path]:
    ours = {hidden_sibling(output, state) for state in STATES}
    return [path for path in output.iterdir() if path not in ours] if output.is_dir() else []


def _files(output: Path) -> set[str]:
    """Relative paths of all files and links in a folder, without our temporary ones."""
    result = set()
    for entry in _entries(output):
        below = entry.rglob("*") if entry.is_dir() and not entry.is_symlink() else [entry]
        result |= {path.relative_to(output).as_posix() for path in below if path.is_symlink() or not path.is_dir()}
    return result


def _restore_interrupted(output: Path, kind: OutputFolderType) -> None:
    """Undo a replacement that was killed between moving the old folder away and the new one into place."""
    old = hidden_sibling(output, "old")
    if not kind.is_complete(old) or kind.is_complete(output):
        return
    if is_mount_point(output):
        for entry in _entries(output):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        _move_entries(old, output, kind.last)
    elif not output.exists():
        old.rename(output)


def _replace(output: Path, building: Path, last: str) -> None:
    old = hidden_sibling(output, "old")
    shutil.rmtree(old, ignore_errors=True)
    if is_mount_point(output):
        old.mkdir()
        for entry in sorted(_entries(output), key=lambda path: path.name != last):  # `last` first
            entry.rename(old / entry.name)
        _move_entries(building, output, last)
    else:
        if output.exists():
            output.rename(old)
        building.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _move_entries(source: Path, output: Path, last: str) -> None:
    """Move all entries of a folder, `last` as the last one."""
    for entry in sorted(source.iterdir(), key=lambda path: path.name == last):
        entry.rename(output / entry.name)
    source.rmdir()
