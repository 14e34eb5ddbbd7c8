"""Random logs and protocols for the sessions job, and comparison of its dataset with the reference sessionizer."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from hypothesis import strategies as st

from etl.dataset import Dataset
from etl.logs.tenrec import SCENARIOS
from tests.support.reference import Expected, Options

HEADER = "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age"


DENSE_IDS = 64
"""Replaces `etl.statistics.DENSE_IDS` (arrays of 256 MiB) where hundreds of logs have ids on both sides of it."""


@st.composite
def logs(draw) -> list[str]:
    """One to three files with few users and items, so that repeats, conflicts and splits are common."""
    flag = st.sampled_from([0, 0, 0, 1])
    row = st.tuples(
        st.integers(1, 4),
        st.integers(1, 12),
        st.sampled_from([0, 1, 1]),
        flag,
        flag,
        flag,
        st.sampled_from(["\\N", "", "a", "b", "ä", "0", "0.0", "2.50", "2.5"]),
        st.sampled_from(["\\N", "", "0", "1", "7"]),
        st.sampled_from(["\\N", "0", "1", "2"]),
        st.sampled_from(["\\N", "", "3", "-1"]),
    )
    rows = draw(st.lists(row, min_size=1, max_size=120))
    # Ids that fit dense arrays, ids that do not, and some of both.
    base = draw(st.sampled_from([0, 0, DENSE_IDS - 6, 1 << 60]))
    rows = [(r[0], r[1] + base, *r[2:]) for r in rows]
    if draw(st.booleans()):
        rows.sort(key=lambda r: r[0])
    repeats = draw(st.lists(st.tuples(st.sampled_from(rows), st.booleans()), max_size=10))
    rows += [spelled_otherwise(row) if other else row for row, other in repeats]
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=2)))
    pieces = [rows[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    newline = draw(st.sampled_from(["\n", "\r\n"]))
    return [newline.join([HEADER, *(",".join(map(str, r)) for r in piece)]) + newline for piece in pieces]


def spelled_otherwise(row: tuple) -> tuple:
    """The row with the same values in other spellings."""
    user, item, click, *more, category, watching, gender, age = row
    texts = {"\\N": "", "": " ", "0": "0.0", "0.0": "-0", "2.50": "02.5", "-1": '"-1.0"'}
    flags = [f"{bool(flag)}" for flag in more]
    return (
        f"0{user}.0",
        f" {item}",
        f"{click}.0",
        *flags,
        *(texts.get(x, x) for x in (category, watching, gender, age)),
    )


@st.composite
def any_scenario(draw) -> tuple[str, list[str]]:
    """Logs of one of the scenarios; article logs have the rows of video logs in the columns of articles."""
    scenario = draw(st.sampled_from(["qk_video", "qb_video", "qk_article", "qb_article", "sbr"]))
    texts = draw(logs())
    if "article" not in scenario:
        return scenario, texts
    names = list(SCENARIOS[scenario].columns)
    written = []
    for text in texts:
        lines = [",".join(names)]
        for video in csv.DictReader(text.splitlines()):
            row = dict.fromkeys(names, "0.5") | {n: v for n, v in video.items() if n in names}
            row |= {"category_second": video["video_category"], "click": video["click"].removesuffix(".0") + ".0"}
            if "read" in names:
                row |= {"read": video["follow"], "favorite": video["share"], "read_time": "\\N"}
            lines.append(",".join(row[n] for n in names))
        written.append("\n".join(lines) + "\n")
    return scenario, written


@st.composite
def protocols(draw) -> Options:
    return Options(
        clicked_only=draw(st.sampled_from([False, False, True])),
        min_clicks=draw(st.integers(3, 6)),
        max_clicks=draw(st.integers(3, 12)),
        dedupe=draw(st.sampled_from(["none", "exact", "first"])),
        min_item_clicks=draw(st.sampled_from([1, 1, 2, 3])),
        max_item_clicks=draw(st.sampled_from([None, None, 6])),
        first_users=draw(st.sampled_from([None, None, 2])),
        first_rows=draw(st.sampled_from([None, None, 20])),
        exposures=draw(st.booleans()),
    )


def protocol_of(options: Options) -> dict[str, object]:
    return {k: v for k, v in vars(options).items() if k != "exposures"}


def write_texts(folder: Path, texts: list[str]) -> list[str]:
    paths = [folder / f"log-{number}.csv" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    return list(map(str, paths))


def command(folder: Path, texts: list[str], options: Options, *more: str, scenario: str = "qb_video") -> list[str]:
    paths = write_texts(folder, texts)
    return [
        f"input=[{','.join(paths)}]",
        f"output={folder / 'out'}",
        f"scenario={scenario}",
        "shards=3",
        f"exposures={str(options.exposures).lower()}",
        *more,
        *(f"protocol.{k}={'null' if v is None else v}" for k, v in protocol_of(options).items()),
    ]


def check(dataset: Dataset, expected: Expected) -> None:
    items = dataset.items().to_pylist()
    assert items == expected.items
    raw_id = {row["item"]: row["item_id"] for row in items}
    sessions, sizes = {}, []
    import pyarrow.parquet as pq

    for entry in dataset.session_files:
        rows = pq.read_table(dataset.file(entry.path)).to_pylist()
        assert len(rows) == entry.rows
        sizes.append(len(rows))
        for row in rows:
            row["n_kept"] = len(row["items"])
            for name in ("items", "exposure_items"):
                row[name] = [raw_id[item] for item in row[name]]
            sessions[row.pop("user_id")] = row
    assert sessions == expected.sessions
    assert max(sizes) - min(sizes) <= 1
    actual = json.loads(dataset.file("statistics.json").read_text())
    for part, values in (("raw", expected.raw), ("kept", expected.kept)):
        assert {name: actual[part][name] for name in values} == values
    assert dataset.manifest.counts["sessions"] == len(expected.sessions)
