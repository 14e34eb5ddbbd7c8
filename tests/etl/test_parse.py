"""The log parser on mutated files: never a crash, never a wrong row."""

from __future__ import annotations

import csv
import hashlib
import re

import numpy as np
import pytest

from etl.logs.parse import Parser
from etl.logs.splits import Block, LogFile, first_rows, make_splits, read_blocks
from etl.logs.tenrec import SCENARIOS, VIDEO, open_logs
from tests.support.engine import build
from tests.support.reference import category_of

SCENARIO = SCENARIOS["qb_video"]
FILE = LogFile("log.csv", 0, tuple(VIDEO), 0, 0)
LIMITS = {
    "click": (0, 1),
    "follow": (0, 1),
    "like": (0, 1),
    "share": (0, 1),
    "watching_times": (0, 2**31 - 1),
    "gender": (-128, 127),
    "age": (-128, 127),
}
PIECES = [
    b"\0",
    b"\r",
    b"\n",
    b'"',
    b",",
    b"\\N",
    b"-",
    b"0x1",
    b"1.0",
    b"1.5",
    b"9" * 20,
    b"\xff",
    b" ",
    b"nan",
    b"inf",
    b"\r\n",
    b'""',
    b'"a,b"',
    b"+1",
    b"1e3",
    b"\xef\xbb\xbf",
    b"True",
    b"false",
    b",,",
    b".0,",
    b"-0",
    b"0.50",
    b"\t",
    "é".encode(),
]


def slow_rows(data: bytes) -> list[tuple]:
    """Slow reader: the valid rows, one line at a time."""
    rows = []
    for line in data.split(b"\n"):
        line = line[:-1].rstrip(b"\r") if line.endswith(b"\r") else line
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if not text or "\0" in text or "\r" in text or text.count('"') % 2:
            continue
        fields = next(csv.reader([text]))
        if len(fields) == len(VIDEO):
            row = slow_row(dict(zip(VIDEO, fields, strict=True)))
            if row:
                rows.append(row)
    return rows


def slow_row(row: dict[str, str]) -> tuple | None:
    values = []
    for name, (low, high) in ({"user_id": (0, 2**63 - 1), "item_id": (0, 2**63 - 1)} | LIMITS).items():
        text = row[name].strip(" \t")
        if name in ("click", "follow", "like", "share") and text.lower() in ("true", "false"):
            text = str(int(text.lower() == "true"))
        if text in ("", "\\N"):
            if name in ("user_id", "item_id", "click"):
                return None
            values.append(None if name in ("gender", "age") else 0)
        elif re.fullmatch(r"-?[0-9]+(\.0*)?", text) and low <= int(text.split(".")[0]) <= high:
            values.append(int(text.split(".")[0]))
        else:
            return None
    return (*values, category_of(row["video_category"]))


def parsed(data: bytes) -> tuple[list[tuple], int]:
    tables, bad = Parser(SCENARIO, FILE).parse(Block(data, 0))
    names = ["user_id", "item_id", *LIMITS, "category"]
    return [tuple(row[n] for n in names) for t in tables for row in t.to_pylist()], len(bad)


def valid_lines(rng: np.random.Generator, n: int) -> bytes:
    rows = zip(
        rng.integers(1, 99, n), rng.integers(1, 10**12, n), rng.integers(0, 2, n), rng.integers(0, 2, n), strict=True
    )
    return b"".join(f"{u},{i},{c},0,{like},0,cat{i % 7},{u % 5},1,\\N\n".encode() for u, i, c, like in rows)


@pytest.mark.parametrize("start", range(0, 2000, 200))
def test_parser_equals_the_slow_reader_on_two_thousand_mutated_files(start):
    for seed in range(start, start + 200):
        rng = np.random.default_rng(seed)
        data = bytearray(valid_lines(rng, int(rng.integers(1, 40))))
        for _ in range(int(rng.integers(1, 6))):
            at = int(rng.integers(0, len(data) + 1))
            piece = PIECES[rng.integers(len(PIECES))]
            kind = rng.integers(4)
            if kind == 0:
                data[at:at] = piece
            elif kind == 1:
                data[at : at + int(rng.integers(1, 30))] = b""
            elif kind == 2:
                data[at : at + 1] = bytes([rng.integers(256)])
            else:
                data[at : at + len(piece)] = piece
            if not data:
                data += b"\n"
        actual, bad = parsed(bytes(data))
        expected = slow_rows(bytes(data))
        assert actual == expected, (seed, bytes(data))
        lines = [line for line in bytes(data).split(b"\n") if line.rstrip(b"\r")]
        assert len(actual) + bad == len(lines), seed


@pytest.mark.parametrize("split_bytes", [1, 7, 50, 1000])
def test_every_line_belongs_to_exactly_one_split(tmp_path, split_bytes):
    body = valid_lines(np.random.default_rng(0), 30)
    raw = (",".join(VIDEO) + "\n").encode() + body.rstrip(b"\n")
    (tmp_path / "log.csv").write_bytes(raw)
    splits = make_splits(open_logs([str(tmp_path / "log.csv")], SCENARIO), split_bytes)
    lines = [line for split in splits for block in read_blocks(split)[0] for line in block.data.split(b"\n") if line]
    assert lines == body.split(b"\n")[:-1]
    for split in splits:  # the fingerprint is that of the split's own bytes, also where its last line ends beyond them
        blocks, fingerprint = read_blocks(split)
        list(blocks)
        assert fingerprint() == hashlib.sha256(raw[split.begin : split.end]).hexdigest()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_first_rows_are_counted_over_all_files_without_blank_lines(tmp_path, n, newline):
    texts = [["1,1,1", "", "2,1,1"], ["", "3,1,1", "4,1,1", ""]]
    for number, lines in enumerate(texts):
        (tmp_path / f"{number}.csv").write_text(newline.join(["user_id,item_id,click", *lines]), newline="")
    logs = open_logs([str(tmp_path / "0.csv"), str(tmp_path / "1.csv")], SCENARIO)
    blocks = [block for split in make_splits(first_rows(logs, n), 1_000) for block in read_blocks(split)[0]]
    rows = [line for block in blocks for line in block.data.decode().split() if line]
    assert rows == [f"{user},1,1" for user in range(1, 5)][:n]


@pytest.mark.parametrize("spread", [1, 10**12])
def test_dense_ids_do_not_depend_on_the_range_of_raw_ids(tmp_path, spread):
    header = ",".join(VIDEO)
    lines = [f"{1 + i // 12},{(1 + i % 9) * spread},1,0,{i % 2},0,c,1,1,1" for i in range(48)]
    (tmp_path / "log.csv").write_text("\n".join([header, *lines]) + "\n")
    dataset = build([f"input={tmp_path / 'log.csv'}", f"output={tmp_path / 'out'}", "scenario=qb_video", "shards=2"])
    items = dataset.items(["item", "item_id"]).to_pylist()
    (tmp_path / "plain.csv").write_text("\n".join([header, *(line.replace("0" * 12, "") for line in lines)]) + "\n")
    plain = build([f"input={tmp_path / 'plain.csv'}", f"output={tmp_path / 'plain'}", "scenario=qb_video", "shards=2"])
    assert [(r["item"], r["item_id"] // spread) for r in items] == [
        tuple(r.values()) for r in plain.items(["item", "item_id"]).to_pylist()
    ]
    names = [f.sha256 for f in dataset.session_files]
    assert names == [f.sha256 for f in plain.session_files]
