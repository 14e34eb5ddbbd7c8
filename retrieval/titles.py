"""Item titles for reports, from a CSV or TSV file."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from etl.runtime.errors import InputError
from etl.runtime.object_store import read_file

HINT = "write a header item_id,title[,picture] and one line for each item"
Titles = dict[int, str]


def read_titles(path: str) -> Titles:
    """Read titles by raw item id.

    Reads columns `item_id` and `title` by header; a `picture` (a URL) is shown as text after the title.
    The delimiter is a tab in files named `.tsv`, else a comma; `.gz` is decompressed. The first line of a
    repeated id counts.

    Args:
        path: a file or a URI.

    Raises:
        InputError: a missing file or column, or a non-integer id.
    """
    try:
        data = read_file(path)
        text = (gzip.decompress(data) if path.endswith(".gz") else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        problem = getattr(error, "strerror", None) or error
        raise InputError("a readable file of titles", f"{path} ({problem})", HINT) from None
    except UnicodeDecodeError:
        raise InputError("titles in UTF-8", path, HINT) from None
    delimiter = "\t" if Path(path.removesuffix(".gz")).suffix == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    if not {"item_id", "title"} <= set(reader.fieldnames or ()):
        raise InputError("columns item_id and title", ", ".join(reader.fieldnames or ["nothing"]), HINT)
    titles: Titles = {}
    for row in _rows(reader):
        try:
            item = int(row["item_id"])
        except (TypeError, ValueError):
            raise InputError("integer item ids", f"{row['item_id']!r} in line {reader.line_num}", HINT) from None
        if "\n" in (row["title"] or ""):
            got = f"a line break in the title of item {item}, before line {reader.line_num}"
            raise InputError("titles of one line", got, "close or double the quote that opens it")
        picture = f" ({row['picture']})" if row.get("picture") else ""
        titles.setdefault(item, f"{row['title'] or item}{picture}")
    return titles


def _rows(reader: csv.DictReader[str]) -> Iterator[dict[str, str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise InputError("titles in CSV", f"{error} in line {reader.line_num}", HINT) from None
