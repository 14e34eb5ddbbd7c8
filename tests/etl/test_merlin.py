"""Merlin's preparation of rows: against a slow reference, and through the ETL to a ranking dataset."""

from __future__ import annotations

import csv
import io
from collections import Counter

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.__main__ import main as etl
from etl.dataset import open_dataset
from etl.logs import merlin
from etl.logs.merlin import Limits, prepare
from etl.merlin import main
from etl.twin.__main__ import main as twin

HEADER = "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age\n"
ROWS = st.lists(st.tuples(*(st.integers(0, n) for n in (4, 5, 1, 1, 1, 1)), st.sampled_from(["0", "a,b", "\\N"])))


def slow(rows, limits):
    """The remaining rows, counted one by one."""
    rows = [row for row in rows if row[2] or not any(row[3:6])]
    for _ in range(limits.rounds):
        users = Counter(row[0] for row in rows)
        rows = [row for row in rows if limits.min_user_rows <= users[row[0]] <= limits.max_user_rows]
        items = Counter(row[1] for row in rows)
        rows = [row for row in rows if items[row[1]] >= limits.min_item_rows]
    return rows


@given(ROWS, st.integers(1, 4), st.integers(2, 8), st.integers(1, 4), st.integers(0, 3), st.integers(1, 5))
@settings(max_examples=100)
def test_prepared_rows_equal_the_slow_reference(tmp_path_factory, rows, least, more, items, rounds, at_once):
    folder, limits = tmp_path_factory.mktemp("merlin"), Limits(least, least + more, items, rounds)
    lines = [
        f"{u},{i},{c},{f},{lk},{s},{category if category != 'a,b' else chr(34) + category + chr(34)},1,2,\\N\n"
        for u, i, c, f, lk, s, category in rows
    ]
    (folder / "log.csv").write_text(HEADER + "".join(lines))
    expected, out = slow(rows, limits), io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merlin, "COUNTED_ROWS", at_once)
        if not expected:
            with pytest.raises(Exception, match=r"expected (rows of users|input with data rows)"):
                prepare([str(folder / "log.csv")], out, folder, limits)
            return
        written = prepare([str(folder / "log.csv")], out, folder, limits)
    found = list(csv.DictReader(io.StringIO(out.getvalue().decode())))
    names = ("user_id", "item_id", "click", "follow", "like", "share")
    assert [tuple(int(row[name]) for name in names) for row in found] == [row[:6] for row in expected]
    assert [row["video_category"] for row in found] == [row[6].replace("\\N", "") for row in expected]
    assert {row["gender"] + row["age"] + row["hist_1"] + row["hist_10"] for row in found} == {"200"}
    assert (written.rows_read, written.rows) == (len(rows), len(expected))
    assert (written.users, written.items) == (len({r[0] for r in expected}), len({r[1] for r in expected}))
    assert sorted(path.name for path in folder.iterdir()) == ["log.csv"]


def test_prepared_rows_of_a_twin_become_a_ranking_dataset(tmp_path, capsys):
    assert twin([f"output={tmp_path}/log.csv", "scenario=qk_video", "users=300", "items=3000", "seed=1"]) == 0
    assert main([f"input={tmp_path}/log.csv", f"output={tmp_path}/rows.csv", "min_item_rows=5"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    with (tmp_path / "rows.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert line.startswith(f"{len(rows):,} of ")
    clicks = sum(row["click"] == "1" for row in rows)
    for option, expected in (("null", len(rows)), ("0", clicks), ("1", None)):
        output = tmp_path / f"data {option}"
        options = [f"input={tmp_path}/rows.csv", f"output={output}", "scenario=ctr", f"unclicked_per_click={option}"]
        assert etl(options) == 0
        dataset = open_dataset(output)
        tables = [pq.read_table(dataset.file(entry.path)) for entry in dataset.row_files]
        n, clicked = (sum(f(table) for table in tables) for f in (len, lambda t: sum(t["click"].to_pylist())))
        assert clicked == clicks
        assert n == (expected if expected is not None else min(len(rows), 2 * clicks))


def test_invalid_input_is_reported_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "log.csv").write_text(HEADER + "1,1,1,0,0,0,0,1,2,3\n")
    (tmp_path / "other.csv").write_text("user_id,click\n1,1\n")
    for wrong, named in (
        (["input=absent.csv"], "absent.csv"),
        ([f"input={tmp_path}/other.csv"], "item_id"),
        ([f"input={tmp_path}/log.csv"], "none of 1 rows"),
        ([f"input={tmp_path}/log.csv", "min_item_rows=0"], "min_item_rows"),
        ([f"input={tmp_path}/log.csv", "min_user_rows=9", "max_user_rows=8"], "max_user_rows"),
    ):
        assert main([*wrong, f"output={tmp_path}/out.csv"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: expected ")
        assert named in err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "other.csv"]
