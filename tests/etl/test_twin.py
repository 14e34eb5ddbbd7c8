"""The twin: its marginals, its exact distribution against simulation, its truth against brute force."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.csv as pa_csv
import pytest
from scipy.stats import chisquare
from sklearn.metrics import roc_auc_score

from etl.twin.__main__ import main
from etl.twin.generate import Clicks, make_twin, rows_of, simulate
from etl.twin.oracle import beliefs, best_probabilities, expected_ranking, truth
from etl.twin.process import AFFINITY, TASKS, TASTES, Process
from etl.twin.published import PUBLISHED
from etl.twin.scenarios import item_ids, user_ids
from tests.support.engine import build


@pytest.fixture(scope="module")
def twin():
    return make_twin("qb_video", users=1500, items=1000, task_correlation=0.5, seed=3)


def test_shares_of_categories_in_tastes_sum_to_one():
    assert AFFINITY.shape == (TASTES, 40)
    assert AFFINITY.sum(axis=1) == pytest.approx(np.ones(TASTES))


@pytest.mark.parametrize("history", [[], [7], [7, 7], [3, 250, 3], [900, 41, 5, 5, 123, 0]])
def test_the_exact_distribution_agrees_with_a_million_simulated_steps(history):
    """Draw a taste from the belief that the history leaves, then a step: the counts follow the distribution."""
    process = Process(1000, 0.5, seed=11)
    exact = process.next_distribution(np.array(history, np.int64))
    assert exact.sum() == pytest.approx(1.0, abs=1e-9)
    rng = np.random.default_rng(5)
    n = 1_000_000
    belief = np.full(TASTES, 1 / TASTES)
    padded = [-1, -1, *history]
    for before, last, item in zip(padded, padded[1:], padded[2:], strict=False):
        for taste in range(TASTES):
            belief[taste] *= slow_probability(process, item, last, before, taste)
    taste = rng.choice(TASTES, n, p=belief / belief.sum())
    drawn, _ = process.draw(rng, taste, np.full(n, padded[-1]), np.full(n, padded[-2]))
    counts = np.bincount(drawn, minlength=1000)
    often = exact * n >= 5
    observed, expected = (
        np.append(counts[often], counts[~often].sum()),
        np.append(exact[often], exact[~often].sum()) * n,
    )
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 0.01


def slow_probability(process: Process, item: int, last: int, before: int, taste: int) -> float:
    """The mixture written out for one click, from the process's own successor lists and shares."""
    weights = [0.34, 0.24, 0.16, 0.12, 0.08, 0.06]
    share = {"follow": 0.22, "two": 0.09, "taste": 0.42, "global": 0.27}
    category, size = item % 40, len(range(item % 40, process.items, 40))
    k = item // 40
    inside = ((k + 1) / size) ** (1 / 3) - (k / size) ** (1 / 3)
    fit = sum(
        w
        for offset, w in zip((0, 1, 7, 20), (0.4, 0.3, 0.2, 0.1), strict=True)
        if (2 * taste + offset) % 40 == category
    )
    everywhere = ((item + 1) / process.items) ** (1 / 3) - (item / process.items) ** (1 / 3)
    if last < 0:
        return (share["taste"] * fit * inside + share["global"] * everywhere) / (share["taste"] + share["global"])
    p = share["taste"] * fit * inside + (share["global"] + (share["two"] if before < 0 else 0)) * everywhere
    p += share["follow"] * sum(
        w for j, w in enumerate(weights) if process.successor(np.array(last), np.array(j), 1) == item
    )
    if before >= 0:
        p += share["two"] * sum(
            w for j, w in enumerate(weights) if process.successor(np.array(before), np.array(j), 2) == item
        )
    return 0.007 * (item == last) + 0.993 * p


def test_truth_agrees_with_a_brute_force_scorer_over_all_items(twin):
    """Rank all items for each user by the exact distribution: the mean score is the expected one within its error."""
    clicks = simulate(twin, 0)
    users = np.flatnonzero(np.diff(clicks.offset) >= 10)
    belief, recent = beliefs(twin.process, clicks, users)
    best = best_probabilities(twin.process, belief, recent)
    hits, expected = [], expected_ranking(best)
    for row, user in enumerate(users):
        history = clicks.rank[clicks.offset[user] : clicks.offset[user + 1]]
        exact = twin.process.next_distribution(history[:-1])
        assert best[row] == pytest.approx(np.sort(exact)[::-1][:20], abs=1e-12)
        rank = 1 + np.sum(exact > exact[history[-1]])
        hits.append((rank <= 20, 1 / np.log2(rank + 1) if rank <= 20 else 0.0))
    told = truth(twin)
    assert told["test_users"] == len(users)
    for place, name in enumerate(("hr@20", "ndcg@20")):
        found = np.array(hits)[:, place]
        assert told["test"][name] == pytest.approx(expected[name] / len(users), abs=1e-12)
        assert abs(found.mean() - told["test"][name]) < 4 * found.std() / np.sqrt(len(users))


def test_no_other_score_beats_the_truths_auc(twin):
    told = truth(twin)["test"]
    clicks, table = simulate(twin, 0), rows_of(twin, 0)
    users = np.flatnonzero(np.diff(clicks.offset) >= 10)
    before = np.cumsum(table["click"], dtype=np.int64) - table["click"]
    block = (before == (clicks.offset[1:] - 1)[table["user"]]) & np.isin(table["user"], users)
    popular = np.bincount(table["rank"], table["click"], 1000) / np.maximum(
        np.bincount(table["rank"], minlength=1000), 1
    )
    click, like, item = table["click"][block], table["like"][block], table["rank"][block]
    assert told["auc/click"] > roc_auc_score(click, popular[item]) + 0.02
    assert told["auc/like_given_click"] > roc_auc_score(like[click == 1], twin.process.items - item[click == 1]) + 0.05


@pytest.mark.parametrize("correlation", [0.0, 1.0])
def test_task_correlation_is_what_the_logits_have_in_common(correlation):
    process = Process(5000, correlation, seed=2)
    rng = np.random.default_rng(0)
    item, taste = rng.integers(0, 5000, 20_000), rng.integers(0, TASTES, 20_000)
    logits = [process.logits(task, item, taste, np.zeros(20_000)) for task in TASKS[:2]]
    assert np.corrcoef(*logits)[0, 1] == pytest.approx(correlation, abs=0.05)


@pytest.mark.parametrize("scenario", ["qk_video", "qb_video", "qk_article"])
def test_marginals_are_the_published_ones_scaled(scenario):
    users = 30_000
    twin = make_twin(scenario, users=users, items=None, task_correlation=0.5, seed=1)
    table, published = rows_of(twin, 0), PUBLISHED[scenario]
    scale = users / published.users
    assert len(table["click"]) == pytest.approx(published.exposures * scale, rel=0.05)
    assert table["click"].sum() == pytest.approx(published.clicks * scale, rel=0.05)
    for task in TASKS:
        total = table[task].sum() if task in table else 0
        assert total == pytest.approx(published.rate(task) * published.clicks * scale, rel=0.12)
    same = (table["user"][1:] == table["user"][:-1]) & (table["rank"][1:] == table["rank"][:-1])
    repeated = same & (table["click"][1:] == table["click"][:-1])
    assert repeated.mean() == pytest.approx(0.007, abs=0.002)
    assert (same & ~repeated).mean() > 0.001


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    contents = []
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        assert main([f"output={tmp_path / name}.csv", "scenario=qb_article", "users=300", f"seed={seed}"]) == 0
        contents.append((tmp_path / f"{name}.csv").read_bytes())
    assert contents[0] == contents[1] != contents[2]
    told = json.loads((tmp_path / "a.csv.truth.json").read_text())
    assert set(told["test"]) >= {"hr@5", "hr@10", "hr@20", "ndcg@20", "mrr@20", "auc/click"}
    assert "auc/like" not in told["test"]


def test_scenarios_share_as_many_users_and_items_as_published_scaled():
    scale = 0.1
    sets = {}
    for scenario, published in PUBLISHED.items():
        users = round(published.users * scale)
        sets[scenario] = set(user_ids(scenario, users).of(np.arange(users)).tolist())
        assert len(sets[scenario]) == users
    assert len(sets["qk_video"] & sets["qk_article"]) == pytest.approx(26_920.7, abs=2)
    assert len(sets["qk_video"] & sets["qb_video"]) == pytest.approx(326.1, abs=2)
    assert len(sets["qk_video"] & sets["qb_article"]) == pytest.approx(5.8, abs=2)
    items = [set(item_ids(s, n).of(np.arange(n)).tolist()) for s, n in (("qk_video", 375_344), ("qb_video", 13_064))]
    assert len(items[0] & items[1]) == pytest.approx(7_848.2, abs=3)


def test_the_log_is_read_back_as_it_was_drawn(tmp_path):
    twin = make_twin("qb_video", users=200, items=1000, task_correlation=0.5, seed=0)
    assert main([f"output={tmp_path / 'a.csv'}", "scenario=qb_video", "users=200", "items=1000", "seed=0"]) == 0
    table, drawn = pa_csv.read_csv(tmp_path / "a.csv"), rows_of(twin, 0)
    assert np.array_equal(table["click"].to_numpy(), drawn["click"])
    assert np.array_equal(table["like"].to_numpy(), drawn["like"])
    assert len(set(zip(table["item_id"].to_pylist(), drawn["rank"].tolist(), strict=True))) == len(
        set(drawn["rank"].tolist())
    )
    category = table["video_category"].to_pylist()
    assert sum(c == "\\N" for c in category) / len(category) == pytest.approx(0.01, abs=0.004)


@pytest.mark.parametrize(
    "wrong",
    [
        ["scenario=tv"],
        ["users=0"],
        ["users=some"],
        ["items=3"],
        ["task_correlation=2"],
        ["seed=-1"],
        ["output=/proc/x/y.csv"],
    ],
)
def test_wrong_options_end_with_one_plain_line(tmp_path, wrong, capfd):
    assert main([f"output={tmp_path / 'a.csv'}", "scenario=qb_video", "users=5", "seed=0", *wrong]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: expected ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_longer_histories_help(twin):
    """The belief about the taste sharpens with the history, so the best expected score rises."""
    clicks = simulate(twin, 0)
    users = np.flatnonzero(np.diff(clicks.offset) >= 31)
    scores = []
    for visible in (3, 10, 30):
        offset = np.concatenate([[0], np.cumsum(np.full(len(users), visible + 1))])
        rank = np.concatenate([clicks.rank[clicks.offset[u] : clicks.offset[u] + visible + 1] for u in users])
        short = Clicks(
            clicks.taste[users], offset, np.repeat(np.arange(len(users)), visible + 1), rank, rank < 0, rank < 0
        )
        best = best_probabilities(twin.process, *beliefs(twin.process, short, np.arange(len(users))))
        scores.append(expected_ranking(best)["hr@20"] / len(users))
    assert scores[0] < scores[1] < scores[2]


@pytest.mark.parametrize("scenario", list(PUBLISHED))
def test_the_job_counts_what_the_twin_drew_in_every_scenario(tmp_path, scenario):
    assert main([f"output={tmp_path / 'log.csv'}", f"scenario={scenario}", "users=300", "seed=2"]) == 0
    drawn = rows_of(make_twin(scenario, users=300, items=None, task_correlation=0.5, seed=2), 0)
    dataset = build([f"input={tmp_path / 'log.csv'}", f"output={tmp_path / 'out'}", f"scenario={scenario}", "shards=2"])
    raw = json.loads(dataset.file("statistics.json").read_text())["raw"]
    assert raw["exposures"] == len(drawn["click"])
    assert raw["clicks"] == drawn["click"].sum()
    assert raw["users"] == 300
    for task, name in (
        ("like", "likes"),
        ("share", "shares"),
        ("follow", "follows"),
        ("read", "reads"),
        ("favorite", "favorites"),
    ):
        assert raw[name] == (drawn[task].sum() if PUBLISHED[scenario].rate(task) else None), name
    acted = sum(drawn.get(task, np.zeros(1)) for task in TASKS) > 0
    assert raw["passive"] == np.sum((drawn["click"] == 1) & ~acted)
    clicks = np.bincount(drawn["user"][drawn["click"] == 1], minlength=300)
    assert dataset.manifest.counts["sessions"] == (clicks >= 10).sum()
    assert dataset.manifest.counts["clicks"] == np.minimum(clicks[clicks >= 10], 30).sum()
