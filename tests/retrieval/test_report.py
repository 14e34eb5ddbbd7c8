"""The report in headless Chromium, at the widths of a phone and of a desktop."""

from __future__ import annotations

import json
import shutil

import pytest

from retrieval.config import load
from retrieval.evaluate import evaluate

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def report(tiny):
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
    evaluate(load([f"bundle={tiny / 'bundle'}", f"data={tiny / 'data'}", f"output={tiny / 'out'}", "cutoffs=[1,2,5]"]))
    return tiny / "out" / "report.html"


def test_the_page_says_what_metrics_json_says(report):
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
        "Gates",
        "Session length",
        "Popularity",
    ):
        assert f"<h2>{title}</h2>" in text
    assert "0.90" in text
    assert "next (47%)" in text
    assert "other users' later clicks" in text.replace("&#x27;", "'")


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_opens_without_errors_or_requests_and_fits(report, width):
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    errors, requests = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("request", lambda r: requests.append(r.url))
        page.goto(report.as_uri())
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        smallest = page.evaluate(
            "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
        )
        boxes = page.evaluate("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)")
        browser.close()
    assert errors == []
    assert [r for r in requests if not r.startswith(("file:", "data:"))] == []
    assert len(boxes) >= 6
    assert min(boxes) > 250
    assert smallest >= 8
