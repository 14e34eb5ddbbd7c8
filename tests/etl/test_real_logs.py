"""Spellings of real Tenrec files and of other CSV writers: read correctly, and every dropped row is reported."""

from __future__ import annotations

import gzip
import json

import pyarrow.parquet as pq
import pytest

from etl.logs.tenrec import ARTICLE, VIDEO
from etl.messages import warnings
from etl.runtime.errors import InputError
from tests.support.engine import build

FEW = "protocol.min_clicks=3"


class Made:
    """A dataset made from one log, with its statistics and warnings."""

    def __init__(self, folder, text: str | bytes, *options: str, name: str = "log.csv") -> None:
        folder.mkdir(exist_ok=True)
        log = folder / name
        log.write_bytes(text if isinstance(text, bytes) else text.encode())
        output = folder / f"out-{len(list(folder.iterdir()))}"
        self.dataset = build([f"input={log}", f"output={output}", "shards=1", *options])
        self.statistics = json.loads(self.dataset.file("statistics.json").read_text())
        self.warnings = warnings(self.statistics, str(output))
        (entry,) = self.dataset.session_files
        rows = pq.read_table(self.dataset.file(entry.path)).to_pylist()
        self.sessions = {row["user_id"]: row for row in rows}


def csv_text(columns, rows) -> str:
    return "".join(",".join(map(str, line)) + "\n" for line in [columns, *rows])


def video(user, item, click=1, category="5", watching=1) -> list:
    return [user, item, click, 0, 0, 0, category, watching, 1, 2]


SPELLINGS = {
    "plain": ("1", "1.0", "5", "0.50"),
    "point": ("1.0", "1", "5.0", "0.5"),
    "zero": ("01", " 1", "05", "00.5"),
    "quoted": ('"1"', '"1.0"', '"5"', '"0.50"'),
    "flag": (" 1", "True", "5.", "0.500"),
}


@pytest.mark.parametrize("extra", ["", "9,9,1.0\n"])
def test_exact_dedupe_ignores_number_spelling_and_malformed_rows(tmp_path, extra):
    lines = []
    for item in range(1, 6):
        for user, click, category, score in SPELLINGS.values():
            values = dict.fromkeys(ARTICLE, "0") | {"user_id": user, "item_id": f"{item}", "click": click}
            values |= {"category_second": category, "item_score1": score, "read": r"\N", "read_time": "-0"}
            lines.append([values[name] for name in ARTICLE])
        lines.append([{"read": "0"}.get(name, value) for name, value in zip(ARTICLE, lines[-1], strict=True)])
    made = Made(tmp_path, csv_text(ARTICLE, lines) + extra, "scenario=qk_article", "protocol.dedupe=exact", FEW)
    (session,) = made.sessions.values()
    assert session["n_clicks"] == 2 * 5  # read=null and read=0 are different values
    assert {row["category"] for row in made.dataset.items().to_pylist()} == {"5"}
    assert made.statistics["rows_quarantined"] == ({"wrong number of columns": 1} if extra else {})


def test_tenrec_code_protocol_drops_unclicked_rows_before_counting_users(tmp_path):
    rows = [video(1, 10 + i, 0) for i in range(3)]
    rows += [video(user, 10 + i, click) for user in (2, 3, 4) for i in range(3) for click in (1, 0)]
    options = ["scenario=qk_video", "protocol=tenrec_code", "protocol.first_users=2", FEW]
    made = Made(tmp_path, csv_text(VIDEO, rows), *options)
    assert sorted(made.sessions) == [2, 3]
    assert made.statistics["kept"]["exposures"] == made.statistics["kept"]["clicks"] == 6
    assert made.statistics["raw"]["skip"] == 12


def test_exposures_after_the_last_click_are_kept_as_block_n_and_counted(tmp_path):
    rows = [video(1, 99, 0, watching=0)]
    rows += [video(1, item) for item in range(12)]
    rows += [video(1, 100 + item, 0, watching=item % 3) for item in range(15)]
    made = Made(tmp_path, csv_text(VIDEO, rows), "scenario=qb_video", "protocol.max_clicks=10")
    session = made.sessions[1]
    assert session["exposure_position"] == [*range(10), *[10] * 15]
    assert session["exposure_feedback"] == [128] * 10 + [0] * 15
    kept = made.statistics["kept"]
    assert {name: kept[name] for name in ("exposures", "skip", "entered")} == {
        "exposures": 25,
        "skip": 15,
        "entered": 10,
    }
    assert (kept["before_first"], kept["after_test"]) == (3, 15)  # the unclicked row and two clicks
    assert made.statistics["raw"]["entered"] == 10


@pytest.mark.parametrize(
    ("scenario", "columns", "absent"),
    [
        ("qk_article", [c for c in ARTICLE if c != "exposure_count"], []),
        (
            "qk_article",
            ["user_id", "item_id", "click", "gender", "age", "read", "share", "like", "follow", "favorite"],
            ["category_second"],
        ),
        ("qb_article", ["user_id", "item_id", "click", "gender", "age"], ["category_second"]),
        ("qb_video", ["user_id", "item_id", "click", "like"], ["share", "follow", "video_category", "watching_times"]),
    ],
)
def test_only_used_columns_are_required_and_absent_actions_are_null(tmp_path, scenario, columns, absent):
    rows = [[{"user_id": 1, "item_id": item, "click": "1.0"}.get(c, "0.0") for c in columns] for item in range(5)]
    made = Made(tmp_path, csv_text(columns, rows), f"scenario={scenario}", FEW)
    assert made.sessions[1]["n_clicks"] == 5
    for plural, column in (("likes", "like"), ("shares", "share"), ("reads", "read"), ("entered", "watching_times")):
        assert (made.statistics["raw"][plural] is None) == (column not in columns)
    for name in absent:
        assert name in made.warnings[0]
    assert bool(made.warnings) == bool(absent)


def test_float_ids_true_false_flags_and_empty_fields_are_parsed(tmp_path):
    plain = [[150, item, 1, 0, item % 2, 0, r"\N" if item % 3 else 7, r"\N", 1, r"\N"] for item in range(9)]
    other = [[f"{u}.0", f"{i}.0", "True", "", f"{like == 1}", 0.0, "" if c != 7 else "7.0", "", "1.0", " "]
             for u, i, _, _, like, _, c, *_ in plain]  # fmt: skip
    first, second = (
        Made(tmp_path / name, csv_text(VIDEO, rows), "scenario=sbr", FEW)
        for name, rows in (("plain", plain), ("other", other))
    )
    assert first.sessions == second.sessions
    assert first.dataset.items().equals(second.dataset.items())
    assert set(second.dataset.items()["category"].to_pylist()) == {"7", None}
    assert first.statistics == second.statistics
    assert not second.warnings


def test_warning_about_quarantined_rows_has_count_share_reason_and_path(tmp_path):
    rows = [video(1, item).__str__().replace(" ", "").strip("[]").replace("'", "") for item in range(12)]
    text = ",".join(VIDEO).encode() + b"\n" + "\n".join(rows).encode() + b"\n1,2,1,0,0,0,\xcc\xe5,1,1,2" * 4 + b"\n"
    made = Made(tmp_path, text, "scenario=qb_video")
    (line,) = made.warnings
    assert line.startswith("warning: 4 of 16 rows (25.00%) could not be read: not UTF-8 (4)")
    assert line.endswith(f"{made.dataset.path}/quarantine/rows.jsonl")
    assert len(made.dataset.file("quarantine/rows.jsonl").read_text().splitlines()) == 4


LOG = csv_text(VIDEO, [video(user, item) for user in (1, 2) for item in range(12)]).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("log.csv", LOG.replace(b"\n", b"\r")),
        ("log.csv", gzip.compress(LOG[:300]) + gzip.compress(LOG[300:])),
        ("log.csv.gz", LOG),
    ],
    ids=["CR", "gzip without suffix, in two members", "plain text named .gz"],
)
def test_line_endings_and_compression_are_detected_by_content(tmp_path, name, data):
    plain = Made(tmp_path / "plain", LOG, "scenario=qb_video")
    made = Made(tmp_path / "other", data, "scenario=qb_video", name=name)
    assert made.sessions == plain.sessions
    assert made.statistics == plain.statistics


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("length", [200_000, 3 << 20])
def test_an_over_long_line_is_quarantined(tmp_path, compress, length):
    data = LOG + b"1,2," + b"x" * length + b"\n" + LOG[LOG.index(b"\n") + 1 :].replace(b"\n1,", b"\n3,")
    made = Made(tmp_path, compress(data), "scenario=qb_video", f"split_bytes={1 << 20}")
    assert made.statistics["rows_quarantined"] == {"line of 128 KiB or more": 1}
    assert sorted(made.sessions) == [1, 2, 3]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(LOG * 100)[:-20], "a complete compressed file"),
        (b"PK\x03\x04rest", "a zip archive"),
        (b"\xfd7zXZ\x00rest", "an xz file"),
        (b'{"user_id": 1}\n', "JSON"),
        (LOG.decode().encode("utf-16"), "UTF-16"),
        (LOG.replace(b",", b";"), "semicolons"),
        (LOG.replace(b",", b"\t"), "tabs"),
        (LOG.split(b"\n", 1)[1], "a header line"),
        (LOG.replace(b"item_id", b"Item_ID"), "lower case"),
        (LOG.replace(b",like", b",LIKE"), "column like"),
        (LOG.replace(b"\n", b"\rnote\n", 1), "one kind of line ends"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_file_formats_are_refused_by_name(tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        Made(tmp_path, data, "scenario=qb_video")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv"]
