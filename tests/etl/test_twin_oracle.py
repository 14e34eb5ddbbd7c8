"""The twin's process: exact distribution against simulation, best possible metrics against brute force."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare
from sklearn.metrics import roc_auc_score

from etl.twin.oracle import beliefs, best_probabilities, expected_ranking, score_rows, truth
from etl.twin.process import AFFINITY, TASKS, TASTES, Process
from etl.twin.rows import rows_of
from etl.twin.simulate import Clicks, make_twin, simulate


@pytest.fixture(scope="module")
def twin():
    return make_twin("qb_video", users=400, items=5000, seed=3)


def test_shares_of_topics_in_tastes_sum_to_one():
    assert AFFINITY.shape == (TASTES, 40)
    assert AFFINITY.sum(axis=1) == pytest.approx(np.ones(TASTES))


@pytest.mark.parametrize("smoothness", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("history", [[], [7], [7, 7], [3, 250, 3], [4100, 41, 5, 5, 123, 0]])
def test_the_exact_distribution_agrees_with_a_million_simulated_steps(history, smoothness):
    """Draw a taste from the posterior given the history, then a step: the counts follow the distribution."""
    items = 4500  # two neighbourhoods per topic
    process = Process(items, 0.5, seed=11, smoothness=smoothness)
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
    counts = np.bincount(drawn, minlength=items)
    often = exact * n >= 5
    observed, expected = (
        np.append(counts[often], counts[~often].sum()),
        np.append(exact[often], exact[~often].sum()) * n,
    )
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 0.01


def slow_probability(process: Process, item: int, last: int, before: int, taste: int) -> float:
    """Probability of one click by the written-out mixture, from the process's successor lists."""
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
    for source, name, order in ((last, "follow", 1), (before, "two", 2)):
        if source < 0:
            continue
        own = sum(w for j, w in enumerate(weights) if process.successor(np.array(source), np.array(j), order) == item)
        members = neighbours(process, source)
        near = 0.0
        if item in members:
            m = members.index(item)
            near = ((m + 1) / len(members)) ** (1 / 3) - (m / len(members)) ** (1 / 3)
        p += share[name] * ((1 - process.smoothness) * own + process.smoothness * near)
    return 0.002 * (item == last) + 0.998 * p


def neighbours(process: Process, source: int) -> list[int]:
    """An item's neighbourhood by counting: every k-th item of its topic, for k neighbourhoods of fifty."""
    k = max(1, process.items // (40 * 50))
    topic = range(source % 40, process.items, 40)
    return [item for number, item in enumerate(topic) if number % k == (source // 40) % k]


def test_best_possible_metrics_match_brute_force_over_all_items(twin):
    """Rank all items for each user by the exact distribution: the mean is within 4 standard errors of the expected."""
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
    best_possible = truth(twin)
    assert best_possible["test_users"] == len(users)
    for column, name in enumerate(("hr@20", "ndcg@20")):
        scores = np.array(hits)[:, column]
        assert best_possible["test"][name] == pytest.approx(expected[name] / len(users), abs=1e-12)
        assert abs(scores.mean() - best_possible["test"][name]) < 4 * scores.std() / np.sqrt(len(users))


@pytest.mark.parametrize("smoothness", [0.0, 1.0])
def test_best_probabilities_are_the_top_20_of_all_items(smoothness):
    twin = make_twin("qb_video", users=40, items=9000, successor_smoothness=smoothness, seed=5)
    clicks = simulate(twin, 0)
    users = np.arange(40)
    best = best_probabilities(twin.process, *beliefs(twin.process, clicks, users))
    for user in users:
        history = clicks.rank[clicks.offset[user] : clicks.offset[user + 1] - 1]
        exact = twin.process.next_distribution(history)
        assert best[user] == pytest.approx(np.sort(exact)[::-1][:20], abs=1e-12)


def test_best_possible_auc_is_above_that_of_popularity():
    twin = make_twin("qb_video", users=1500, items=1000, seed=3)
    best_possible = truth(twin)["test"]
    clicks, table = simulate(twin, 0), rows_of(twin, 0)
    length = np.diff(clicks.offset)[table["user"]]
    block = (table["position"] >= length - 1) & (length >= 10)
    popular = np.bincount(table["rank"], table["click"], 1000) / np.maximum(
        np.bincount(table["rank"], minlength=1000), 1
    )
    click, like, item = table["click"][block], table["like"][block], table["rank"][block]
    assert best_possible["auc/click"] > roc_auc_score(click, popular[item]) + 0.02
    given_click = roc_auc_score(like[click == 1], twin.process.items - item[click == 1])
    assert best_possible["auc/like_given_click"] > given_click + 0.03
    assert best_possible["auc/like_given_no_click"] > 0.55


def test_probabilities_of_actions_are_the_shares_of_simulated_rows():
    """With actions on about half of the rows, more on those that follow the last clicks."""
    twin = make_twin("qb_video", users=3_000, items=500, seed=3)
    halves = (0.0,) * len(TASKS)
    twin = replace(twin, process=replace(twin.process, intercepts=halves, unclicked_intercepts=halves))
    clicks = simulate(twin, 0)
    rows = score_rows(twin, clicks, rows_of(twin, 0, clicks), np.arange(3_000), 1)
    for task in ("like", "share"):
        for chosen, name in ((rows["clicked"], task), (~rows["clicked"], f"{task}/unclicked")):
            label, chance = rows["labels"][task][chosen], rows["scores"][name][chosen]
            spread = np.sqrt((chance * (1 - chance)).mean() / len(chance))
            assert label.mean() == pytest.approx(chance.mean(), abs=3 * spread), name


@pytest.mark.parametrize("correlation", [0.0, 1.0])
def test_task_correlation_is_the_correlation_of_the_logits(correlation):
    process = Process(5000, correlation, seed=2)
    rng = np.random.default_rng(0)
    item, taste = rng.integers(0, 5000, 20_000), rng.integers(0, TASTES, 20_000)
    logits = [process.logits(task, item, taste, np.zeros(20_000)) for task in TASKS[:2]]
    assert np.corrcoef(*logits)[0, 1] == pytest.approx(correlation, abs=0.05)


def test_longer_histories_raise_the_best_possible_score(twin):
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
