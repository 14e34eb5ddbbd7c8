"""The sessions job against an independent, slow reference sessionizer."""

from __future__ import annotations

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
from etl.dataset import open_dataset
from etl.runtime.errors import InputError
from tests.support.engine import build, write_log
from tests.support.reference import Options, sessionize
from tests.support.session_logs import (
    DENSE_IDS,
    HEADER,
    any_scenario,
    check,
    command,
    protocol_of,
    protocols,
    write_texts,
)


@given(any_scenario(), protocols(), st.integers(40, 600), st.integers(1, 4))
@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
def test_job_equals_the_reference_sessionizer_element_by_element(logs_of, options, split_bytes, partitions):
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
def test_job_on_spark_equals_the_reference_sessionizer(spark, tmp_path, options):
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
def test_rerun_and_other_engine_give_identical_bytes(spark, tmp_path):
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


def test_user_with_a_hundred_thousand_clicks_keeps_the_last_30(tmp_path):
    rows = [(7, 1 + i % 997, 1, 0, 0, 0, "c", 1, 1, 2) for i in range(100_000)]
    log = write_log(tmp_path / "log.csv", rows)
    dataset = build(
        [f"input={log}", f"output={tmp_path / 'out'}", "scenario=qb_video", "shards=1"], split_bytes=1 << 20
    )
    (row,) = __import__("pyarrow.parquet").parquet.read_table(dataset.file(dataset.session_files[0].path)).to_pylist()
    raw = {r["item"]: r["item_id"] for r in dataset.items().to_pylist()}
    assert row["n_clicks"] == 100_000
    assert [raw[i] for i in row["items"]] == [1 + i % 997 for i in range(99_970, 100_000)]


def test_log_without_rows_is_refused_and_writes_nothing(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text(HEADER + "\n")
    with pytest.raises(InputError, match="data rows"):
        build([f"input={log}", f"output={tmp_path / 'out'}", "scenario=qb_video"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv"]


def test_error_if_no_user_has_enough_clicks_gives_the_counts(tmp_path):
    rows = [(user, item, 1, 0, 0, 0, "c", 1, 1, 1) for user in (1, 2) for item in range(3 * user)]
    log = write_log(tmp_path / "log.csv", [*rows, ("x", 2, 1, 0, 0, 0, "c", 1, 1, 1)])
    with pytest.raises(InputError, match="min_clicks=10") as raised:
        build([f"input={log}", f"output={tmp_path / 'out'}", "scenario=qb_video", "shards=2"])
    assert "2 users of 9 rows, who have 6 clicks at most; 1 rows could not be read: user_id is not" in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv"]


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


@pytest.mark.parametrize("limit", ["first_users=9", "max_item_clicks=9"])
def test_items_that_were_shown_but_never_clicked_stay_beside_other_limits(tmp_path, limit):
    rows = [(1, item, int(item != 8), 0, 0, 0, "c", 1, 1, 1) for item in (5, 8, 6, 7)]
    log = write_log(tmp_path / "log.csv", rows)
    options = ["scenario=qb_video", "shards=1", "protocol.min_clicks=3", f"protocol.{limit}"]
    items = build([f"input={log}", f"output={tmp_path / 'out'}", *options]).items().to_pylist()
    assert sorted(row["item_id"] for row in items) == [5, 6, 7, 8]


def test_overwrite_keeps_the_old_output_until_the_new_one_is_complete(tmp_path):
    log = write_log(tmp_path / "log.csv", [(1, i, 1, 0, 0, 0, "c", 1, 1, 1) for i in range(12)])
    options = [f"input={log}", f"output={tmp_path / 'out'}", "scenario=qb_video", "shards=1"]
    before = build(options).manifest.fingerprint
    with pytest.raises(InputError, match="overwrite=true"):
        build(options)
    log.write_text(HEADER + "\n")
    with pytest.raises(InputError, match="data rows"):
        build([*options, "overwrite=true"])
    assert open_dataset(tmp_path / "out").manifest.fingerprint == before
    # Killed between the two renames of a replacement: the old folder is restored.
    shutil.move(tmp_path / "out", tmp_path / ".out.old")
    with pytest.raises(InputError, match="overwrite=true"):
        build(options)
    assert open_dataset(tmp_path / "out").manifest.fingerprint == before
