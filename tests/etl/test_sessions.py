"""The sessions job against an independent slow sessionizer."""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import etl.sessions
from etl.config import EtlConfig, Protocol, load
from etl.dataset import Dataset, open_dataset
from etl.logs.tenrec import SCENARIOS
from etl.runtime.errors import InputError
from tests.support.engine import build, write_log
from tests.support.reference import Expected, Options, sessionize

HEADER = "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age"
DENSE_IDS = 64
"""In place of `etl.statistics.DENSE_IDS` (arrays of 256 MiB) where hundreds of logs have ids on both sides of it."""


@st.composite
def logs(draw) -> list[str]:
    """One to three files; users and items few, so that repeats, conflicts and splits abound."""
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
    # Ids that fit arrays with a place for each, ids that do not, and some of both.
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
    """A row of the same values."""
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
    """Logs of one of the scenarios; those of articles are the video ones' rows in the articles' columns."""
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
    for part, wanted in (("raw", expected.raw), ("kept", expected.kept)):
        assert {name: actual[part][name] for name in wanted} == wanted
    assert dataset.manifest.counts["sessions"] == len(expected.sessions)


def has_rows(texts: list[str]) -> bool:
    return any(len(text.split()) > 1 for text in texts)


@given(any_scenario(), protocols(), st.integers(40, 600), st.integers(1, 4))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_equals_the_slow_sessionizer_element_by_element(logs_of, options, split_bytes, partitions):
    scenario, texts = logs_of
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = EtlConfig(
            input=write_texts(folder, texts),
            output=str(folder / "out"),
            scenario=scenario,
            protocol=Protocol(**protocol_of(options)),
            exposures=options.exposures,
            shards=3,
        )
        expected = sessionize(texts, options)
        with mock.patch("etl.statistics.DENSE_IDS", DENSE_IDS):
            if not expected.sessions:
                with pytest.raises(InputError, match=r"a user with|data rows"):
                    build(config, split_bytes=split_bytes, partitions=partitions)
                return
            check(build(config, split_bytes=split_bytes, partitions=partitions), expected)


@pytest.mark.spark
@pytest.mark.parametrize(
    "options",
    [
        Options(min_clicks=3, max_clicks=5),
        Options(min_clicks=3, max_clicks=4, dedupe="exact", min_item_clicks=2, first_users=3),
        Options(min_clicks=3, max_clicks=30, dedupe="first", exposures=False),
    ],
)
def test_the_job_on_spark_equals_the_slow_sessionizer(spark, tmp_path, options):
    rng = __import__("numpy").random.default_rng(5)
    lines = [
        f"{rng.integers(1, 9)},{rng.integers(1, 30)},{rng.integers(2)},{rng.integers(2)},{rng.integers(2)},0,"
        f"{rng.choice(['a', 'b'])},{rng.integers(4)},1,{rng.integers(5)}"
        for _ in range(600)
    ]
    texts = ["\n".join([HEADER, *lines[:350]]) + "\n", "\n".join([HEADER, *lines[350:]]) + "\n"]
    etl.sessions.build(load(command(tmp_path, texts, options, "engine=spark")))
    check(open_dataset(tmp_path / "out"), sessionize(texts, options))


@pytest.mark.spark
def test_a_rerun_gives_identical_bytes_and_the_engine_does_not_matter(spark, tmp_path):
    from tests.support.logs import generated_log

    log = generated_log(tmp_path / "log.csv", users=40, items=50, seed=3)
    options = [f"input={log}", "scenario=qb_video", "shards=4"]
    hashes = []
    for name in ("a", "b"):
        manifest = etl.sessions.build(load([*options, "engine=spark", f"output={tmp_path / name}"]))
        hashes.append((manifest.fingerprint, [f.sha256 for f in manifest.files]))
    assert hashes[0] == hashes[1]
    without = build([*options, f"output={tmp_path / 'c'}"], partitions=1).manifest
    assert (without.fingerprint, [f.sha256 for f in without.files]) == hashes[0]


def test_one_user_with_a_hundred_thousand_clicks(tmp_path):
    rows = [(7, 1 + i % 997, 1, 0, 0, 0, "c", 1, 1, 2) for i in range(100_000)]
    log = write_log(tmp_path / "log.csv", rows)
    dataset = build(
        [f"input={log}", f"output={tmp_path / 'out'}", "scenario=qb_video", "shards=1"], split_bytes=1 << 20
    )
    (row,) = __import__("pyarrow.parquet").parquet.read_table(dataset.file(dataset.session_files[0].path)).to_pylist()
    raw = {r["item"]: r["item_id"] for r in dataset.items().to_pylist()}
    assert row["n_clicks"] == 100_000
    assert [raw[i] for i in row["items"]] == [1 + i % 997 for i in range(99_970, 100_000)]


def test_a_header_without_rows_is_refused_and_nothing_is_left(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text(HEADER + "\n")
    with pytest.raises(InputError, match="data rows"):
        build([f"input={log}", f"output={tmp_path / 'out'}", "scenario=qb_video"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv"]


def test_no_user_with_enough_clicks_is_an_error_that_says_why(tmp_path):
    rows = [(user, item, 1, 0, 0, 0, "c", 1, 1, 1) for user in (1, 2) for item in range(3 * user)]
    log = write_log(tmp_path / "log.csv", [*rows, ("x", 2, 1, 0, 0, 0, "c", 1, 1, 1)])
    with pytest.raises(InputError, match="min_clicks=10") as raised:
        build([f"input={log}", f"output={tmp_path / 'out'}", "scenario=qb_video", "shards=2"])
    assert "2 users of 9 rows, who have 6 clicks at most; 1 rows could not be read: user_id is not" in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv"]


def test_other_column_order_and_unknown_columns_change_nothing(tmp_path):
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


def test_items_from_keeps_the_ids_of_another_dataset_and_drops_unknown_items(tmp_path):
    base = write_log(tmp_path / "a.csv", [(1, i, 1, 0, 0, 0, "c", 1, 1, 1) for i in (5, 6, 7, 8, 9)])
    other = write_log(tmp_path / "b.csv", [(2, i, 1, 0, 0, 0, "d", 1, 1, 1) for i in (9, 4, 8, 3, 7, 6)])
    common = ["scenario=qb_video", "shards=1", "protocol.min_clicks=3"]
    first = build([f"input={base}", f"output={tmp_path / 'x'}", *common])
    second = build([f"input={other}", f"output={tmp_path / 'y'}", f"items_from={tmp_path / 'x'}", *common])
    assert second.items(["item", "item_id"]).equals(first.items(["item", "item_id"]))
    raw = {r["item"]: r["item_id"] for r in first.items().to_pylist()}
    (row,) = __import__("pyarrow.parquet").parquet.read_table(second.file(second.session_files[0].path)).to_pylist()
    assert [raw[i] for i in row["items"]] == [9, 8, 7, 6]
    statistics = json.loads(second.file("statistics.json").read_text())
    assert statistics["rows_of_unknown_items"] == 2
    assert statistics["raw"]["clicks"] == 6


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
def test_a_malformed_row_is_quarantined_with_its_place_and_the_others_are_kept(tmp_path, line, reason):
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
def test_harmless_spellings_are_read_right(tmp_path, change):
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


def test_overwrite_keeps_the_old_output_until_the_new_one_is_whole(tmp_path):
    log = write_log(tmp_path / "log.csv", [(1, i, 1, 0, 0, 0, "c", 1, 1, 1) for i in range(12)])
    options = [f"input={log}", f"output={tmp_path / 'out'}", "scenario=qb_video", "shards=1"]
    before = build(options).manifest.fingerprint
    with pytest.raises(InputError, match="overwrite=true"):
        build(options)
    log.write_text(HEADER + "\n")
    with pytest.raises(InputError, match="data rows"):
        build([*options, "overwrite=true"])
    assert open_dataset(tmp_path / "out").manifest.fingerprint == before
    # Killed between the two renames of a replacement: the old folder is found again.
    shutil.move(tmp_path / "out", tmp_path / ".out.old")
    with pytest.raises(InputError, match="overwrite=true"):
        build(options)
    assert open_dataset(tmp_path / "out").manifest.fingerprint == before
