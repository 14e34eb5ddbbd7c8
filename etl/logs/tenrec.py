"""Tenrec's CSV format: headers by scenario, and input files."""

from __future__ import annotations

import csv
import glob
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pa_fs

from etl.logs.splits import LogFile, readable
from etl.runtime.errors import InputError
from etl.runtime.object_store import filesystem

NULL = "\\N"
_READABLE = 128 << 10
"""Longest field in characters that the csv module accepts."""
LONGEST_HEADER = 1 << 20

VIDEO = ["user_id", "item_id", "click", "follow", "like", "share", "video_category", "watching_times", "gender", "age"]
ARTICLE_SHORT = [
    *("user_id", "item_id", "click", "gender", "age"),
    *("exposure_count", "click_count", "like_count", "comment_count", "read_percentage"),
    *("item_score1", "item_score2", "category_second", "category_first", "item_score3"),
]
ARTICLE = [*ARTICLE_SHORT, "read", "read_time", "share", "like", "follow", "favorite"]


HISTORY = tuple(f"hist_{number}" for number in range(1, 11))


@dataclass(frozen=True)
class Scenario:
    """The columns of a log and their roles."""

    columns: tuple[str, ...]
    category: str
    history: tuple[str, ...] = ()

    @property
    def actions(self) -> tuple[str, ...]:
        """Feedback columns that this log has."""
        return tuple(a for a in ("like", "share", "follow", "read", "favorite") if a in self.columns)

    @property
    def required(self) -> tuple[str, ...]:
        """Required columns; others may be absent, their values are then null."""
        return tuple(name for name in ("user_id", "item_id", "click", *self.history) if name in self.columns)

    @property
    def used(self) -> tuple[str, ...]:
        """Columns that are read if a file has them."""
        read = (*self.required, *self.actions, self.category, "watching_times", "gender", "age")
        return tuple(name for name in read if name in self.columns)

    @property
    def watching(self) -> bool:
        """Whether the log has watch counts."""
        return "watching_times" in self.columns


SCENARIOS = {
    "qk_video": Scenario(tuple(VIDEO), "video_category"),
    "qb_video": Scenario(tuple(VIDEO), "video_category"),
    "qk_article": Scenario(tuple(ARTICLE), "category_second"),
    "qb_article": Scenario(tuple(ARTICLE_SHORT), "category_second"),
    "sbr": Scenario(tuple(VIDEO), "video_category"),
    "ctr": Scenario((*VIDEO, *HISTORY), "video_category", HISTORY),
}


# ---------------------------------------------------------------------------------------------
# Input files


def open_logs(inputs: list[str], scenario: Scenario) -> list[LogFile]:
    """Find the input files, in order, and check their headers.

    Raises:
        InputError: a missing or empty file, or a header that lacks a column.
    """
    return [_open_log(uri, scenario) for pattern in inputs for uri in expand_input(pattern)]


def expand_input(pattern: str) -> list[str]:
    """The files of a path, glob or URI; globs are sorted by path."""
    if not any(c in pattern for c in "*?[") or ("://" not in pattern and Path(pattern).is_file()):
        return [pattern]
    if "://" not in pattern:
        result = sorted(glob.glob(pattern))
    else:
        store, path = filesystem(pattern)
        folder = path[: re.search(r"[*?\[]", path).start()].rsplit("/", 1)[0]  # type: ignore[union-attr]
        with readable(pattern):
            listed = store.get_file_info(pa_fs.FileSelector(folder, recursive=True, allow_not_found=True))
        scheme = pattern[: len(pattern) - len(path)] if pattern.endswith(path) else pattern.split("://")[0] + "://"
        # PurePath.match, not fnmatch: as in a shell, a star does not match across folders.
        result = sorted(scheme + i.path for i in listed if i.is_file and Path(i.path).match(path))
    if not result:
        raise InputError("files that match the input", pattern, "check the pattern")
    return result


def _open_log(uri: str, scenario: Scenario) -> LogFile:
    store, path = filesystem(uri)
    with readable(uri):
        info = store.get_file_info(path)
        if not info.is_file:
            got = f"the folder {uri}" if info.type == pa_fs.FileType.Directory else f"{uri}: no such file"
            raise InputError("an input file", got, "check the path; a glob takes the files of a folder")
        with store.open_input_stream(path, compression=None) as stream:
            compression = _compression(uri, stream.read(8))
        with store.open_input_stream(path, compression=compression) as stream:
            head = stream.read(LONGEST_HEADER)
    if not head.strip():
        raise InputError("a CSV file with a header line", f"{uri}, which is empty", "check the file")
    ends_in_cr = b"\r" in head and b"\n" not in head
    end = head.find(b"\r" if ends_in_cr else b"\n")
    line = head if end < 0 else head[:end]
    columns = read_header(uri, line, scenario)
    return LogFile(uri, info.size, columns, len(line) + (end >= 0), info.size, compression, ends_in_cr)


_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
_FOREIGN = {
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"\xfd7zXZ": ("an xz file", "unpack it"),
    b"PAR1": ("a Parquet file", "set input to the CSV file"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
    b"{": ("JSON", "set input to the CSV file"),
    b"[": ("JSON", "set input to the CSV file"),
}


def _compression(uri: str, head: bytes) -> str | None:
    """Compression of a file, detected from its first bytes.

    Raises:
        InputError: an unsupported file type.
    """
    for magic, (kind, hint) in _FOREIGN.items():
        if head.startswith(magic):
            raise InputError("a CSV file, plain or gzip", f"{kind}: {uri}", hint)
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)


def read_header(uri: str, line: bytes, scenario: Scenario) -> tuple[str, ...]:
    """The column names of a header line.

    Raises:
        InputError: a missing or duplicate column, or the line is not a header of this format.
    """
    text = line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r").decode("utf-8", "replace")
    where, shown = f"the header of {uri}", ascii(text[:120])[1:-1] if not text.isprintable() else text[:120]
    if "\r" in text:
        raise InputError(f"one kind of line ends in {where}", shown, "end lines by LF, CR or CR LF")
    columns = tuple(name.strip() for name in next(csv.reader([text[:_READABLE]])))
    if re.fullmatch(r"[\d\s.,;-]+", text):
        raise InputError("a header line", f"a row: {shown}", f"put the names {','.join(scenario.required)},… above it")
    for other, name in ((";", "semicolons"), ("\t", "tabs")):
        if other in text and "," not in text:
            raise InputError(f"commas between the columns of {uri}", name, "write it with commas")
    folded = {name.casefold(): name for name in columns}
    for column in scenario.columns:
        got = columns.count(column)
        if got > 1:
            raise InputError(f"column {column} in {where}", f"the column twice ({shown})", "remove one of them")
        if not got and column.casefold() in folded:
            other = folded[column.casefold()]
            raise InputError(f"column {column} in {where}", f"{other}", "write the name in lower case")
        if not got and column in scenario.required:
            raise InputError(
                f"column {column} in {where}", f"no such column ({shown})", "check scenario=… and the file"
            )
    return columns


def absent_columns(files: list[LogFile], scenario: Scenario) -> list[str]:
    """Columns that would be read but are in no file."""
    return [name for name in scenario.used if not any(name in file.columns for file in files)]
