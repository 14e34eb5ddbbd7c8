"""Tenrec's CSV files: headers by scenario, where the files are, and the byte splits of them."""

from __future__ import annotations

import csv
import glob
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pa_fs

from etl.folder import InputError
from etl.remote import filesystem

NULL = "\\N"
SPLIT_BYTES = 64 << 20
"""Fixed, since the order of partial results and the source fingerprint depend on it."""
LONGEST_LINE = 1 << 20

VIDEO = ["user_id", "item_id", "click", "follow", "like", "share", "video_category", "watching_times", "gender", "age"]
ARTICLE_SHORT = [
    *("user_id", "item_id", "click", "gender", "age"),
    *("exposure_count", "click_count", "like_count", "comment_count", "read_percentage"),
    *("item_score1", "item_score2", "category_second", "category_first", "item_score3"),
]
ARTICLE = [*ARTICLE_SHORT, "read", "read_time", "share", "like", "follow", "favorite"]


HISTORY = tuple(f"hist_{place}" for place in range(1, 11))


@dataclass(frozen=True)
class Scenario:
    """The named columns of a log, and the role of some."""

    columns: tuple[str, ...]
    category: str
    history: tuple[str, ...] = ()

    @property
    def actions(self) -> tuple[str, ...]:
        """Feedback columns that this log has."""
        return tuple(a for a in ("like", "share", "follow", "read", "favorite") if a in self.columns)

    @property
    def watching(self) -> bool:
        """Whether the log says how often an item was watched."""
        return "watching_times" in self.columns


SCENARIOS = {
    "qk_video": Scenario(tuple(VIDEO), "video_category"),
    "qb_video": Scenario(tuple(VIDEO), "video_category"),
    "qk_article": Scenario(tuple(ARTICLE), "category_second"),
    "qb_article": Scenario(tuple(ARTICLE_SHORT), "category_second"),
    "sbr": Scenario(tuple(VIDEO), "video_category"),
    "ctr": Scenario((*VIDEO, *HISTORY), "video_category", HISTORY),
}


@dataclass(frozen=True)
class LogFile:
    """One input file: where it is, its size, the columns of its header and where its rows begin."""

    uri: str
    bytes: int
    columns: tuple[str, ...]
    rows_begin: int
    end: int

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.uri.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Split:
    """Bytes `begin..end` of a file; it owns the lines that start in them."""

    index: int
    file: LogFile
    begin: int
    end: int


# ---------------------------------------------------------------------------------------------
# Files and splits


def open_logs(inputs: list[str], scenario: Scenario) -> list[LogFile]:
    """Find the input files in order and check their headers.

    Raises:
        InputError: no such file, an empty one, or a header that lacks a column.
    """
    return [_open_log(uri, scenario) for pattern in inputs for uri in _expand(pattern)]


def open_input(uri: str) -> pa.NativeFile:
    """A stream of a log's bytes, decompressed where its name says so."""
    store, path = filesystem(uri)
    return store.open_input_stream(path, compression="detect")


def _expand(pattern: str) -> list[str]:
    """The files that a path, glob or URI names, globs sorted by path."""
    if not any(c in pattern for c in "*?["):
        return [pattern]
    if "://" not in pattern:
        found = sorted(glob.glob(pattern))
    else:
        store, path = filesystem(pattern)
        folder = path[: re.search(r"[*?\[]", path).start()].rsplit("/", 1)[0]  # type: ignore[union-attr]
        listed = store.get_file_info(pa_fs.FileSelector(folder, recursive=True))
        scheme = pattern[: len(pattern) - len(path)] if pattern.endswith(path) else pattern.split("://")[0] + "://"
        # PurePath.match, not fnmatch: a star must not cross folders, as in a shell.
        found = sorted(scheme + i.path for i in listed if i.is_file and Path(i.path).match(path))
    if not found:
        raise InputError("files that match the input", pattern, "check the pattern")
    return found


def _open_log(uri: str, scenario: Scenario) -> LogFile:
    store, path = filesystem(uri)
    try:
        info = store.get_file_info(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError("a readable input file", f"{uri}: {error}", "check the URI and access") from None
    if not info.is_file:
        raise InputError("an input file", uri, "check the path; no such file")
    with open_input(uri) as stream:
        head = stream.read(LONGEST_LINE)
    if not head.strip():
        raise InputError("a CSV file with a header line", f"{uri}, which is empty", "check the file")
    newline = head.find(b"\n")
    line = head if newline < 0 else head[:newline]
    text = line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r").decode("utf-8", "replace")
    columns = tuple(next(csv.reader([text])))
    for column in scenario.columns:
        if columns.count(column) != 1:
            got = "no such column" if column not in columns else "the column twice"
            raise InputError(
                f"column {column} in the header of {uri}", f"{got} ({text[:120]})", "check scenario=… and the file"
            )
    begin = len(head) if newline < 0 else newline + 1
    return LogFile(uri, info.size, columns, begin, info.size)


def is_gzip(file: LogFile) -> bool:
    """Whether a file is one compressed stream, which can be read only from its start."""
    return file.uri.endswith((".gz", ".bz2", ".zst"))


def make_splits(files: list[LogFile]) -> list[Split]:
    """Cut files into splits at multiples of `SPLIT_BYTES`; a compressed file is one split."""
    splits: list[Split] = []
    for file in files:
        step = file.end if is_gzip(file) else SPLIT_BYTES
        for begin in range(0, file.end, max(step, 1)):
            splits.append(Split(len(splits), file, begin, min(begin + step, file.end)))
    return splits


def first_rows(files: list[LogFile], n: int) -> list[LogFile]:
    """The files cut after the first `n` data rows (non-empty lines) of all of them together."""
    kept: list[LogFile] = []
    for file in files:
        if n <= 0:
            break
        if is_gzip(file):
            raise InputError("plain CSV with protocol.first_rows", file.uri, "decompress the file first")
        end = file.rows_begin
        for line in _lines(file):
            if line.strip(b"\r\n"):
                if n == 0:
                    break
                n -= 1
            end += len(line)
        kept.append(LogFile(file.uri, file.bytes, file.columns, file.rows_begin, end))
    return kept


def _lines(file: LogFile) -> Iterator[bytes]:
    store, path = filesystem(file.uri)
    with store.open_input_file(path) as stream:
        stream.seek(file.rows_begin)
        rest = b""
        while block := stream.read(1 << 20):
            *lines, rest = (rest + block).split(b"\n")
            yield from (line + b"\n" for line in lines)
        if rest:
            yield rest


@dataclass(frozen=True)
class Block:
    """Whole lines of a file, from `offset` on (in decompressed bytes)."""

    data: bytes
    offset: int


def read_blocks(split: Split) -> tuple[Iterator[Block], Callable[[], str]]:
    """The lines that start in a split, and a function giving the SHA-256 of its bytes afterwards."""
    store, path = filesystem(split.file.uri)
    digest = hashlib.sha256()
    if is_gzip(split.file):
        blocks = _stream_blocks(store, path, split.file.rows_begin, digest.update)
    else:
        blocks = _range_block(store, path, split, digest.update)
    return blocks, digest.hexdigest


def _range_block(
    store: pa_fs.FileSystem, path: str, split: Split, update: Callable[[bytes | memoryview], None]
) -> Iterator[Block]:
    with store.open_input_file(path) as stream:
        # A line belongs to the split in which it starts: skip the one under way, finish the last.
        start = max(split.begin, split.file.rows_begin)
        if split.begin > split.file.rows_begin:
            start = _after_newline(stream, split.begin - 1, split)
        update(stream.read_at(min(start, split.end) - split.begin, split.begin))
        if start < split.end:
            end = _after_newline(stream, split.end - 1, split)
            data = stream.read_at(end - start, start)
            update(memoryview(data)[: split.end - start])
            yield Block(data, start)


def _after_newline(stream: pa.NativeFile, offset: int, split: Split) -> int:
    """The offset after the first newline at or after `offset`; the file's end without one.

    Raises:
        InputError: no newline for `LONGEST_LINE` bytes after the split.
    """
    place = offset
    while place < split.file.end:
        piece = stream.read_at(min(1 << 16, split.file.end - place), place)
        newline = piece.find(b"\n")
        if newline >= 0:
            return place + newline + 1
        place += len(piece)
        if place > split.end + LONGEST_LINE:
            got = f"{split.file.uri} at byte {offset}"
            raise InputError(f"lines under {LONGEST_LINE} bytes", got, "check the file")
    return split.file.end


def _stream_blocks(
    store: pa_fs.FileSystem, path: str, begin: int, update: Callable[[bytes | memoryview], None]
) -> Iterator[Block]:
    with store.open_input_stream(path, compression="detect") as stream:
        try:
            update(stream.read(begin))
            offset, rest = begin, b""
            while data := stream.read(SPLIT_BYTES):
                update(data)
                data = rest + data
                cut = data.rfind(b"\n") + 1
                rest = data[cut:]
                if len(rest) > LONGEST_LINE:
                    raise InputError(
                        f"lines under {LONGEST_LINE} bytes", f"{path} near byte {offset}", "check the file"
                    )
                if cut:
                    yield Block(data[:cut], offset)
                offset += cut
            if rest:
                yield Block(rest, offset)
        except OSError as error:
            raise InputError("a whole compressed file", f"{path}: {error}", "fetch or compress it again") from None
