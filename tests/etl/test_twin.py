"""The twin: its marginals, its exact distribution against simulation, its truth against brute force."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow.csv as pa_csv
import pytest
from scipy.stats import chisquare
from sklearn.metrics import roc_auc_score

from etl.twin.__main__ import main
from etl.twin.columns import columns
from etl.twin.oracle import beliefs, best_probabilities, expected_ranking, truth
from etl.twin.process import AFFINITY, TASKS, TASTES, TOPICS, Process
from etl.twin.published import AGES, GENDERS, PUBLISHED, SCANNED
from etl.twin.rows import rows_of
from etl.twin.scenarios import item_ids, user_ids
from etl.twin.simulate import Clicks, make_twin, simulate
from etl.twin.write import SEGMENTS, interleaved
from tests.support.engine import build


@pytest.fixture(scope="module")
def twin():
    return make_twin("qb_video", users=400, items=5000, seed=3)


def test_shares_of_topics_in_tastes_sum_to_one():
    assert AFFINITY.shape == (TASTES, 40)
    assert AFFINITY.sum(axis=1) == pytest.approx(np.ones(TASTES))


@pytest.mark.parametrize("smoothness", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("history", [[], [7], [7, 7], [3, 250, 3], [4100, 41, 5, 5, 123, 0]])
def test_the_exact_distribution_agrees_with_a_million_simulated_steps(history, smoothness):
    """Draw a taste from the belief that the history leaves, then a step: the counts follow the distribution."""
    items = 4500  # two neighbourhoods a topic
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
    """An item's neighbourhood by counting: of its topic's items every k-th, for k neighbourhoods of fifty."""
    k = max(1, process.items // (40 * 50))
    topic = range(source % 40, process.items, 40)
    return [item for number, item in enumerate(topic) if number % k == (source // 40) % k]


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
    best_possible = truth(twin)
    assert best_possible["test_users"] == len(users)
    for column, name in enumerate(("hr@20", "ndcg@20")):
        scores = np.array(hits)[:, column]
        assert best_possible["test"][name] == pytest.approx(expected[name] / len(users), abs=1e-12)
        assert abs(scores.mean() - best_possible["test"][name]) < 4 * scores.std() / np.sqrt(len(users))


@pytest.mark.parametrize("smoothness", [0.0, 1.0])
def test_the_best_items_are_the_best_of_all(smoothness):
    twin = make_twin("qb_video", users=40, items=9000, successor_smoothness=smoothness, seed=5)
    clicks = simulate(twin, 0)
    users = np.arange(40)
    best = best_probabilities(twin.process, *beliefs(twin.process, clicks, users))
    for user in users:
        history = clicks.rank[clicks.offset[user] : clicks.offset[user + 1] - 1]
        exact = twin.process.next_distribution(history)
        assert best[user] == pytest.approx(np.sort(exact)[::-1][:20], abs=1e-12)


def test_no_other_score_beats_the_truths_auc():
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


@pytest.mark.parametrize("correlation", [0.0, 1.0])
def test_task_correlation_is_what_the_logits_have_in_common(correlation):
    process = Process(5000, correlation, seed=2)
    rng = np.random.default_rng(0)
    item, taste = rng.integers(0, 5000, 20_000), rng.integers(0, TASTES, 20_000)
    logits = [process.logits(task, item, taste, np.zeros(20_000)) for task in TASKS[:2]]
    assert np.corrcoef(*logits)[0, 1] == pytest.approx(correlation, abs=0.05)


@pytest.mark.parametrize("scenario", list(PUBLISHED))
def test_rows_have_the_published_and_scanned_shares(scenario):
    users, published, scanned = 6_000, PUBLISHED[scenario], SCANNED[scenario]
    twin = make_twin(scenario, users=users, items=published.items, seed=1)
    table = rows_of(twin, 0)
    scale, clicked = users / published.users, table["click"] == 1
    assert len(clicked) == pytest.approx(published.exposures * scale, rel=0.05)
    assert clicked.sum() == pytest.approx(published.clicks * scale, rel=0.05)
    for task in TASKS:
        total, expected = (table[task].sum() if task in table else 0), published.total(task) * scale
        assert abs(total - expected) <= max(0.12 * expected, 4 * np.sqrt(expected)), task
        if total:
            share, wanted = table[task][~clicked].sum() / total, scanned.unclicked.get(task, 0.0)
            assert abs(share - wanted) <= max(0.02, 4 * np.sqrt(wanted * (1 - wanted) / total)), task
    if published.exposures > published.clicks:
        assert (table["watching_times"][~clicked] >= 1).mean() == pytest.approx(0.57, abs=0.01)
    else:
        assert clicked.all()
    assert (table["watching_times"][clicked] >= 1).all()
    assert np.bincount(table["user"], clicked).min() >= 5


def test_repeats_are_as_frequent_as_scanned():
    """Of the published click-through file: 0.73 % exact duplicates, 1.5 % repeated pairs, 0.47 % conflicting clicks."""
    twin = make_twin("qk_video", users=4_000, items=PUBLISHED["qk_video"].items, seed=1)
    table = rows_of(twin, 0)
    n, pair = len(table["click"]), table["user"] * twin.process.items + table["rank"]
    _, number, count = np.unique(pair, return_inverse=True, return_counts=True)
    clicks = np.bincount(number, weights=table["click"])
    rows = np.stack([values for name, values in table.items() if name != "position"], axis=1)
    assert 1 - len(np.unique(rows, axis=0)) / n == pytest.approx(0.0073, abs=0.002)
    assert 1 - len(count) / n == pytest.approx(0.015, abs=0.003)
    assert ((clicks > 0) & (clicks < count)).sum() / n == pytest.approx(0.0047, abs=0.001)


def test_clicks_grow_rare_towards_a_users_end():
    twin = make_twin("qk_video", users=3_000, items=50_000, seed=2)
    clicks = simulate(twin, 0)
    table = rows_of(twin, 0, clicks)
    through = table["position"] / np.diff(clicks.offset)[table["user"]]
    rate = [table["click"][(through >= low) & (through < low + 0.25)].mean() for low in (0.0, 0.25, 0.5, 0.75)]
    assert rate[0] > 0.8
    assert rate == sorted(rate, reverse=True)
    assert rate[3] < 0.25
    assert not table["click"][through >= 1].any()
    assert (through >= 1).mean() > 0.03


def test_profiles_and_categories_have_the_scanned_shares():
    twin = make_twin("qk_video", users=20_000, items=100_000, seed=4)
    user = np.arange(20_000)
    rows = {"user": user, "position": user * 0, "rank": user, "click": user * 0, "watching_times": user * 0}
    _, _, *_, category, _, gender, age = columns(twin, 0, rows)
    for values, shares in ((gender, GENDERS), (age, AGES)):
        assert np.bincount(values, minlength=len(shares)) / 20_000 == pytest.approx(np.array(shares), abs=0.012)
    text = np.array(category.to_pylist())
    assert [(text == value).mean() for value in ("0", "1", "\\N")] == pytest.approx([0.54, 0.45, 0.013], abs=0.015)
    topic_one = [np.mean(text[user % TOPICS == topic] == "1") for topic in range(TOPICS)]
    assert min(topic_one) < 0.2
    assert max(topic_one) > 0.7


def test_observed_topics_are_what_the_category_says():
    twin = make_twin("qb_video", users=2_000, items=5_000, observed_topics=True, seed=4)
    rows = rows_of(twin, 0)
    category = np.array(columns(twin, 0, rows)[6].to_pylist())
    known = category != "\\N"
    assert known.mean() == pytest.approx(0.987, abs=0.005)
    assert np.array_equal(category[known].astype(int) - 100, rows["rank"][known] % TOPICS)


def test_some_users_of_article_logs_change_gender():
    twin = make_twin("qk_article", users=4_000, items=5_000, seed=4)
    rows = rows_of(twin, 0)
    gender = columns(twin, 0, rows)[3].to_numpy()
    several = np.bincount(rows["user"], gender != gender[np.searchsorted(rows["user"], rows["user"])]) > 0
    assert several.mean() == pytest.approx(0.02, abs=0.01)


@pytest.mark.parametrize("blocks", [1.5, 18.4])
def test_interleaved_rows_are_all_rows_with_each_user_in_order(blocks):
    twin = make_twin("qk_video", users=2_000, items=5_000, blocks=blocks, seed=6)
    user = rows_of(twin, 0)["user"]
    order, ends = interleaved(twin, 0, user)
    assert np.array_equal(np.sort(order), np.arange(len(user)))
    shown = user[order]
    for number in (0, 17, 1_999):
        assert (np.diff(order[shown == number]) > 0).all()
    runs = 1 + np.sum(shown[1:] != shown[:-1])
    assert runs / 2_000 == pytest.approx(blocks, rel=0.1)
    assert len(ends) == SEGMENTS
    assert ends[-1] == len(user)
    assert (np.diff([0, *ends]) > 0.05 * len(user)).all()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    contents = []
    for name, seed in (("a.csv", 4), ("b.csv.gz", 4), ("c.csv", 5)):
        assert main([f"output={tmp_path / name}", "scenario=qb_article", "users=300", f"seed={seed}"]) == 0
        data = (tmp_path / name).read_bytes()
        contents.append(gzip.decompress(data) if name.endswith(".gz") else data)
    assert contents[0] == contents[1] != contents[2]
    best_possible = json.loads((tmp_path / "a.csv.truth.json").read_text())
    assert set(best_possible["test"]) >= {"hr@5", "hr@10", "hr@20", "ndcg@20", "mrr@20", "auc/click"}
    assert "auc/like" not in best_possible["test"]
    assert len(list(tmp_path.iterdir())) == 6  # nothing is left of the stretches that a log is written in


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
    assert main([f"output={tmp_path / 'a.csv'}", "scenario=qb_video", "users=200", "items=1000", "seed=0"]) == 0
    twin = make_twin("qb_video", users=200, items=1000, seed=0)
    table, drawn = pa_csv.read_csv(tmp_path / "a.csv"), rows_of(twin, 0)
    order, _ = interleaved(twin, 0, drawn["user"])
    for name in ("click", "like", "watching_times"):
        assert np.array_equal(table[name].to_numpy(), drawn[name][order]), name
    assert np.array_equal(table["user_id"].to_numpy(), user_ids("qb_video", 200).of(drawn["user"][order]))
    pairs = set(zip(table["item_id"].to_pylist(), drawn["rank"][order].tolist(), strict=True))
    assert len(pairs) == len(set(drawn["rank"].tolist()))


@pytest.mark.parametrize(
    "wrong",
    [
        ["scenario=tv"],
        ["users=0"],
        ["users=some"],
        ["items=3"],
        ["task_correlation=2"],
        ["successor_smoothness=-0.1"],
        ["blocks=0"],
        ["seed=-1"],
        ["output=/proc/x/y.csv"],
    ],
)
def test_wrong_options_end_with_one_plain_line(tmp_path, wrong, capfd):
    assert main([f"output={tmp_path / 'a.csv'}", "scenario=qb_video", "users=5", "seed=0", *wrong]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: expected ")
    assert wrong[0].partition("=")[0] in err
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
    drawn = rows_of(make_twin(scenario, users=300, seed=2), 0)
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
        assert raw[name] == (drawn[task].sum() if PUBLISHED[scenario].total(task) else None), name
    acted = sum(drawn.get(task, np.zeros(1)) for task in TASKS) > 0
    assert raw["passive"] == np.sum((drawn["click"] == 1) & ~acted)
    clicks = np.bincount(drawn["user"][drawn["click"] == 1], minlength=300)
    assert dataset.manifest.counts["sessions"] == (clicks >= 10).sum()
    assert dataset.manifest.counts["clicks"] == np.minimum(clicks[clicks >= 10], 30).sum()
