"""Statistics of a log compared with public scans: counted by hand, and for the twin."""

from __future__ import annotations

import gzip
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etl.dataset_page import differs, log_page
from etl.describe import main
from etl.logs.distinct_ids import DistinctIds
from etl.logs.scan import scan
from etl.logs.splits import COMPRESSION_RATIO
from etl.logs.tenrec import SCENARIOS, open_logs
from etl.logs.tenrec_published import SCAN_STATISTICS
from etl.runtime.errors import InputError
from etl.statistics import quantiles
from etl.twin.simulate import make_twin
from etl.twin.write import write
from tests.support.engine import write_log

# user, item, click, follow, like, share, category, watching_times, gender, age
ROWS = [
    (1, 10, 1, 0, 1, 0, 0, 1, 1, 2),
    (1, 11, 0, 0, 1, 0, 1, 0, 1, 2),
    (2, 10, 0, 0, 0, 0, 0, 2, 2, 0),
    (1, 10, 0, 0, 0, 0, 0, 1, 2, 2),
    (2, 12, 1, 1, 0, 0, "\\N", 1, 2, 0),
    (2, 12, 1, 1, 0, 0, "\\N", 1, 2, 0),
]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_quantile_is_the_smallest_value_with_that_share_of_values_not_above_it(values):
    pairs = np.array([[value, values.count(value)] for value in dict.fromkeys(values)])
    for name, actual in quantiles(pairs).items():
        share = Fraction(name)
        assert actual == min(v for v in values if sum(other <= v for other in values) >= max(share * len(values), 1))


def test_blank_lines_are_no_rows_and_zeros_are_values(tmp_path):
    log = write_log(tmp_path / "log.csv", [(*row[:7], 0, *row[8:]) for row in ROWS])
    assert scan([str(log)], "qb_video")["entered share of unclicked rows"] == 0
    empty = tmp_path / "empty.csv"
    empty.write_text(log.read_text().splitlines()[0] + "\n\n\n")
    with pytest.raises(InputError, match="a log with rows"):
        scan([str(empty)], "qb_video")
    assert scan([str(empty), str(log)], "qb_video") == scan([str(log)], "qb_video")


def test_scanned_statistics_match_counting_by_hand(tmp_path):
    statistics = scan([str(write_log(tmp_path / "log.csv", ROWS))], "qb_video")
    expected = {
        "rows": 6,
        "clicks": 3,
        "click rate": 3 / 6,
        "rows with an action and no click": 1 / 6,
        "mean run of a user's rows": 6 / 4,
        "blocks of a user": 4 / 2,
        "entered share of unclicked rows": 2 / 3,
        "likes": 2,
        "likes on unclicked rows": 1 / 2,
        "follows on unclicked rows": 0,
        "gender 1": 2 / 6,
        "age 0": 3 / 6,
        "category null": 2 / 6,
        "category 1": 1 / 6,
        "exact duplicates": 1 / 6,
        "repeated pairs of user and item": 2 / 6,
        "pairs with conflicting clicks, per row": 1 / 6,
        "users with several genders": 1 / 2,
        "fewest clicks of a user": 1,
        "click rate in the first third of a user's rows": 1 / 2,
        "click rate in the last third of a user's rows": 1 / 2,
    }
    assert {name: statistics[name] for name in expected} == pytest.approx(expected)
    assert "shares" not in statistics


def test_twin_of_a_video_log_matches_the_public_scan(tmp_path):
    """A small log has more repeats than the real one; the other statistics do not depend on its size."""
    with (tmp_path / "log.csv").open("wb") as stream:
        write(make_twin("qk_video", users=2_000, items=300_000, seed=1), stream, tmp_path / "log.csv")
    statistics = scan([str(tmp_path / "log.csv")], "qk_video")
    names = [
        *(
            "click rate",
            "likes on unclicked rows",
            "mean run of a user's rows",
            "blocks of a user",
            "gender 1",
            "age 2",
        ),
        *("category 0", "category 1", "entered share of unclicked rows", "rows with an action and no click"),
    ]
    assert [name for name in names if differs(statistics[name], SCAN_STATISTICS["qk_video"][name])] == []
    text = log_page("qk_video", ["log.csv"], statistics)
    assert text.count("alike") >= len(names)
    assert not differs(0.4, (0.37, 0.57))
    assert differs(0.3, (0.37, 0.57))
    assert differs(0.7, 0.57)


def test_log_page_is_written_and_invalid_options_are_reported(tmp_path, capsys):
    log, page = write_log(tmp_path / "log.csv", ROWS), tmp_path / "page.html"
    assert main([f"input={log}", "scenario=qb_video", f"output={page}"]) == 0
    assert "differs" in page.read_text()
    for wrong in (
        [f"input={log}"],
        [],
        [f"input={log}", "data=x", "scenario=qb_video"],
        ["input=none.csv", "scenario=qb_video"],
    ):
        assert main([*wrong, f"output={page}"]) == 2
        assert capsys.readouterr().err.startswith("error: expected ")


def test_scan_reads_the_spellings_that_etl_reads_and_skips_what_it_quarantines(tmp_path):
    (tmp_path / "log.csv").write_text(
        "user_id,item_id,click,like,gender\n1.0,2.0,True,0,1\n"
        "u1,3,1,0,1\n"  # an id that is no integer
        "4,5,0,1.0,\\N\n4,6,1,,2\n4,6,maybe,0,2\n"
    )
    statistics = scan([str(tmp_path / "log.csv")], "qb_video")
    expected = {
        "rows": 3,
        "clicks": 2,
        "likes": 1,
        "likes on unclicked rows": 1,
        "gender null": 1 / 3,
        "gender 1": 1 / 3,
    }
    assert {name: statistics[name] for name in expected} == pytest.approx(expected)
    assert not any(np.isnan(value) for value in statistics.values())


def test_log_page_escapes_the_log_and_shows_counts_as_numbers(tmp_path, capsys):
    log, page = tmp_path / "log.csv", tmp_path / "page.html"
    log.write_text("user_id,item_id,click,video_category\n1,2,1,<script>alert(1)</script>\n")
    assert main([f"input={log}", "scenario=qb_video", f"output={page}"]) == 0
    text = page.read_text()
    assert "<script>" not in text
    assert "<td>category &lt;script&gt;alert(1)&lt;/script&gt;</td><td>100.00%</td>" in text
    assert "<td>blocks of a user</td><td>1</td><td>1.49</td>" in text
    log.write_text("user_id,item_id,click\n")
    assert main([f"input={log}", "scenario=qb_video", f"output={page}"]) == 2
    assert "a log with rows, got none usable" in capsys.readouterr().err


def test_sample_of_users_is_bounded_by_the_text_of_a_compressed_log(tmp_path):
    """The sample's bound is on the text, which is larger than its file."""
    text = write_log(tmp_path / "log.csv", ROWS).read_bytes()
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(text))
    [file] = open_logs([str(tmp_path / "log.csv.gz")], SCENARIOS["qb_video"])
    assert file.unpacked_bytes == COMPRESSION_RATIO * (tmp_path / "log.csv.gz").stat().st_size
    [file] = open_logs([str(tmp_path / "log.csv")], SCENARIOS["qb_video"])
    assert file.unpacked_bytes == len(text)


@pytest.mark.parametrize("pending", [0, 3, 1000])
def test_distinct_ids_are_those_of_a_set(monkeypatch, pending):
    monkeypatch.setattr("etl.logs.distinct_ids.PENDING", pending)
    rng, ids, expected = np.random.default_rng(0), DistinctIds(), set()
    for _ in range(20):
        block = rng.integers(-50, 50, rng.integers(0, 30))
        ids.add(block)
        expected |= set(block.tolist())
        assert ids.n_pending <= max(pending, len(expected))
    assert ids.sorted().tolist() == sorted(expected)
