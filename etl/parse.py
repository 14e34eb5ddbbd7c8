"""Parsing lines of a log into typed columns, and naming the rows that cannot be used.

A block is parsed as a whole by Arrow. Only where Arrow, or a check of the values, objects, the block
is halved until the few lines in doubt are left, and those are judged one by one with a reason.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from etl.tenrec import NULL, Block, LogFile, Scenario

FEW_BYTES = 4096
"""Blocks in doubt are halved down to this size before their lines are judged one by one."""


@dataclass(frozen=True)
class BadRow:
    """A row that could not be used."""

    file: str
    byte_offset: int
    reason: str
    text: str


class _InDoubtError(Exception):
    """Arrow read the block, but a value or a byte in it needs a closer look."""


_ID = re.compile(r"\d+")
_WHOLE = re.compile(r"(-?\d+)(?:\.0*)?")
_INT8 = (-128, 127)
_LIMITS = {"watching_times": (0, 2**31 - 1), "gender": _INT8, "age": _INT8}
_ID_LIMITS = (0, 2**63 - 1)


class Parser:
    r"""Parses lines of files with one header into typed columns, and names the rows it cannot.

    Columns of the result: `user_id`, `item_id` int64 and not null; `click` and the scenario's actions
    0 or 1, where `\N` of an action other than the click reads as 0; `watching_times` (null = 0),
    `gender`, `age` (nullable); history columns int64 (null = 0); the category dictionary-encoded as
    `category`; with `row_hash`, a uint64 over the text of all named columns.
    """

    def __init__(self, scenario: Scenario, file: LogFile, *, row_hash: bool = False) -> None:
        self.scenario, self.file, self.row_hash = scenario, file, row_hash
        self.ids = ("user_id", "item_id")
        self.flags = ("click", *scenario.actions)
        optional = ("watching_times", "gender", "age") if scenario.watching else ("gender", "age")
        self.history = scenario.history
        self.numbers = (*self.flags, *optional, *self.history)

    def parse(self, block: Block) -> tuple[list[pa.Table], list[BadRow]]:
        """Tables of the good rows in order, and the rows that cannot be used."""
        bad: list[BadRow] = []
        return list(self._parse(block, bad)), bad

    def _parse(self, block: Block, bad: list[BadRow]) -> Iterator[pa.Table]:
        try:
            yield self._fast(block.data)
            return
        except (pa.ArrowInvalid, _InDoubtError):
            pass
        middle = block.data.find(b"\n", len(block.data) // 2) + 1
        if len(block.data) <= FEW_BYTES or middle in (0, len(block.data)):
            good = self._judge(block, bad)
            if good:
                yield self._typed(good)
            return
        yield from self._parse(Block(block.data[:middle], block.offset), bad)
        yield from self._parse(Block(block.data[middle:], block.offset + middle), bad)

    def _fast(self, data: bytes) -> pa.Table:
        """Parse with Arrow.

        Raises:
            pa.ArrowInvalid: a wrong number of columns or a value of the wrong type.
            _InDoubtError: something that Arrow takes but this format does not mean.
        """
        # Arrow ends lines at a lone CR, reads 0x1F as 31, and lets a quote span lines.
        if b"\r" in data and data.count(b"\r") != data.count(b"\r\n"):
            raise _InDoubtError
        if b"\0" in data or _hexadecimal(data) or (b'"' in data and _unbalanced(data)):
            raise _InDoubtError
        return self._typed(data)

    def _typed(self, data: bytes) -> pa.Table:
        types = {name: self._type(name) for name in self.numbers}
        try:
            return self._check(self._read(data, types))
        except pa.ArrowInvalid:
            # Numbers written 1.0, as the article logs do: few distinct ones, so each is looked at once.
            text = pa.dictionary(pa.int32(), pa.string())
            table = self._read(data, dict.fromkeys(self.numbers, text))
            for name in self.numbers:
                table = table.set_column(table.schema.get_field_index(name), name, _whole_numbers(table[name]))
            return self._check(table)

    def _read(self, data: bytes, numbers: dict[str, pa.DataType]) -> pa.Table:
        types = {name: pa.int64() for name in self.ids} | numbers
        types[self.scenario.category] = pa.dictionary(pa.int32(), pa.string())
        if self.row_hash:
            texts = self._read_columns(data, dict.fromkeys(self.scenario.columns, pa.string()), nulls=[])
            joined = pc.binary_join_element_wise(*texts.columns, pa.scalar("\0"))
            hashes = pd.util.hash_array(joined.to_numpy(), categorize=False)
        table = self._read_columns(data, types, nulls=[NULL])
        return table.append_column("row_hash", pa.array(hashes)) if self.row_hash else table

    def _read_columns(self, data: bytes, types: dict[str, pa.DataType], nulls: list[str]) -> pa.Table:
        return pa_csv.read_csv(
            pa.BufferReader(data),
            read_options=pa_csv.ReadOptions(
                column_names=list(self.file.columns), use_threads=False, block_size=1 << 20
            ),
            convert_options=pa_csv.ConvertOptions(
                column_types=types, include_columns=list(types), null_values=nulls, strings_can_be_null=True
            ),
        )

    def _check(self, table: pa.Table) -> pa.Table:
        """Values inside their limits, as integers, nulls of flags filled; else `_InDoubtError`."""
        columns = {}
        for name in self.ids:
            column = table[name]
            if column.null_count or (len(column) and pc.min(column).as_py() < 0):
                raise _InDoubtError
            columns[name] = column
        for name in self.numbers:
            column = table[name]
            low, high = self._limits(name)
            found = pc.min_max(column)
            if (name == "click" and column.null_count) or not _within(found, low, high):
                raise _InDoubtError
            whole = column.cast(self._type(name))
            columns[name] = whole if name in ("gender", "age") or not column.null_count else pc.fill_null(whole, 0)
        columns["category"] = table[self.scenario.category].unify_dictionaries()
        if self.row_hash:
            columns["row_hash"] = table["row_hash"]
        return pa.table(columns)

    def _type(self, name: str) -> pa.DataType:
        return pa.int8() if name in self.flags else pa.int64() if name in self.history else pa.int32()

    def _limits(self, name: str) -> tuple[int, int]:
        return (0, 1) if name in self.flags else _LIMITS.get(name, _ID_LIMITS)

    def _judge(self, block: Block, bad: list[BadRow]) -> bytes:
        """Look at each line by itself; returns the good ones in a form that Arrow reads."""
        good: list[str] = []
        offset = block.offset
        for line in block.data.split(b"\n"):
            text = line.rstrip(b"\r") if line.endswith(b"\r") else line
            if text:
                fields, reason = self._judge_line(text)
                if reason:
                    shown = text[:200].decode("utf-8", "backslashreplace")
                    bad.append(BadRow(self.file.name, offset, reason, shown))
                else:
                    good.append(_to_csv(fields))
            offset += len(line) + 1
        return "".join(good).encode()

    def _judge_line(self, line: bytes) -> tuple[list[str], str]:
        """The fields of a line, numbers written plainly, and why it cannot be used ('' if it can)."""
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            return [], "not UTF-8"
        if "\0" in text or "\r" in text:
            return [], "control character"
        if text.count('"') % 2:
            return [], "unbalanced quote"
        fields = next(csv.reader([text]))
        if len(fields) != len(self.file.columns):
            return [], "wrong number of columns"
        position = {name: index for index, name in enumerate(self.file.columns)}
        for name in self.ids:
            value = fields[position[name]].strip(" \t")
            if not _ID.fullmatch(value) or not value.isascii():
                return [], f"{name} is not a non-negative whole number"
            if int(value) >= 2**63:
                return [], f"{name} exceeds 2^63 - 1"
            fields[position[name]] = value
        for name in self.numbers:
            value = fields[position[name]].strip(" \t")
            reason, fields[position[name]] = self._judge_number(name, value)
            if reason:
                return [], reason
        return fields, ""

    def _judge_number(self, name: str, value: str) -> tuple[str, str]:
        if value == NULL:
            return ("click is null" if name == "click" else ""), value
        whole = _WHOLE.fullmatch(value)
        low, high = self._limits(name)
        if whole and value.isascii() and low <= int(whole.group(1)) <= high:
            return "", str(int(whole.group(1)))
        return f"{name} is not " + ("0 or 1" if name in self.flags else f"a whole number in {low}..{high}"), value


def _whole_numbers(column: pa.ChunkedArray) -> pa.Array:
    """Integers from dictionary-encoded text like `1`, ` 1` or `1.0`.

    Raises:
        _InDoubtError: a text that is no whole number of that form.
    """
    encoded = column.unify_dictionaries().combine_chunks()
    texts = [text.strip(" \t") for text in encoded.dictionary.to_pylist()]
    if not all(_WHOLE.fullmatch(text) and text.isascii() and len(text) < 19 for text in texts):
        raise _InDoubtError
    return pa.array([int(text.split(".")[0]) for text in texts], pa.int64()).take(encoded.indices)


def _within(found: pa.Scalar, low: int, high: int) -> bool:
    least, most = found["min"].as_py(), found["max"].as_py()
    return least is None or (low <= least and most <= high)


def _hexadecimal(data: bytes) -> bool:
    # One byte is found much faster than two, and few logs have an x at all.
    return (b"x" in data and b"0x" in data) or (b"X" in data and b"0X" in data)


def _unbalanced(data: bytes) -> bool:
    """Whether some line has an odd number of quotes."""
    raw = np.frombuffer(data, np.uint8)
    quotes = np.cumsum(raw == ord('"'), dtype=np.int64)
    ends = np.append(np.flatnonzero(raw == ord("\n")), len(raw) - 1)
    return bool(np.any(quotes[ends] % 2))


def _to_csv(fields: list[str]) -> str:
    # Quotes only where a field needs them: a category with a comma or a quote in it.
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(fields)
    return out.getvalue()
