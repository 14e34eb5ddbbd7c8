"""The twin's rows, columns and files: published and scanned shares, seeds, wrong options."""

from __future__ import annotations

import gzip
import json
import os
import signal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pytest

from etl.logs.tenrec import SCENARIOS
from etl.logs.tenrec_published import AGES, GENDERS, PUBLISHED, SCANNED
from etl.runtime.errors import InputError
from etl.twin.__main__ import main
from etl.twin.columns import columns
from etl.twin.process import TASKS, TOPICS
from etl.twin.raw_ids import item_ids, user_ids
from etl.twin.rows import rows_of
from etl.twin.simulate import USERS_PER_CHUNK, make_twin, simulate
from etl.twin.write import SEGMENTS, interleaved, write
from tests.support.engine import build


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
            share, expected_share = table[task][~clicked].sum() / total, scanned.unclicked.get(task, 0.0)
            assert abs(share - expected_share) <= max(
                0.02, 4 * np.sqrt(expected_share * (1 - expected_share) / total)
            ), task
    if published.exposures > published.clicks:
        assert (table["watching_times"][~clicked] >= 1).mean() == pytest.approx(0.57, abs=0.01)
    else:
        assert clicked.all()
    assert (table["watching_times"][clicked] >= 1).all()
    assert np.bincount(table["user"], clicked).min() >= 5


def test_repeat_rates_match_the_public_scan():
    """In the published click-through file: 0.73 % exact duplicates, 1.5 % repeated pairs, 0.47 % conflicting clicks."""
    twin = make_twin("qk_video", users=4_000, items=PUBLISHED["qk_video"].items, seed=1)
    table = rows_of(twin, 0)
    n, pair = len(table["click"]), table["user"] * twin.process.items + table["rank"]
    _, number, count = np.unique(pair, return_inverse=True, return_counts=True)
    clicks = np.bincount(number, weights=table["click"])
    rows = np.stack([values for name, values in table.items() if name != "position"], axis=1)
    assert 1 - len(np.unique(rows, axis=0)) / n == pytest.approx(0.0073, abs=0.002)
    assert 1 - len(count) / n == pytest.approx(0.015, abs=0.003)
    assert ((clicks > 0) & (clicks < count)).sum() / n == pytest.approx(0.0047, abs=0.001)


def test_copied_clicks_of_articles_are_exact_duplicates():
    """Also in the columns that are drawn for each row, such as the reading time."""
    twin = make_twin("qk_article", users=2_000, items=50_000, seed=1)
    clicks = simulate(twin, 0)
    rows = rows_of(twin, 0)
    table = pa.table(columns(twin, 0, rows), names=list(SCENARIOS["qk_article"].columns)).to_pandas()
    copies = np.flatnonzero(clicks.copied)
    assert len(copies) > 100
    assert len(table) == len(clicks.copied)  # the log has clicked rows only
    constant = [name for name in table.columns if name != "gender"]  # of some users it changes within the session
    before, after = (table[constant].iloc[index].reset_index(drop=True) for index in (copies - 1, copies))
    assert before.equals(after)
    assert table["read_time"].nunique() > 50


def test_killed_worker_is_one_plain_error(tmp_path, monkeypatch):
    """It must not be waited for."""
    users = 2 * USERS_PER_CHUNK
    twin = make_twin("qb_video", users=users, items=1_000, seed=1)
    monkeypatch.setattr("etl.twin.write._chunk_csv", die)
    with (tmp_path / "log.csv").open("wb") as stream, pytest.raises(InputError, match="got one that was killed"):
        write(twin, stream, tmp_path / "log.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_copied_click_directly_follows_its_original_and_repeats_it():
    twin = make_twin("qk_video", users=1_500, items=20_000, seed=1)
    clicks, table = simulate(twin, 0), rows_of(twin, 0)
    copy = np.flatnonzero(clicks.copied)
    assert len(copy) > 50
    assert clicks.thread[copy].any()
    assert np.array_equal(clicks.thread[copy], clicks.thread[copy - 1])
    at = np.flatnonzero(table["click"] == 1)[copy]
    for name in set(table) - {"position"}:
        assert np.array_equal(table[name][at], table[name][at - 1]), name


def test_click_rate_falls_towards_the_end_of_a_users_rows():
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


def test_observed_topics_writes_the_topic_as_category():
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
def test_interleaving_keeps_all_rows_and_the_order_within_each_user(blocks):
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


def test_same_seed_gives_the_same_bytes_and_another_seed_different_ones(tmp_path):
    contents = []
    for name, seed in (("a.csv", 4), ("b.csv.gz", 4), ("c.csv", 5)):
        assert main([f"output={tmp_path / name}", "scenario=qb_article", "users=300", f"seed={seed}"]) == 0
        data = (tmp_path / name).read_bytes()
        contents.append(gzip.decompress(data) if name.endswith(".gz") else data)
    assert contents[0] == contents[1] != contents[2]
    best_possible = json.loads((tmp_path / "a.csv.truth.json").read_text())
    assert set(best_possible["test"]) >= {"hr@5", "hr@10", "hr@20", "ndcg@20", "mrr@20", "auc/click"}
    assert "auc/like" not in best_possible["test"]
    assert len(list(tmp_path.iterdir())) == 6  # no temporary segment of a log is left


def test_overlaps_of_scenarios_are_the_published_ones_to_scale():
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


def test_written_log_equals_the_drawn_rows(tmp_path):
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
def test_invalid_options_fail_with_a_one_line_error(tmp_path, wrong, capfd):
    assert main([f"output={tmp_path / 'a.csv'}", "scenario=qb_video", "users=5", "seed=0", *wrong]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: expected ")
    assert wrong[0].partition("=")[0] in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scenario", list(PUBLISHED))
def test_job_statistics_match_the_twins_rows_in_every_scenario(tmp_path, scenario):
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


@pytest.mark.parametrize("blocks", [1, 6])
def test_history_is_the_first_ten_clicks_and_their_rows_are_removed(tmp_path, blocks):
    options = ["scenario=qk_video", "users=300", "items=2000", f"blocks={blocks}", "seed=3"]
    assert main([f"output={tmp_path / 'log.csv'}", *options]) == 0
    assert main([f"output={tmp_path / 'ctr.csv'}", *options, "history=true"]) == 0
    assert not (tmp_path / "ctr.csv.truth.json").exists()
    by_user: dict[str, list[list[str]]] = {}
    for line in (tmp_path / "log.csv").read_text().splitlines()[1:]:
        by_user.setdefault(line.split(",")[0], []).append(line.split(","))
    expected = {}
    for user, rows in by_user.items():
        first = [row[1] for row in rows if row[2] == "1"][:10]
        padded = first + ["0"] * (10 - len(first))
        expected[user] = [row + padded for row in rows if row[1] not in first]
    lines = [line.split(",") for line in (tmp_path / "ctr.csv").read_text().splitlines()]
    assert lines[0] == [*SCENARIOS["ctr"].columns]
    actual: dict[str, list[list[str]]] = {}
    for row in lines[1:]:
        actual.setdefault(row[0], []).append(row)
    assert actual == {user: rows for user, rows in expected.items() if rows}
    assert any("0" in rows[0][10:] for rows in actual.values())


def test_history_is_refused_for_article_logs(tmp_path, capfd):
    options = [f"output={tmp_path / 'log.csv'}", "scenario=qb_article", "users=20", "history=true"]
    assert main(options) == 2
    assert "expected a video log for history=true, got qb_article" in capfd.readouterr().err
