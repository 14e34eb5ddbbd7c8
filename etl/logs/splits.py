"""Byte ranges of logs: splits for tasks, and reading in blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pa_fs

from etl.runtime.errors import InputError
from etl.runtime.object_store import filesystem

BLOCK_BYTES = 64 << 20
"""Bytes read at once from a compressed file."""

LONGEST_LINE = 64 << 20
"""A longer line is an error, since a task holds it in memory; long ones below that are quarantined."""

COMPRESSION_RATIO = 8
"""Typical ratio of a log's size to that of its compressed file."""


@dataclass(frozen=True)
class LogFile:
    """One input file.

    Attributes:
        uri: its path or URI.
        bytes: its size.
        columns: column names in its header.
        rows_begin: offset of the first row in the decompressed text.
        end: end of its rows; size of the file if it is compressed.
        compression: Arrow's name of it, None for plain text; detected by content.
        ends_in_cr: whether lines end in a lone carriage return.
    """

    uri: str
    bytes: int
    columns: tuple[str, ...]
    rows_begin: int
    end: int
    compression: str | None = None
    ends_in_cr: bool = False

    @property
    def unpacked_bytes(self) -> int:
        """Size of its text in bytes, estimated if it is compressed."""
        return self.bytes * (COMPRESSION_RATIO if self.compression else 1)

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


@contextlib.contextmanager
def readable(uri: str) -> Iterator[None]:
    """Convert errors of the file system or decompressor to `InputError`."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        message = str(error).splitlines()[0]
        if "decompress" in message or "runcated" in message or "zlib" in message:
            raise InputError("a complete compressed file", f"{uri}: {message}", "copy or compress it again") from None
        raise InputError("a readable input file", f"{uri}: {message}", "check the path and its permissions") from None


def make_splits(files: list[LogFile], split_bytes: int) -> list[Split]:
    """Cut files into splits at multiples of `split_bytes`; a compressed file is a single split."""
    splits: list[Split] = []
    for file in files:
        step = file.end if file.compression else split_bytes
        for begin in range(0, file.end, max(step, 1)):
            splits.append(Split(len(splits), file, begin, min(begin + step, file.end)))
    return splits


def first_rows(files: list[LogFile], n: int) -> list[LogFile]:
    """The files truncated to the first `n` data rows (non-empty lines) in total."""
    included: list[LogFile] = []
    for file in files:
        if n <= 0:
            break
        if file.compression:
            raise InputError("plain CSV with protocol.first_rows", file.uri, "decompress the file first")
        end = file.rows_begin
        for line in _lines(file):
            if line.strip(b"\r\n"):
                if n == 0:
                    break
                n -= 1
            end += len(line)
        included.append(dataclasses.replace(file, end=end))
    return included


def _lines(file: LogFile) -> Iterator[bytes]:
    store, path = filesystem(file.uri)
    with store.open_input_file(path) as stream:
        stream.seek(file.rows_begin)
        newline, rest = _newline(file), b""
        while block := stream.read(1 << 20):
            *lines, rest = (rest + block).split(newline)
            yield from (line + newline for line in lines)
        if rest:
            yield rest


@dataclass(frozen=True)
class Block:
    """Complete lines of a file, starting at `offset` (in decompressed bytes)."""

    data: bytes
    offset: int


def read_blocks(split: Split) -> tuple[Iterator[Block], Callable[[], str]]:
    """The lines that start in a split, and a function that returns the SHA-256 of its bytes afterwards."""
    store, path = filesystem(split.file.uri)
    digest = hashlib.sha256()
    if split.file.compression:
        blocks = _stream_blocks(store, path, split.file, digest.update)
    else:
        blocks = _range_block(store, path, split, digest.update)
    return blocks, digest.hexdigest


def _range_block(
    store: pa_fs.FileSystem, path: str, split: Split, update: Callable[[bytes | memoryview], None]
) -> Iterator[Block]:
    with store.open_input_file(path) as stream:
        # A line belongs to the split in which it starts: skip a partial first line, complete the last.
        start = max(split.begin, split.file.rows_begin)
        if split.begin > split.file.rows_begin:
            start = _after_newline(stream, split.begin - 1, split)
        update(stream.read_at(min(start, split.end) - split.begin, split.begin))
        if start < split.end:
            end = _after_newline(stream, split.end - 1, split)
            data = stream.read_at(end - start, start)
            update(memoryview(data)[: split.end - start])
            yield Block(_with_line_feeds(data, split.file), start)


def _newline(file: LogFile) -> bytes:
    return b"\r" if file.ends_in_cr else b"\n"


def _with_line_feeds(data: bytes, file: LogFile) -> bytes:
    """Normalise line ends to line feeds."""
    return data.replace(b"\r", b"\n") if file.ends_in_cr else data


def _after_newline(stream: pa.NativeFile, offset: int, split: Split) -> int:
    """The offset after the first newline at or after `offset`; the file's end if there is none.

    Raises:
        InputError: no newline for `LONGEST_LINE` bytes after the split.
    """
    position = offset
    while position < split.file.end:
        piece = stream.read_at(min(1 << 16, split.file.end - position), position)
        newline = piece.find(_newline(split.file))
        if newline >= 0:
            return position + newline + 1
        position += len(piece)
        if position > split.end + LONGEST_LINE:
            got = f"{split.file.uri} at byte {offset}"
            raise InputError(f"lines under {LONGEST_LINE >> 20} MiB", got, "check the file")
    return split.file.end


def _stream_blocks(
    store: pa_fs.FileSystem, path: str, file: LogFile, update: Callable[[bytes | memoryview], None]
) -> Iterator[Block]:
    with readable(file.uri), store.open_input_stream(path, compression=file.compression) as stream:
        update(stream.read(file.rows_begin))
        offset, rest = file.rows_begin, b""
        while data := stream.read(BLOCK_BYTES):
            update(data)
            data = rest + data
            cut = data.rfind(_newline(file)) + 1
            rest = data[cut:]
            if len(rest) > LONGEST_LINE:
                got = f"{path} near byte {offset}"
                raise InputError(f"lines under {LONGEST_LINE >> 20} MiB", got, "check the file")
            if cut:
                yield Block(_with_line_feeds(data[:cut], file), offset)
            offset += cut
        if rest:
            yield Block(_with_line_feeds(rest, file), offset)
