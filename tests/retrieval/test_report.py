"""The report in headless Chromium, at the widths of a phone and of a desktop."""

from __future__ import annotations

import json
import shutil

import pytest

from etl.__main__ import main as build
from etl.dataset import open_dataset
from retrieval.config import load
from retrieval.evaluate import evaluate
from retrieval.report.page import feedback_note
from tests.data import TINY
from tests.support.browser import WIDTHS, opened


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    tiny = tmp_path_factory.mktemp("report") / "tiny"
    shutil.copytree(TINY, tiny)
    curves = {
        "valid/hr@20": [[1, 0.1], [2, 0.3]],
        "valid/ndcg@20": [[1, 0.05], [2, 0.1]],
        "train/loss/next": [[1, 2.0], [2, 1.5]],
    }
    gates = {
        "tasks": ["next", "like"],
        "mean_weight": {"next": [0.9, 0.1], "like": [0.5, 0.5]},
        "entropy_nats": {"next": 0.325, "like": 0.693},
    }
    (tiny / "diagnostics.json").write_text(json.dumps({"curves": curves, "gates": gates}))
    (tiny / "titles.csv").write_text("item_id,title\n" + "".join(f"{i},<Film> {i} & more\n" for i in range(1_000)))
    evaluate(
        load(
            [
                f"titles={tiny / 'titles.csv'}",
                f"bundle={tiny / 'bundle'}",
                f"data={tiny / 'data'}",
                f"output={tiny / 'out'}",
                "cutoffs=[1,2,5]",
                "index=ivf_flat",
            ]
        )
    )
    return tiny / "out" / "report.html"


def test_page_shows_the_values_of_metrics_json(report):
    text = report.read_text()
    metrics = json.loads((report.parent / "metrics.json").read_text())
    for name in ("hr@5", "ndcg@5", "mrr@5", "auc/like"):
        assert f"{metrics['test'][name]:.4f}" in text
    for title in (
        "Next click",
        "Feedback",
        "Validation",
        "Training loss",
        "HR@5 by session length",
        "HR@5 by popularity of the target",
        "Fidelity of the index",
        "Calibration",
        "Verdict",
        "Recommended lists",
        "Gates",
        "Session length",
        "Popularity",
    ):
        assert f"<h2>{title}</h2>" in text
    assert "0.90" in text
    assert "next (47%)" in text
    assert "other users' later clicks" in text.replace("&#x27;", "'")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_page_opens_without_errors_or_requests_and_fits_the_width(report, width, scheme):
    actual = opened(report, width, scheme)
    assert actual.errors == []
    assert actual.violations == []
    assert actual.requests == []
    assert actual.width <= width
    assert len(actual.charts) >= 9
    assert min(actual.charts) > 250
    assert actual.smallest >= 8


def test_feedback_note_depends_on_whether_the_log_shows_unclicked_rows(fifty, tmp_path):
    assert "without a click" not in feedback_note(fifty)
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id,click,like\n" + "".join(f"{u},{i},1,{i % 2}\n" for u in (1, 2) for i in range(12)))
    assert build([f"input={log}", f"output={tmp_path / 'data'}", "scenario=qb_video"]) == 0
    assert "Nothing here was shown without a click" in feedback_note(open_dataset(str(tmp_path / "data")))
