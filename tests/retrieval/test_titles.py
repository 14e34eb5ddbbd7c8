"""Title files: columns by name, delimiters, compression, and invalid files."""

from __future__ import annotations

import gzip

import pytest

from etl.runtime.errors import InputError
from retrieval.titles import read_titles


@pytest.mark.parametrize(
    ("name", "text", "titles"),
    [
        ("a.csv", 'item_id,title\n7,"One, two"\n8,\n7,Later\n', {7: "One, two", 8: "8"}),
        ("a.tsv", "title\titem_id\nA, b\t-3\n", {-3: "A, b"}),
        ("a.csv.gz", "item_id,title,picture\n1,A,http://x/1.png\n2,B,\n", {1: "A (http://x/1.png)", 2: "B"}),
        ("a.csv", "\ufeffitem_id,title\r\n1,é 日本\r\n", {1: "é 日本"}),
        ("a.csv", "item_id,title\n", {}),
    ],
)
def test_titles_are_read_by_raw_item_id(tmp_path, name, text, titles):
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_titles(str(tmp_path / name)) == titles


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "columns item_id and title, got nothing"),
        (b"id,title\n1,A\n", "columns item_id and title, got id, title"),
        (b"item_id,title\nx,A\n", "integer item ids, got 'x' in line 2"),
        (b"item_id,title\n,A\n", "integer item ids, got '' in line 2"),
        (b"item_id,title\n1,\xff\n", "titles in UTF-8"),
        (b'item_id,title\n1,"open\n2,B\n3,C\n', "titles of one line, got a line break in the title of item 1"),
        (b"item_id,title\n1," + b"a" * 140_000 + b"\n", "titles in CSV, got field larger than field limit"),
    ],
)
def test_invalid_title_files_are_refused(tmp_path, data, message):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_titles(str(tmp_path / "a.csv"))


def test_unreadable_title_files_are_refused(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(b"item_id,title\n")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"item_id,title\n1,A\n")[:-9])
    for name in ("a.csv.gz", "cut.csv.gz", "none.csv"):
        with pytest.raises(InputError, match="a readable file of titles"):
            read_titles(str(tmp_path / name))
