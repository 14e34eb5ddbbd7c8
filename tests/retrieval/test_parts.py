"""An evaluation in parts: killed and resumed, and the metrics merged from parts."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etl.dataset import open_dataset
from retrieval import rank_part
from retrieval.bundle import MANIFEST, finish_bundle, open_bundle, queries_schema
from retrieval.config import load
from retrieval.evaluate import evaluate, evaluate_feedback
from retrieval.evaluation import Evaluation, open_inputs
from retrieval.metrics.accumulators import DECILES, RankingResult, SegmentAttributes, deciles, segments
from retrieval.metrics.feedback import calibration
from retrieval.metrics.ranking import gini
from retrieval.queries import Queries

pytestmark = pytest.mark.usefixtures("no_report")


def options(tiny, name, *more):
    return [
        f"bundle={tiny / 'bundle'}",
        f"data={tiny / 'data'}",
        f"output={tiny / name}",
        "cutoffs=[1,2,5]",
        "part_queries=3",
        *more,
    ]


def split_files(tiny, rows=3):
    """The tiny bundle with its queries in several files."""
    for split in ("valid", "test", "next"):
        folder = tiny / "bundle" / f"queries-{split}"
        (path,) = folder.glob("*.parquet")
        table = pq.read_table(path)
        path.unlink()
        for number, begin in enumerate(range(0, len(table), rows)):
            part = table.slice(begin, rows).cast(queries_schema(2))
            pq.write_table(part, folder / f"part-{number:05d}.parquet")
    raw = json.loads((tiny / "bundle" / MANIFEST).read_text())
    finish_bundle(tiny / "bundle", dataset=raw["dataset"], refit=False, n_items=6, dimension=2, model="tiny")


def without_times(result):
    if isinstance(result, dict):
        timed = ("seconds", "per_second")
        return {k: without_times(v) for k, v in result.items() if not k.endswith(timed)}
    return result


def same_numbers(a, b):
    """Equal except for rounding of float sums, which parts add in another order."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            same_numbers(a[name], b[name])
    elif isinstance(a, float):
        assert a == pytest.approx(b, abs=1e-12)
    else:
        assert a == b


@pytest.mark.parametrize("mask", ["true", "false"])
def test_many_query_files_give_the_same_result_as_one(tiny, mask):
    whole = evaluate(load(options(tiny, "whole", f"mask_seen={mask}")))
    ranks = pq.read_table(tiny / "whole" / "ranks.parquet").to_pydict()
    split_files(tiny)
    actual = evaluate(load(options(tiny, "parts", f"mask_seen={mask}")))
    assert actual.pop("bundle") != whole.pop("bundle")
    same_numbers(without_times(actual), without_times(whole))
    again = pq.read_table(tiny / "parts" / "ranks.parquet").to_pydict()
    keys = ("ranker", "split", "user_id", "target", "rank")
    assert sorted(zip(*(again[k] for k in keys), strict=True)) == sorted(zip(*(ranks[k] for k in keys), strict=True))
    assert pq.read_table(tiny / "parts" / "topk.parquet").equals(pq.read_table(tiny / "whole" / "topk.parquet"))
    assert not list(tiny.glob(".*.parts"))


def test_small_files_are_joined_into_one_part(tiny):
    split_files(tiny, rows=2)  # six files of two queries
    config = load(options(tiny, "out", "part_queries=5"))
    dataset, bundle = open_inputs(config)
    evaluation = Evaluation(config, dataset, bundle, None)
    actual = [part for part in evaluation.parts() if part.split == "test"]
    assert [(p.number, p.files, p.first, p.rows) for p in actual] == [(0, 2, 0, 4), (2, 2, 4, 4), (4, 2, 8, 4)]
    whole = Queries.joined(list(bundle.queries("test")))
    batches = [list(evaluation.batches(part)) for part in actual]
    assert [len(batch) for batch in batches] == [1, 1, 1]
    joined = Queries.joined([batch[0] for batch in batches])
    for name in ("user_id", "target", "seen_offset", "seen", "n_clicks", "vector"):
        assert np.array_equal(getattr(joined, name), getattr(whole, name))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 3, 6, 9])
def test_killed_evaluation_resumes_with_the_remaining_parts(tiny, at, monkeypatch):
    split_files(tiny)
    whole = evaluate(load(options(tiny, "whole")))
    made, run, feedback = [], rank_part.rank_part, []

    def feedback_once(*inputs):
        feedback.append(inputs)
        return evaluate_feedback(*inputs)

    monkeypatch.setattr("retrieval.evaluate.evaluate_feedback", feedback_once)

    def counted(evaluation, part, folder, blend):
        made.append(part.name)
        if len(made) == at:
            raise Killed
        run(evaluation, part, folder, blend)

    monkeypatch.setattr(rank_part, "rank_part", counted)
    if at <= 8:
        with pytest.raises(Killed):
            evaluate(load(options(tiny, "out")))
        assert not (tiny / "out").exists()
    actual = evaluate(load(options(tiny, "out")))
    assert len(made) == len(set(made)) + (at <= 8)  # only the interrupted part is computed twice
    assert len(feedback) == 1
    assert without_times(actual) == without_times(whole)


def test_parts_computed_with_other_options_are_not_reused(tiny, monkeypatch):
    split_files(tiny)

    def killed(evaluation, part, folder, blend):
        raise Killed

    with monkeypatch.context() as context:
        context.setattr(rank_part, "recommend_part", killed)
        with pytest.raises(Killed):
            evaluate(load(options(tiny, "out", "mask_seen=true")))
    assert without_times(evaluate(load(options(tiny, "out")))) == without_times(evaluate(load(options(tiny, "whole"))))


def test_sums_survive_a_round_trip_through_files(tmp_path, tiny):
    rng = np.random.default_rng(0)
    attributes = SegmentAttributes.of(open_dataset(tiny / "data"))
    whole, merged = RankingResult([1, 3], 6), RankingResult([1, 3], 6)
    for part in range(3):
        one = RankingResult([1, 3], 6)
        queries = random_queries(rng, 6, 20, 2)
        rank, lists = rng.integers(1, 7, 20), rng.integers(0, 7, (20, 3))
        for each in (whole, one):
            each.add(queries, 1, rank, lists, attributes)
        one.write(tmp_path / str(part))
        merged.add_written(tmp_path / str(part))
    assert np.array_equal(merged.shown, whole.shown)
    same_numbers(merged.metrics(attributes.train_clicks, 6), whole.metrics(attributes.train_clicks, 6))


def test_segments_match_hand_computation(tiny):
    """Sessions of these lengths, one click of which follows the query. Train clicks of items 1..6: 10 10 9 5 2 0."""
    lengths, users = np.array([30, 4, 5, 9, 10, 14, 15, 29, 3, 99]), np.array([12, 1, 7, 2, 99, 5, 8, 10, 3, 6])
    target = np.array([6, 1, 2, 3, 4, 5, 1, 2, 3, 4], np.int32)
    offset = np.cumsum([0, *(lengths - 1)])
    queries = Queries(
        users, target, offset, np.ones(offset[-1], np.int32), lengths.astype(np.int32), np.zeros((10, 2), np.float32)
    )
    attributes = SegmentAttributes.of(open_dataset(tiny / "data"))
    actual = {(kind, name): np.flatnonzero(mask).tolist() for kind, name, mask in segments(queries, 1, attributes)}
    expected = {
        "session_length": {"3-4": [1, 8], "5-9": [2, 3], "10-14": [4, 5], "15-29": [6, 7], "30+": [0, 9]},
        "target_popularity": {"1": [1, 6], "3": [2, 7], "6": [3, 8], "9": [4, 9], "10": [5], "cold": [0]},
        "gender": {"0": [0, 3, 6, 7, 9], "1": [1, 2, 5, 8], "unknown": [4]},
        "age": {"3": [0, 1, 2, 3, 5, 6, 7, 8, 9], "unknown": [4]},
    }
    flat = {(kind, name): rows for kind, by_name in expected.items() for name, rows in by_name.items()}
    assert {key: rows for key, rows in actual.items() if rows} == flat
    result = RankingResult([1], 6)
    result.add(queries, 1, np.ones(10, np.int64), np.ones((10, 1), np.int64), attributes)
    metrics = result.metrics(attributes.train_clicks, 6)
    for kind, by_name in expected.items():
        assert [(name, row["queries"]) for name, row in metrics[kind].items()] == [
            (name, len(rows)) for name, rows in by_name.items()
        ]


def random_queries(rng, n_items, n, dimension):
    from tests.retrieval.test_index_ranker import random_queries as make

    return make(rng, n_items, n, dimension)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_gini_equals_the_mean_absolute_difference_over_twice_the_mean(times):
    expected = None
    if sum(times):
        pairs = [abs(a - b) for a in times for b in times]
        expected = np.mean(pairs) / (2 * np.mean(times))
    actual = gini(np.array([t for t in times if t]), len(times))
    assert actual == (pytest.approx(expected, abs=1e-12) if expected is not None else None)


def test_each_popularity_decile_has_a_tenth_of_the_clicks():
    clicks = np.concatenate([[0], np.sort(np.random.default_rng(0).zipf(1.4, 5000).clip(max=500))[::-1], [0, 0]])
    actual = deciles(clicks)
    assert set(actual[clicks == 0].tolist()) == {0}
    assert (np.diff(actual[1:-2]) >= 0).all()
    for number in range(1, DECILES + 1):
        assert clicks[actual == number].sum() == pytest.approx(clicks.sum() / DECILES, abs=500)


def test_novelty_popularity_coverage_and_gini_match_hand_computation():
    result = RankingResult([1, 2], 3)
    result.shown[0, 1], result.shown[1, 2], result.shown[1, 3] = 2, 1, 1
    actual = result.metrics(np.array([0, 6, 1, 0]), 3)
    assert actual["popularity@1"] == 6
    assert actual["popularity@2"] == (2 * 6 + 1 + 0) / 4
    assert actual["novelty@1"] == pytest.approx(-np.log2(7 / 10))
    assert actual["novelty@2"] == pytest.approx(-(2 * np.log2(7 / 10) + np.log2(2 / 10) + np.log2(1 / 10)) / 4)
    assert actual["coverage@2"] == 1
    assert actual["gini@2"] == pytest.approx(((2 * 3 - 4) * 2 + (2 * 1 - 4) * 1) / (3 * 4))


def test_log_loss_and_calibration_equal_scikit_learn():
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import log_loss

    rng = np.random.default_rng(0)
    score = rng.random(1000)
    label = (rng.random(1000) < score**2).astype(int)
    actual = calibration(label, score.astype(np.float64))
    assert actual["log_loss"] == pytest.approx(log_loss(label, score))
    observed, predicted = calibration_curve(label, score, n_bins=10, strategy="quantile")
    assert actual["predicted"] == pytest.approx(predicted.tolist())
    assert actual["observed"] == pytest.approx(observed.tolist())
    assert actual["error"] == pytest.approx(np.abs(predicted - observed).mean())
    assert calibration(label, score * 3)["log_loss"] is None


@pytest.mark.parametrize("n", [1, 2, 4, 100])
def test_sampled_queries_are_evenly_spaced_over_all_files(tiny, n):
    split_files(tiny, rows=2)
    bundle = open_bundle(tiny / "bundle")
    users = [int(user) for batch in bundle.queries("test") for user in batch.user_id]
    total = len(users)
    # By hand: the first and the last, and equal steps between, rounded down.
    rows = sorted({i * (total - 1) // (n - 1) for i in range(n)}) if 1 < n < total else list(range(min(n, total)))

    sampled = bundle.sample_queries("test", n)

    assert [int(user) for batch in sampled for user in batch.user_id] == [users[row] for row in rows]
    assert [int(i) for batch in sampled for i in batch.target] == [
        int(i)
        for batch in bundle.queries("test")
        for u, i in zip(batch.user_id, batch.target, strict=True)
        if int(u) in {users[row] for row in rows}
    ]


def test_a_split_without_queries_gives_an_empty_sample(tiny):
    assert open_bundle(tiny / "bundle").sample_queries("validation", 5) == []


def rows_of(folder):
    """Users by ranker and split, and their ranks."""
    table = pq.read_table(folder / "ranks.parquet").to_pydict()
    rows = zip(*(table[name] for name in ("ranker", "split", "user_id", "rank")), strict=True)
    return {(ranker, split, user): rank for ranker, split, user, rank in rows}


def evenly_spaced(values, n):
    """Values `n` of which are taken by counting up n / len at each and taking one at every whole number."""
    part = Fraction(min(n, len(values)), len(values))
    return np.array([v for i, v in enumerate(values) if (i + 1) * part // 1 > i * part // 1])


@pytest.mark.parametrize("most", [1, 4, 5, 7, 12, 1_000])
def test_max_queries_ranks_evenly_spaced_queries_and_recommends_for_all(tiny, most):
    """Files of three queries give the ranks of one file; baselines rank an evenly spaced sample of two at most."""
    evaluate(load(options(tiny, "whole")))
    _, bundle = open_inputs(load(options(tiny, "some")))
    users = {split: np.concatenate([q.user_id for q in bundle.queries(split)]) for split in ("valid", "test")}
    split_files(tiny)
    actual = evaluate(load(options(tiny, "some", f"max_queries={most}", "baseline_queries=2")))
    whole, some = rows_of(tiny / "whole"), rows_of(tiny / "some")
    for split, everyone in users.items():
        chosen = evenly_spaced(everyone, most)
        sampled = evenly_spaced(chosen, 2)
        assert actual[split]["queries"] == len(chosen) == min(most, len(everyone))
        for ranker, asked in (("model", chosen), ("popularity", chosen), ("markov", sampled)):
            found = {user: rank for (name, of, user), rank in some.items() if (name, of) == (ranker, split)}
            assert found == {user: whole[ranker, split, user] for user in asked.tolist()}
    assert pq.read_table(tiny / "some" / "topk.parquet").equals(pq.read_table(tiny / "whole" / "topk.parquet"))


def test_test_metrics_are_printed_before_many_recommendations(tiny, monkeypatch, capsys):
    split_files(tiny)
    monkeypatch.setattr("retrieval.evaluate.MANY_QUERIES", 1)
    told = []

    def interrupted(evaluation, part, folder, blend):
        told.append(capsys.readouterr().err)
        raise Killed

    config = load(options(tiny, "out", "blend=[model,markov]", "baselines=[markov]"))
    with monkeypatch.context() as context:
        context.setattr(rank_part, "recommend_part", interrupted)
        with pytest.raises(Killed):
            evaluate(config)
    result = evaluate(config)
    line = next(line for line in told[0].splitlines() if line.startswith("test: "))
    rows = {"model": result["test"], "blend": result["blend"]["test"]} | {
        name: result["baselines"][name]["test"] for name in ("popularity", "markov")
    }
    assert sorted(line.removeprefix("test: ").split("; ")) == sorted(
        f"{name} hr@5 {row['hr@5']:.4f} ndcg@5 {row['ndcg@5']:.4f}" for name, row in rows.items()
    )
