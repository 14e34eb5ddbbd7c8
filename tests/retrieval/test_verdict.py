"""The verdict's sentences, from hand-computed numbers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval.metrics.significance import compare
from retrieval.ranks_file import RankWriter, read_ranks
from retrieval.report.verdict import verdict

QUERIES = 40


def write_ranks(path, **ranks):
    rows = [(name, "test", user, 1, rank) for name, actual in ranks.items() for user, rank in enumerate(actual)]
    rows += [(name, "valid", user, 1, 1) for name, actual in ranks.items() for user, _ in enumerate(actual)]
    columns = dict(zip(RankWriter.SCHEMA.names, zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table({n: list(v) for n, v in columns.items()}).cast(RankWriter.SCHEMA), path)


def result_of(hits: int, baseline: int, **more):
    def hr(n):
        return {"hr@10": n / QUERIES, "queries": QUERIES}

    baselines = {
        "popularity": {"test": hr(1)},
        "markov": {"test": hr(baseline)},
        "item_rate": {"test": {"auc/like": 1}},
    }
    return {"model": "m", "cutoffs": [10], "refit": False, "test": hr(hits), "baselines": baselines} | more


@pytest.mark.parametrize(
    ("hits", "baseline", "end"),
    [
        (30, 10, "p 1.9e-06."),  # 20 queries are hits of the model only: 2 / 2**20
        (10, 30, "The baseline is better."),
        (11, 10, "These queries do not tell which is better."),
    ],
)
def test_answer_names_the_best_baseline_and_the_significance(tmp_path, hits, baseline, end):
    own, other = (np.where(np.arange(QUERIES) < n, 3, 11) for n in (hits, baseline))
    write_ranks(tmp_path / "ranks.parquet", model=own, markov=other, popularity=np.full(QUERIES, 11))
    actual = verdict(result_of(hits, baseline), read_ranks(tmp_path / "ranks.parquet"), {}, {})
    against = compare(own, other, "hr@10")
    assert actual.answer.startswith(f"{hits / QUERIES:.1%} of the next clicks are ranked among the first 10 by the ")
    assert (
        f"the best baseline, markov, finds {baseline / QUERIES:.1%}: {100 * against.difference:+.1f} points"
        in actual.answer
    )
    assert actual.answer.endswith(end)


def test_verdict_judges_the_blend_if_any_and_reports_gates_and_popularity(tmp_path):
    own = np.where(np.arange(QUERIES) < 20, 3, 11)
    write_ranks(tmp_path / "ranks.parquet", model=own, blend=own, markov=own, popularity=own)
    segments = {"1": {"hr@10": 0.1, "queries": 20}, "2": {"hr@10": 0.4, "queries": 20}}
    blend = {
        "kind": "sum",
        "weights": {"model": 1.0, "markov": 0.0},
        "test": {"hr@10": 0.5},
        "milliseconds": {"sum": 0.5},
    }
    result = result_of(18, 20, blend=blend)
    result["test"]["target_popularity"] = segments
    result["test"]["transition"] = {"counted": {"queries": 10}, "new": {"queries": 30}}
    result["baselines"]["popularity"]["test"]["target_popularity"] = segments | {"1": {"hr@10": 0.2, "queries": 20}}
    summary = {"parameters": {"total": 12_345}, "seconds": 130.0, "examples_per_second": 1_000.0, "seed": 7}
    gates = {"mean_weight": {"next": [0.5, 0.5], "like": [0.9, 0.1]}, "entropy_nats": {"next": 0.69, "like": 0.325}}
    actual = verdict(result, read_ranks(tmp_path / "ranks.parquet"), summary, {"gates": gates})
    assert "50.0% of the next clicks are ranked among the first 10 by the model m" in actual.answer
    blend["weights"]["markov"] = 0.5
    joined = verdict(result, read_ranks(tmp_path / "ranks.parquet"), summary, {})
    assert "50.0% of the next clicks are ranked among the first 10 by the blend of the model" in joined.answer
    assert (
        actual.cost == "12,345 parameters; trained in 2 min at 1,000 events/s; seed 7; 0.50 ms a query for the blend."
    )
    assert actual.notes[0].startswith("The blend takes model alone")
    assert "in popularity tenth 1 (1 = the most clicked items)" in actual.notes[1]
    assert actual.notes[2] == "The gates of next are nearly even."
    assert actual.advice[0].startswith("25% of the test steps were counted in train")
    has_them = verdict(result | {"transition_terms": 2}, read_ranks(tmp_path / "ranks.parquet"), summary, {})
    assert not any("network.transitions" in line for line in has_them.advice)
    even = {"mean_weight": {"next": [0.5, 0.5]}, "entropy_nats": {"next": 0.69}}
    assert (
        "All gates are nearly even"
        in verdict(result, read_ranks(tmp_path / "ranks.parquet"), {}, {"gates": even}).notes[2]
    )


def test_answer_explains_an_interval_without_zero_beside_a_large_p_value(tmp_path):
    own, other = (np.where(np.arange(QUERIES) < n, 3, 11) for n in (15, 10))  # 5 differ: p = 2 / 2**5
    write_ranks(tmp_path / "ranks.parquet", model=own, markov=other, popularity=np.full(QUERIES, 11))
    actual = verdict(result_of(15, 10), read_ranks(tmp_path / "ranks.parquet"), {}, {})
    assert compare(own, other, "hr@10").low > 0
    assert actual.answer.endswith(
        "p 0.062. Few queries differ, for which the interval is too narrow; the exact test counts. "
        "These queries do not tell which is better."
    )


def test_answer_is_about_the_queries_that_both_ranked(tmp_path):
    """The baseline ranked ten queries, of which the model hits all, as it does no others."""
    own, other = np.where(np.arange(QUERIES) < 10, 3, 11), np.where(np.arange(10) < 5, 3, 11)
    write_ranks(tmp_path / "ranks.parquet", model=own, markov=other, popularity=np.full(QUERIES, 11))
    actual = verdict(result_of(10, 20), read_ranks(tmp_path / "ranks.parquet"), {}, {})
    assert actual.answer.startswith(
        "100.0% of the next clicks of 10 sampled queries are ranked among the first 10 by the model m; the best "
        "baseline, markov, finds 50.0%: +50.0 points "
    )
