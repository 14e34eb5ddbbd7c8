"""The server: answers bit-identical to the evaluation, invalid requests, and the page in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from retrieval.__main__ import main as evaluate
from tests.support.browser import CHROMIUM, WIDTHS, violations
from tests.support.runs import SMALL
from trainer.__main__ import main as train
from trainer.program_configs import ServeConfig
from trainer.serve import main
from trainer.serving.recommendation_service import RecommendationService
from trainer.serving.session_request import SessionRequest

VARIANTS = {
    "hybrid with blend": (
        ["model=hybrid", "network.past_actions=true", "network.profile=true"],
        ["blend=[model,sequential_rules,v_sknn]"],
    ),
    "refit": (["model=gru4rec", "train.refit=true", "network.transitions=true"], ["blend=none"]),
    "nextitnet": (["model=nextitnet"], ["blend=none"]),
    "sasrec, seen items stay": (["model=sasrec"], ["mask_seen=false"]),
}


def evaluated(fifty, folder: Path, name: str) -> tuple[Path, Path]:
    run, result = folder / "run", folder / "result"
    of_run, of_result = VARIANTS[name]
    titles = folder / "titles.csv"
    titles.write_text("item_id,title\n" + "".join(f'{item},"Film {item}, or not"\n' for item in range(1, 3_000)))
    assert train([f"data={fifty.path}", f"output={run}", *SMALL, *of_run]) == 0
    options = [f"bundle={run / 'bundle'}", f"data={fifty.path}", f"output={result}", f"titles={titles}", *of_result]
    assert evaluate([*options, "cutoffs=[5,10]"]) == 0
    return run, result


@pytest.fixture(scope="module")
def served(fifty, tmp_path_factory):
    return evaluated(fifty, tmp_path_factory.mktemp("serve"), "hybrid with blend")


def requests_of(dataset, recommender: RecommendationService) -> list[SessionRequest]:
    actual = []
    for entry in dataset.session_files:
        for row in pq.read_table(dataset.file(entry.path)).to_pylist():
            actual.append(
                SessionRequest(
                    items=recommender.evaluation.item_id[row["items"]].tolist(),
                    user_id=row["user_id"],
                    feedback=row["feedback"],
                    watching_times=row["watching_times"],
                    n_clicks=row["n_clicks"],
                    gender=row["gender"],
                    age=row["age"],
                )
            )
    return actual


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("at_once", [1, 9])
def test_answers_are_bit_identical_to_the_evaluation(fifty, served, tmp_path, name, at_once):
    run, result = served if name == "hybrid with blend" else evaluated(fifty, tmp_path, name)
    recommender = RecommendationService.open(ServeConfig(run=str(run), result=str(result)))
    batch = {row["user_id"]: row for row in pq.read_table(result / "topk.parquet").to_pylist()}
    asked = requests_of(fifty, recommender)
    assert len(asked) == len(batch) > 20
    for begin in range(0, len(asked), at_once):
        some = asked[begin : begin + at_once]
        actual = recommender.recommend(some, recommender.max_k)
        for row, request in enumerate(some):
            expected, listed = batch[request.user_id], actual.items[row] > 0
            assert actual.items[row][listed].tolist() == expected["items"]
            assert np.array_equal(actual.scores[row][listed], np.array(expected["scores"], np.float32))


def test_probabilities_equal_the_feedback_scores_of_the_bundle(fifty, served):
    """The bundle scores rows shown around the last click; recommended items have the same probabilities."""
    recommender = RecommendationService.open(ServeConfig(run=str(served[0]), result=str(served[1])))
    rows = pq.read_table(served[0] / "bundle" / "feedback-test").to_pylist()
    like: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if row["task"] == "like":
            like.setdefault((row["user_id"], row["item"]), []).append(row["score"])
    checked = 0
    for request in requests_of(fifty, recommender):
        # Rows shown before the test click are scored from the state before it, later rows from the state after it.
        actual: dict[int, list[float]] = {}
        for clicks in (len(request.items) - 1, len(request.items)):
            known = {name: getattr(request, name)[:clicks] for name in ("items", "feedback", "watching_times")}
            asked = SessionRequest(**known, gender=request.gender, age=request.age)
            message = recommender.recommend([asked], recommender.max_k)
            for item, score in zip(message.items[0].tolist(), message.probabilities["like"][0].tolist(), strict=True):
                actual.setdefault(item, []).append(score)
        for item, scores in actual.items():
            if len(scores) == 2 and (request.user_id, item) in like:
                assert all(min(abs(s - p) for s in scores) < 1e-6 for p in like[request.user_id, item])
                checked += 1
    assert checked > 5


def test_unknown_items_are_ignored_and_sessions_with_no_others_get_popular_ones(fifty, served):
    recommender = RecommendationService.open(ServeConfig(run=str(served[0]), result=str(served[1])))
    known = requests_of(fifty, recommender)[0].items[:4]
    actual = recommender.recommend([SessionRequest([*known, 10**9]), SessionRequest(known), SessionRequest([10**9])], 5)
    assert actual.unknown == [[10**9], [], [10**9]]
    assert np.array_equal(actual.items[0], actual.items[1])
    assert actual.popular.tolist() == [False, False, True]
    clicks = fifty.items(["train_clicks"])["train_clicks"].to_numpy()
    assert clicks[actual.items[2] - 1].tolist() == sorted(clicks.tolist(), reverse=True)[:5]
    assert np.isnan(actual.probabilities["like"][2]).all()


def test_runs_and_results_that_cannot_be_served_are_refused(fifty, served, tmp_path, capfd):
    run, result = served
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "bundle" / "manifest.json").write_text((other / "bundle" / "manifest.json").read_text() + "\n")
    shutil.copytree(result, tmp_path / "damaged")
    (tmp_path / "damaged" / "metrics.json").write_text("{")
    ranker = tmp_path / "ranker"
    assert train([f"data={fifty.path}", f"output={ranker}", *SMALL, "model=rank_mmoe", "train.epochs=1"]) == 0
    capfd.readouterr()
    for options in (
        [f"run={tmp_path / 'none'}", f"result={result}"],
        [f"run={run}", f"result={tmp_path / 'none'}"],
        [f"run={other}", f"result={result}"],
        [f"run={run}", f"result={tmp_path / 'damaged'}"],
        [f"run={ranker}", f"result={result}"],
        [f"run={run}", f"result={result}", f"titles={tmp_path / 'none.csv'}"],
        [f"run={run}", f"result={result}", "port=70000"],
    ):
        assert main(options) == 2, options
        assert capfd.readouterr().err.startswith("error: expected ")


@pytest.fixture
def address(served):
    """The address of a server in a subprocess, which SIGTERM ends with status 0."""
    command = [sys.executable, "-m", "trainer.serve", f"run={served[0]}", f"result={served[1]}", "port=0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as server:
        yield re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())[0]
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0


def post(address: str, body: bytes, kind: str = "application/json") -> tuple[int, dict]:
    request = urllib.request.Request(f"{address}/recommend", body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_valid_requests_are_answered_and_invalid_ones_get_status_400(fifty, served, address):
    batch = pq.read_table(served[1] / "topk.parquet").to_pylist()[0]
    recommender = RecommendationService.open(ServeConfig(run=str(served[0]), result=str(served[1])))
    session = next(vars(r) for r in requests_of(fifty, recommender) if r.user_id == batch["user_id"])
    status, message = post(address, json.dumps({"sessions": [session, session["items"][:3]], "k": 10}).encode())
    answer = message["recommendations"][0]
    assert (status, answer["item_ids"], answer["ranked_by"]) == (200, batch["item_ids"], "blend")
    assert answer["titles"][0] == f"Film {answer['item_ids'][0]}, or not"
    assert all(0 < p < 1 for p in answer["probabilities"]["like"])
    assert set(answer["source_ranks"]) == {"model", "sequential_rules", "v_sknn"}
    for body, expected in (
        (b"x", "JSON"),
        (b"[]", "an object with sessions"),
        (b'{"sessions": [[1]], "depth": 1}', "an object with sessions"),
        (b'{"sessions": []}', "1 to 1000 sessions"),
        (b'{"sessions": [[1]], "k": 11}', "k from 1 to 10"),
        (b'{"sessions": [[1]], "k": "5"}', "k as an integer"),
        (b'{"sessions": [[1.5]]}', "items as a list of integers"),
        (b'{"sessions": [[true]]}', "items as a list of integers"),
        (b'{"sessions": [{"items": [1], "user": 3}]}', "keys of items"),
        (b'{"sessions": [{"items": [1], "feedback": [1, 2]}]}', "feedback for each of 1 items"),
        (b'{"sessions": [{"items": [1], "feedback": [32]}]}', "feedback of 0 to 31"),
        (b'{"sessions": [{"items": [1], "watching_times": [-5]}]}', "watching_times of at least 0"),
        (b'{"sessions": [{"items": [1], "n_clicks": 0}]}', "n_clicks of at least 1"),
        (b'{"sessions": [{"items": [99999999999999999999]}]}', "items as a list of integers"),
    ):
        status, message = post(address, body)
        assert status == 400, body
        assert message["error"].startswith(f"expected {expected}"), message
    assert post(address, b"{}", "text/plain")[0] == 400
    assert post(address, b"{}", "application/json; charset=none-such")[0] == 400
    elsewhere = urllib.request.Request(f"{address}/about", headers={"Host": "example.org"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(elsewhere, timeout=30)
    with urllib.request.urlopen(f"{address}/about", timeout=30) as reply:
        about = json.load(reply)
    assert about["requests"] == 1
    assert about["milliseconds"]["p50"] > 0


def test_sigterm_right_after_startup_ends_the_server_with_status_0(address):
    """The fixture sends SIGTERM as soon as the address is read."""
    assert address.startswith("http://127.0.0.1:")


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_five_clicks_in_a_browser_show_ten_recommendations(address, width):
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    messages = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda m: messages.append(m.text))
        page.on("pageerror", lambda e: messages.append(str(e)))
        page.goto(address)
        page.fill("#search", "film")
        for number in range(5):
            page.locator("#found button").nth(number).click()
        page.wait_for_function("document.querySelector('#status').textContent.startsWith('Ranked by blend')")
        assert page.locator("#session .remove").count() == 5
        assert page.locator("#next tr").count() == 10
        clicked = set(page.locator("#session .remove").all_inner_texts())
        assert not clicked & set(page.locator("#next td:nth-child(2)").all_inner_texts())
        assert "P(like)" in page.inner_text("#head")
        page.locator("#session .remove").first.click()
        assert page.locator("#session .remove").count() == 4
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert violations(page) == []
        browser.close()
    assert messages == []


@pytest.mark.browser
def test_actions_set_on_the_page_change_its_probabilities_as_in_a_request(served, address):
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    recommender = RecommendationService.open(ServeConfig(run=str(served[0]), result=str(served[1])))
    assert recommender.actions == {"like": 1, "share": 2, "follow": 4}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(address)
        for number in range(2):
            page.locator("#found button").nth(number).click()
        page.get_by_role("button", name=re.compile("^share: ")).last.click()
        items = [int(re.search(r"\d+", text)[0]) for text in page.locator("#session .remove").all_inner_texts()]
        for feedback in ([0, 2], [0, 0]):
            answer = recommender.recommend([SessionRequest(items, feedback=feedback)], 10)
            column = recommender.tasks.index("like") + 4
            expected = [f"{100 * p:.1f} %" for p in answer.probabilities["like"][0].tolist()]
            script = f"[...document.querySelectorAll('#next td:nth-child({column})')].map(cell => cell.textContent)"
            page.wait_for_function(f"{script}.join() === {json.dumps(','.join(expected))}")
            page.get_by_role("button", name=re.compile("^share: ")).last.click()
        assert violations(page) == []
        browser.close()
