"""Variants of log files: malformed rows, harmless spellings, other columns, several files."""

from __future__ import annotations

import json

import pytest

from etl.runtime.errors import InputError
from tests.support.engine import build, write_log
from tests.support.session_logs import HEADER


def test_column_order_and_unknown_columns_do_not_change_the_dataset(tmp_path):
    names = HEADER.split(",")
    lines = [[1, 10 + i, 1, 0, i % 2, 0, "c", 2, 1, 3] for i in range(12)]
    order = [9, 3, 1, 0, 8, 7, 2, 6, 5, 4]
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    write_log(first, lines)
    second.write_text("\n".join(",".join([*(str(r[i]) for i in order), "x"]) for r in [names, *lines]) + "\n")
    manifests = [
        build([f"input={p}", f"output={tmp_path / p.stem}", "scenario=qb_video", "shards=1"]).manifest
        for p in (first, second)
    ]
    assert [f.sha256 for f in manifests[0].files] == [f.sha256 for f in manifests[1].files]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"1,2,1,0,0,0,c,1,1", "wrong number of columns"),
        (b"1,2,1,0,0,0,c,1,1,1,1", "wrong number of columns"),
        (b"x,2,1,0,0,0,c,1,1,1", "user_id is not"),
        (b"-1,2,1,0,0,0,c,1,1,1", "user_id is not"),
        (b"\\N,2,1,0,0,0,c,1,1,1", "user_id is not"),
        (b"1,9223372036854775808,1,0,0,0,c,1,1,1", "item_id exceeds"),
        (b"1,0x10,1,0,0,0,c,1,1,1", "item_id is not"),
        (b"1,2,2,0,0,0,c,1,1,1", "click is not 0 or 1"),
        (b"1,2,\\N,0,0,0,c,1,1,1", "click is null"),
        (b"1,2,1,0.5,0,0,c,1,1,1", "follow is not 0 or 1"),
        (b"1,2,1,0,0,0,c,-3,1,1", "watching_times is not"),
        (b"1,2,1,0,0,0,c,1,1,999", "age is not"),
        (b"1,2,1,0,0,0,\xff,1,1,1", "not UTF-8"),
        (b"1,2,1,0,0,0,c\0,1,1,1", "control character"),
        (b'1,2,1,0,0,0,"c,1,1,1', "unbalanced quote"),
    ],
)
def test_malformed_row_is_quarantined_with_its_offset_and_others_are_kept(tmp_path, line, reason):
    good = [f"1,{i},1,0,1,0,c,1,1,1".encode() for i in range(1, 13)]
    lines = [HEADER.encode(), *good[:5], line, *good[5:]]
    log = tmp_path / "log.csv"
    log.write_bytes(b"\n".join(lines) + b"\n")
    dataset = build([f"input={log}", f"output={tmp_path / 'out'}", "scenario=qb_video", "shards=1"])
    (message,) = [json.loads(t) for t in dataset.file("quarantine/rows.jsonl").read_text().splitlines()]
    assert message["reason"].startswith(reason)
    assert message["byte_offset"] == sum(len(x) + 1 for x in lines[:6])
    assert message["file"] == "log.csv"
    statistics = json.loads(dataset.file("statistics.json").read_text())
    assert statistics["rows_read"] == 13
    assert statistics["kept"]["clicks"] == statistics["kept"]["likes"] == 12
    with pytest.raises(InputError, match=reason.split()[0]):
        build([f"input={log}", f"output={tmp_path / 'strict'}", "scenario=qb_video", "strict=true"])


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.replace(b"\n", b"\r\n"),
        lambda t: b"\xef\xbb\xbf" + t,
        lambda t: t.rstrip(b"\n"),
        lambda t: t.replace(b"\n1,", b'\n"1",'),
        lambda t: t.replace(b",1,0,1,0,c", b",1.0,0,1,0,c"),
        lambda t: t.replace(b"\n", b"\n\n"),
    ],
)
def test_harmless_spellings_give_the_same_dataset(tmp_path, change):
    text = ("\n".join([HEADER, *(f"1,{i},1,0,1,0,c,1,1,1" for i in range(1, 13))]) + "\n").encode()
    results = []
    for number, data in enumerate((text, change(text))):
        log = tmp_path / f"{number}.csv"
        log.write_bytes(data)
        dataset = build([f"input={log}", f"output={tmp_path / str(number)}", "scenario=qb_video", "shards=1"])
        results.append([f.sha256 for f in dataset.manifest.files])
    assert results[0] == results[1]


def test_gzip_and_globs_and_several_files_read_as_one_log(tmp_path):
    import gzip

    lines = [f"1,{i},1,0,1,0,c,1,1,1" for i in range(1, 13)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.csv").write_text("\n".join([HEADER, *lines[:4]]) + "\n")
    (tmp_path / "in" / "2.csv.gz").write_bytes(gzip.compress(("\n".join([HEADER, *lines[4:]]) + "\n").encode()))
    (tmp_path / "all.csv").write_text("\n".join([HEADER, *lines]) + "\n")
    results = []
    for name, given_input in (("a", tmp_path / "in" / "*.csv*"), ("b", tmp_path / "all.csv")):
        dataset = build([f"input={given_input}", f"output={tmp_path / name}", "scenario=qb_video", "shards=1"])
        results.append([f.sha256 for f in dataset.manifest.files])
    assert results[0] == results[1]


@pytest.mark.parametrize("split_bytes", [100, 300, 100_000])
def test_bytes_of_columns_that_are_not_read_do_not_matter_beside_a_malformed_row(tmp_path, split_bytes):
    """The note of a row has a Latin-1 byte; the malformed row makes its neighbours be read one by one."""
    rows = [f"{user},{item},1,ok".encode() for user in (1, 2, 3) for item in range(1, 13)]
    rows[7] = b"1,8,1,caf\xe9"
    log = tmp_path / "log.csv"
    log.write_bytes(b"\n".join([b"user_id,item_id,click,note", *rows, b"9,zz,1,x"]) + b"\n")
    build([f"input={log}", f"output={tmp_path / 'out'}", "scenario=qb_video", f"split_bytes={split_bytes}"])
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert statistics["kept"]["clicks"] == 36
    assert statistics["rows_read"] == 37
