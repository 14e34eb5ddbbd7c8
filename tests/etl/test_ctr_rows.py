"""Scenario `ctr`: flat rows against the log itself. Spark gives the same bytes (`test_engine.py`)."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pyarrow.parquet as pq

import etl.sessions
from etl.config import load
from etl.dataset import open_dataset
from etl.logs.tenrec import HISTORY, VIDEO


def ctr_log(path, *, rows: int, seed: int, click_share: float = 0.2, histories: int = 50):
    """Random rows; an item's id encodes its line in the log, so that a row can be found again."""
    rng = np.random.default_rng(seed)
    lines = [",".join([*VIDEO, *HISTORY])]
    for row in range(rows):
        click, like = int(rng.random() < click_share), int(rng.random() < 0.1)
        history = ["\\N" if rng.random() < 0.05 else int(rng.integers(0, histories)) for _ in HISTORY]
        category = "\\N" if rng.random() < 0.1 else row % 7
        values = (rng.integers(1, 40), 1000 + row, click, 0, like, 0, category, click, row % 3, row % 8)
        lines.append(",".join(map(str, [*values, *history])))
    path.write_text("\n".join(lines) + "\n")
    return path


def read(folder):
    dataset = open_dataset(folder)
    rows = [r for f in dataset.row_files for r in pq.read_table(dataset.file(f.path)).to_pylist()]
    return dataset, rows


def test_keeps_every_click_with_two_unclicked_rows_and_a_seeded_split(tmp_path):
    log = ctr_log(tmp_path / "ctr.csv", rows=6_000, seed=1)
    lines = [line.split(",") for line in log.read_text().splitlines()[1:]]
    options = [f"input={log}", "scenario=ctr", "shards=3", "seed=7", "split_bytes=60000"]
    for name in ("a", "b"):
        etl.sessions.build(load([*options, f"output={tmp_path / name}"]))
    dataset, rows = read(tmp_path / "a")
    assert dataset.manifest.fingerprint == open_dataset(tmp_path / "b").manifest.fingerprint
    assert sum(f.rows for f in dataset.row_files) == len(rows)
    assert max(f.rows for f in dataset.row_files) - min(f.rows for f in dataset.row_files) <= 1
    items = {r["item"]: r for r in dataset.items().to_pylist()}
    assert sorted(items) == list(range(1, len(items) + 1))
    raw = {item: r["item_id"] for item, r in items.items()} | {0: 0}
    clicks = [line for line in lines if line[2] == "1"]
    assert sum(r["click"] for r in rows) == len(clicks)
    assert len(rows) == 3 * len(clicks)
    assert len({r["item"] for r in rows}) == len(rows)  # no row twice
    for row in rows:  # each equals its line of the log, value by value
        line = lines[raw[row["item"]] - 1000]
        assert [str(row["user_id"]), str(row["click"]), str(row["like"])] == [line[0], line[2], line[4]]
        assert row["category"] == (None if line[6] == "\\N" else line[6])
        assert (row["gender"], row["age"]) == (int(line[8]), int(line[9]))
        assert [raw[i] for i in row["history"]] == [0 if v == "\\N" else int(v) for v in line[10:]]
    split = Counter(r["split"] for r in rows)
    assert abs(split["train"] / len(rows) - 0.8) < 0.03
    assert abs(split["valid"] / len(rows) - 0.1) < 0.02
    train = Counter(r["item"] for r in rows if r["split"] == "train" and r["click"])
    assert {i: r["train_clicks"] for i, r in items.items() if r["train_clicks"]} == train
    statistics = json.loads((tmp_path / "a" / "statistics.json").read_text())
    assert statistics["kept"]["exposures"] == len(rows)
    assert statistics["raw"]["exposures"] == len(lines)
    assert statistics["kept"]["users"] == len({r["user_id"] for r in rows})
    etl.sessions.build(load([*options[:3], "seed=8", f"output={tmp_path / 'c'}"]))
    assert open_dataset(tmp_path / "c").manifest.fingerprint != dataset.manifest.fingerprint


def test_items_from_drops_rows_of_unknown_items_and_empties_their_places_in_histories(tmp_path):
    """The other dataset has the items of the first 200 lines, and those below 20 in its histories."""
    known = ctr_log(tmp_path / "known.csv", rows=200, seed=1, histories=20)
    log, a, b = ctr_log(tmp_path / "ctr.csv", rows=500, seed=2, histories=2_000), tmp_path / "a", tmp_path / "b"
    common = ["scenario=ctr", "unclicked_per_click=null"]
    etl.sessions.build(load([f"input={known}", f"output={a}", *common]))
    etl.sessions.build(load([f"input={log}", f"output={b}", f"items_from={a}", *common]))
    dataset, rows = read(b)
    raw = {row["item"]: row["item_id"] for row in dataset.items().to_pylist()} | {0: 0}
    assert sorted(raw[row["item"]] for row in rows) == list(range(1000, 1200))
    assert set(raw.values()) == {*range(20), *range(1000, 1200)}
    lines = [line.split(",") for line in log.read_text().splitlines()[1:]]
    for row in rows:
        history = [0 if value == "\\N" else int(value) for value in lines[raw[row["item"]] - 1000][10:]]
        assert [raw[item] for item in row["history"]] == [item if item in raw.values() else 0 for item in history]


def test_equal_files_are_split_differently(tmp_path):
    for name in "ab":
        ctr_log(tmp_path / f"{name}.csv", rows=300, seed=3)
    options = [f"input=[{tmp_path}/a.csv,{tmp_path}/b.csv]", "scenario=ctr", "shards=1", "unclicked_per_click=null"]
    etl.sessions.build(load([*options, f"output={tmp_path / 'out'}"]))
    rows = read(tmp_path / "out")[1]
    assert [row["user_id"] for row in rows[:300]] == [row["user_id"] for row in rows[300:]]
    assert [row["split"] for row in rows[:300]] != [row["split"] for row in rows[300:]]


def test_all_unclicked_rows_are_kept_if_fewer_than_requested(tmp_path):
    log = ctr_log(tmp_path / "ctr.csv", rows=300, seed=2, click_share=0.6)
    etl.sessions.build(load([f"input={log}", "scenario=ctr", "shards=1", f"output={tmp_path / 'out'}"]))
    assert len(read(tmp_path / "out")[1]) == 300
