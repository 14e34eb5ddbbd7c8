"""Parses lines of a log into typed columns, with the reasons why rows are quarantined.

Arrow parses a block at once. If Arrow or a check of the values fails, the block is halved until few
lines are left, which are then checked one by one.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from etl.config import SPLIT_BYTES
from etl.logs.splits import Block, LogFile, make_splits, read_blocks
from etl.logs.tenrec import NULL, Scenario

FEW_BYTES = 4096
"""Failed blocks are halved down to this size before their lines are checked one by one."""


@dataclass(frozen=True)
class BadRow:
    """A quarantined row."""

    file: str
    byte_offset: int
    reason: str
    text: str


class _InDoubtError(Exception):
    """Arrow parsed the block, but a value or byte in it may be invalid."""


_NULLS = ("", NULL)
_FLAGS = {"True": "1", "true": "1", "TRUE": "1", "False": "0", "false": "0", "FALSE": "0"}
_SURROGATE = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, as decoded by `surrogateescape`
_INTEGER = re.compile(r"(-?)0*(\d+)(?:\.0*)?", re.ASCII)
_DECIMAL = re.compile(r"(-?)0*(\d+\.\d*[1-9])0*", re.ASCII)
_LONGEST_NUMBER = 19
"""Digits of 2^63 - 1."""
_LONGEST_FIELD = 128 << 10
"""Longest line in bytes that the csv module accepts."""
_INT8 = (-128, 127)
_LIMITS = {"watching_times": (0, 2**31 - 1), "gender": _INT8, "age": _INT8}
_ID_LIMITS = (0, 2**63 - 1)
_TEXT = pa.dictionary(pa.int32(), pa.string())


def parse_file(file: LogFile, scenario: Scenario) -> Iterator[tuple[list[pa.Table], list[BadRow]]]:
    """The results of `Parser.parse` for each block of a file."""
    parser = Parser(scenario, file)
    for split in make_splits([file], SPLIT_BYTES):
        for block in read_blocks(split)[0]:
            yield parser.parse(block)


class Parser:
    r"""Parses lines of files with one header into typed columns, and reports invalid rows.

    An empty field and `\N` are null; an integer may be written ` 1`, `01`, `1.0` or `"1"`, a flag also `True`.

    Columns of the result: `user_id`, `item_id` int64 and not null; `click` and the scenario's actions
    0 or 1, where null of an action other than the click reads as 0; `watching_times` (null = 0),
    `gender`, `age` (nullable); history columns int64 (null = 0); the category dictionary-encoded as
    `category`, numbers in it normalised (`0.0` is `0`). Columns that the file lacks are null, or 0 where
    null reads as 0. With `row_hash`, a uint64 over the values of all named columns.
    """

    def __init__(self, scenario: Scenario, file: LogFile, *, row_hash: bool = False) -> None:
        self.scenario, self.file = scenario, file
        self.ids = ("user_id", "item_id")
        self.flags = tuple(name for name in ("click", *scenario.actions) if name in scenario.columns)
        optional = tuple(name for name in ("watching_times", "gender", "age") if name in scenario.columns)
        self.history = scenario.history
        self.numbers = (*self.flags, *optional, *self.history)
        self.number_columns = tuple(name for name in self.numbers if name in file.columns)
        self.has_category = scenario.category in file.columns
        self.hashed = tuple(name for name in scenario.columns if name in file.columns) if row_hash else ()

    def parse(self, block: Block) -> tuple[list[pa.Table], list[BadRow]]:
        """Tables of the valid rows in order, and the invalid rows."""
        bad: list[BadRow] = []
        return list(self._parse(block, bad)), bad

    def _parse(self, block: Block, bad: list[BadRow]) -> Iterator[pa.Table]:
        try:
            yield self._parse_by_arrow(block.data)
            return
        except (pa.ArrowInvalid, _InDoubtError):
            pass
        middle = block.data.find(b"\n", len(block.data) // 2) + 1
        if len(block.data) <= FEW_BYTES or middle in (0, len(block.data)):
            good = self._parse_lines(block, bad)
            if good:
                yield self._typed(good)
            return
        yield from self._parse(Block(block.data[:middle], block.offset), bad)
        yield from self._parse(Block(block.data[middle:], block.offset + middle), bad)

    def _parse_by_arrow(self, data: bytes) -> pa.Table:
        """Parse with Arrow.

        Raises:
            pa.ArrowInvalid: a wrong number of columns, or a value of the wrong type.
            _InDoubtError: something that Arrow accepts but this format does not.
        """
        # Arrow ends lines at a lone CR, reads 0x1F as 31, and allows quotes to span lines.
        if b"\r" in data and data.count(b"\r") != data.count(b"\r\n"):
            raise _InDoubtError
        if b"\0" in data or _hexadecimal(data) or (b'"' in data and _unbalanced(data)) or _has_long_line(data):
            raise _InDoubtError
        return self._typed(data)

    def _typed(self, data: bytes) -> pa.Table:
        integers = {name: self._type(name) for name in self.number_columns}
        text = dict.fromkeys(self.number_columns, _TEXT)
        # Plain integers; numbers like 1.0, as in the article logs; then also ids like 1.0.
        attempts = ((pa.int64(), integers), (pa.int64(), text), (pa.string(), text))
        for id_type, numbers in attempts[:-1]:
            try:
                return self._check(self._read(data, dict.fromkeys(self.ids, id_type) | numbers))
            except pa.ArrowInvalid:
                continue
        id_type, numbers = attempts[-1]
        return self._check(self._read(data, dict.fromkeys(self.ids, id_type) | numbers))

    def _read(self, data: bytes, types: dict[str, pa.DataType]) -> pa.Table:
        others = (*self.hashed, self.scenario.category) if self.has_category else self.hashed
        types = types | {name: _TEXT for name in others if name not in types}
        return pa_csv.read_csv(
            pa.BufferReader(data),
            read_options=pa_csv.ReadOptions(
                column_names=list(self.file.columns), use_threads=False, block_size=1 << 20
            ),
            convert_options=pa_csv.ConvertOptions(
                column_types=types, include_columns=list(types), null_values=list(_NULLS), strings_can_be_null=True
            ),
        )

    def _check(self, table: pa.Table) -> pa.Table:
        """Check limits, convert to integers and fill nulls of flags; else `_InDoubtError`."""
        typed: dict[str, Any] = {}
        for name in self.ids:
            column = _parse_integer_ids(table[name]) if pa.types.is_string(table[name].type) else table[name]
            if column.null_count or not _within(pc.min_max(column), *_ID_LIMITS):
                raise _InDoubtError
            typed[name] = column
        for name in self.number_columns:
            column = table[name]
            if pa.types.is_dictionary(column.type):
                column = _parse_integers(column, flag=name in self.flags)
            if (name == "click" and column.null_count) or not _within(pc.min_max(column), *self._limits(name)):
                raise _InDoubtError
            typed[name] = column.cast(self._type(name))
        if self.has_category:
            typed["category"] = _plain_texts(table[self.scenario.category])
        columns = {name: typed[name] for name in self.ids}
        for name in self.numbers:
            column = typed[name] if name in typed else pa.nulls(len(table), self._type(name))
            columns[name] = column if name in ("gender", "age") or not column.null_count else pc.fill_null(column, 0)
        columns["category"] = typed["category"] if self.has_category else pa.nulls(len(table), _TEXT)
        if self.hashed:
            values = (typed.get("category" if n == self.scenario.category else n) for n in self.hashed)
            texts = (_plain_texts(table[n]) if v is None else v for n, v in zip(self.hashed, values, strict=True))
            columns["row_hash"] = pa.array(_row_hash(list(texts)))
        return pa.table(columns)

    def _type(self, name: str) -> pa.DataType:
        return pa.int8() if name in self.flags else pa.int64() if name in self.history else pa.int32()

    def _limits(self, name: str) -> tuple[int, int]:
        return (0, 1) if name in self.flags else _LIMITS.get(name, _ID_LIMITS)

    def _parse_lines(self, block: Block, bad: list[BadRow]) -> bytes:
        """Check each line; returns the valid ones in a form that Arrow reads."""
        good: list[str] = []
        offset = block.offset
        for line in block.data.split(b"\n"):
            text = line.rstrip(b"\r") if line.endswith(b"\r") else line
            if text:
                fields, reason = self._parse_line(text)
                if reason:
                    shown = text[:200].decode("utf-8", "backslashreplace")
                    bad.append(BadRow(self.file.name, offset, reason, shown))
                else:
                    good.append(_to_csv(fields))
            offset += len(line) + 1
        return "".join(good).encode(errors="surrogateescape")

    def _parse_line(self, line: bytes) -> tuple[list[str], str]:
        """The fields of a line with normalised numbers, and why it is invalid ('' if valid)."""
        if len(line) >= _LONGEST_FIELD:
            return [], f"line of {_LONGEST_FIELD >> 10} KiB or more"
        text = line.decode(errors="surrogateescape")
        if "\0" in text or "\r" in text:
            return [], "control character"
        if text.count('"') % 2:
            return [], "unbalanced quote"
        fields = next(csv.reader([text]))
        if len(fields) != len(self.file.columns):
            return [], "wrong number of columns"
        position = {name: index for index, name in enumerate(self.file.columns)}
        read = (*self.ids, *self.number_columns, *(self.scenario.category,) * self.has_category)
        if any(_SURROGATE.search(fields[position[name]]) for name in read):
            return [], "not UTF-8"
        for name in (*self.ids, *self.number_columns):
            check = self._check_id if name in self.ids else self._check_number
            reason, fields[position[name]] = check(name, fields[position[name]].strip(" \t"))
            if reason:
                return [], reason
        return fields, ""

    def _check_id(self, name: str, value: str) -> tuple[str, str]:
        if value in _NULLS:
            return f"{name} is not set", value
        match = _INTEGER.fullmatch(value)
        if not match or (match[1] and match[2] != "0"):
            return f"{name} is not a non-negative integer", value
        if len(match[2]) > _LONGEST_NUMBER or int(match[2]) > _ID_LIMITS[1]:
            return f"{name} exceeds 2^63 - 1", value
        return "", match[2]

    def _check_number(self, name: str, value: str) -> tuple[str, str]:
        if value in _NULLS:
            return ("click is null" if name == "click" else ""), NULL
        number = _parse_integer(_FLAGS.get(value, value) if name in self.flags else value)
        low, high = self._limits(name)
        if number is not None and low <= number <= high:
            return "", str(number)
        return f"{name} is not " + ("0 or 1" if name in self.flags else f"an integer in {low}..{high}"), value


def _parse_integer(text: str) -> int | None:
    """Parse an integer like `1`, ` 1`, `01` or `1.0`; None for other texts."""
    result = _INTEGER.fullmatch(text.strip(" \t"))
    return int(result[1] + result[2]) if result and len(result[2]) <= _LONGEST_NUMBER else None


def plain_text(text: str) -> str | None:
    """Normalise a text that is a number, so that equal values are equal texts; None for null.

    >>> [plain_text(text) for text in ("01", "-0.0", "2.50", " 7", "a b", " ")]
    ['1', '0', '2.5', '7', 'a b', None]
    """
    stripped = text.strip(" \t")
    if stripped in _NULLS:
        return None
    result = _INTEGER.fullmatch(stripped) or _DECIMAL.fullmatch(stripped)
    if not result:
        return text
    return result[2] if result[2] == "0" else result[1] + result[2]


def _parse_integers(column: pa.ChunkedArray, *, flag: bool) -> pa.Array:
    """Integers from dictionary-encoded text; each distinct value is parsed once.

    Raises:
        _InDoubtError: a text that is not an integer.
    """
    encoded = column.unify_dictionaries().combine_chunks()
    numbers: list[int | None] = []
    for text in encoded.dictionary.to_pylist():
        value = text.strip(" \t")
        number = _parse_integer(_FLAGS.get(value, value) if flag else value)
        if number is None and value not in _NULLS:
            raise _InDoubtError
        numbers.append(number)
    if any(number is not None and not -(2**63) <= number < 2**63 for number in numbers):
        raise _InDoubtError
    return pa.array(numbers, pa.int64()).take(encoded.indices)


def _parse_integer_ids(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Integers from texts like `150.0`.

    Raises:
        pa.ArrowInvalid: a text that is not an integer.
    """
    text = pc.replace_substring_regex(pc.utf8_trim(column, characters=" \t"), r"^(-?\d+)\.0*$", r"\1")
    return text.cast(pa.int64())


def _plain_texts(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """A dictionary-encoded column with `plain_text` applied to each text."""
    encoded = column.unify_dictionaries().combine_chunks()
    names: dict[str, int] = {}
    plain = [plain_text(text) for text in encoded.dictionary.to_pylist()]
    codes = pa.array([None if name is None else names.setdefault(name, len(names)) for name in plain], pa.int32())
    return pa.DictionaryArray.from_arrays(codes.take(encoded.indices), pa.array(list(names), pa.string()))


def _row_hash(columns: list[Any]) -> Any:
    """A hash of each row's values, uint64: null is a distinct value, 1 and 1.0 are equal."""
    import pandas as pd  # slow import, only needed with protocol.dedupe=exact

    total: Any = np.uint64(0)
    for column in columns:
        if pa.types.is_dictionary(column.type):
            texts = np.array([*column.dictionary.to_pylist(), None], object)
            code = column.indices.fill_null(len(texts) - 1).to_numpy(zero_copy_only=False)
            hashes = pd.util.hash_array(texts, categorize=False)[code]
        else:
            known = column.is_valid().to_numpy(zero_copy_only=False)
            hashes = pd.util.hash_array(pc.fill_null(column, 0).cast(pa.int64()).to_numpy(zero_copy_only=False))
            hashes = np.where(known, hashes, _NULL_HASH)
        total = (total ^ hashes) * _ODD
        total ^= total >> np.uint64(32)
    return total


_NULL_HASH, _ODD = np.uint64(0xA0761D6478BD642F), np.uint64(0x9E3779B97F4A7C15)


def _within(bounds: pa.Scalar, low: int, high: int) -> bool:
    least, most = bounds["min"].as_py(), bounds["max"].as_py()
    return least is None or (low <= least and most <= high)


def _hexadecimal(data: bytes) -> bool:
    # Searching one byte is much faster than two, and few logs contain an x.
    return (b"x" in data and b"0x" in data) or (b"X" in data and b"0X" in data)


def _has_long_line(data: bytes) -> bool:
    """Whether some line may reach `_LONGEST_FIELD`: it would fill a window of half that length."""
    window = _LONGEST_FIELD // 2
    return any(data.find(b"\n", at, at + window) < 0 for at in range(0, len(data) - window + 1, window))


def _unbalanced(data: bytes) -> bool:
    """Whether any line has an odd number of quotes."""
    raw = np.frombuffer(data, np.uint8)
    quotes = np.cumsum(raw == ord('"'), dtype=np.int64)
    ends = np.append(np.flatnonzero(raw == ord("\n")), len(raw) - 1)
    return bool(np.any(quotes[ends] % 2))


def _to_csv(fields: list[str]) -> str:  # quotes only fields that need it: a category with a comma or a quote
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(fields)
    return out.getvalue()
