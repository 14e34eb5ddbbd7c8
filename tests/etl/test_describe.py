"""The dataset page: counts, distributions and invalid input."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from etl.__main__ import main as build
from etl.dataset_page import watched
from etl.describe import main
from etl.logs.tenrec_published import PUBLISHED
from tests.support.browser import WIDTHS, opened


def test_watching_times_are_summed_per_item(fifty):
    clicks, times = Counter(), Counter()
    for entry in fifty.session_files:
        for row in pq.read_table(fifty.file(entry.path)).to_pylist():
            clicks.update(row["items"])
            for item, watching in zip(row["items"], row["watching_times"], strict=True):
                times[item] += watching
    found_clicks, found_times = watched(fifty)
    assert found_clicks.tolist() == [clicks[item] for item in sorted(clicks)]
    assert found_times.tolist() == [times[item] for item in sorted(clicks)]
    assert np.array_equal(found_clicks, [c for c in fifty.items()["clicks"].to_pylist() if c])


def test_page_shows_dataset_and_published_counts(fifty, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main([f"data={fifty.path}", f"output={page}"]) == 0
    text = page.read_text()
    assert f"{PUBLISHED['qb_video'].clicks:,}" in text
    assert f"{fifty.manifest.counts['clicks']:,}" in text
    assert "watching times of an item" in text
    assert "<svg" in text
    assert "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert main([f"data={tmp_path}", f"output={page}"]) == 2
    assert main([f"data={fifty.path}", f"output={tmp_path}"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_page_of_a_log_without_watching_times_shows_clicks_only(tmp_path):
    log, page = tmp_path / "log.csv", tmp_path / "page.html"
    log.write_text("user_id,item_id,click\n" + "".join(f"{u},{i},1\n" for u in range(4) for i in range(12)))
    assert build([f"input={log}", f"output={tmp_path / 'data'}", "scenario=qb_video"]) == 0
    assert main([f"data={tmp_path / 'data'}", f"output={page}"]) == 0
    assert "clicks of an item" in page.read_text()
    assert "watching times of an item" not in page.read_text()


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_page_opens_without_errors_or_requests_and_fits_the_width(fifty, tmp_path, width):
    page = tmp_path / "page.html"
    assert main([f"data={fifty.path}", f"output={page}"]) == 0
    actual = opened(page, width)
    assert actual.errors == []
    assert actual.violations == []
    assert actual.requests == []
    assert actual.width <= width
    assert actual.charts
    assert min(actual.charts) > 250
