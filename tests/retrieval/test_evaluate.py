"""The evaluation program on the frozen tiny bundle."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.dataset import DataFile, Dataset, open_dataset
from retrieval.__main__ import main
from retrieval.bundle import MANIFEST, finish_bundle
from retrieval.config import BASELINES
from retrieval.metrics.significance import gains
from retrieval.popularity import item_rates
from retrieval.ranks_file import read_ranks
from retrieval.repeats import Repeats, count_repeats
from tests.data.make_tiny import CLICKS
from tests.support.bundles import run


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("index", ["flat", "ivf_flat", "ivf_sq8", "ivf_pq_refine", "hnsw", "auto"])
def test_tiny_result_equals_the_hand_computed_one(tiny, index):
    expected = json.loads((tiny / "result" / "metrics.json").read_text())
    actual = run(tiny, "out", f"index={index}", "fidelity=1.0")
    for name, value in expected["test"].items():
        assert actual["test"][name] == pytest.approx(value, abs=1e-12), name
    for name, value in expected["baselines"]["popularity"]["test"].items():
        assert actual["baselines"]["popularity"]["test"][name] == pytest.approx(value, abs=1e-12), name
    assert actual["index"]["recall_at_20_vs_exact"] == 1.0
    assert json.loads((tiny / "out" / "metrics.json").read_text())["ties"] == "against"


def test_masked_targets_miss_and_masked_items_do_not_compete(tiny):
    expected = json.loads((tiny / "result" / "metrics.json").read_text())["mask_seen"]["test"]
    actual = run(tiny, "out", "mask_seen=true")["test"]
    assert {name: actual[name] for name in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("repeats", [True, False])
def test_seen_items_are_masked_by_default_if_valid_targets_do_not_repeat(tiny, repeats, capfd, monkeypatch):
    """Some valid targets of the tiny log (the fourth clicks) repeat one of the three clicks before."""
    expected = sum(clicks[3] in clicks[:3] for clicks in CLICKS.values())
    assert count_repeats(open_dataset(tiny / "data")) == Repeats(12, expected)
    if not repeats:
        monkeypatch.setattr("retrieval.repeats.MAX_REPEATS", expected / 12)
    actual = run(tiny)
    assert actual["mask_seen"] is not repeats
    assert f"mask_seen={str(not repeats).lower()}: {expected} of 12 valid targets" in capfd.readouterr().err
    result = json.loads((tiny / "result" / "metrics.json").read_text())
    expected_test = (result if repeats else result["mask_seen"])["test"]
    assert {name: actual["test"][name] for name in expected_test} == pytest.approx(expected_test, abs=1e-12)


def test_repeats_are_counted_over_evenly_spaced_row_groups(tmp_path):
    """Each row group holds a session whose target repeats and one whose does not; a third of all are sampled."""
    table = pa.table({"items": [[1, 2, 1, 9], [1, 2, 3, 9]]}).cast(pa.schema([("items", pa.list_(pa.int32()))]))
    with pq.ParquetWriter(tmp_path / "part", table.schema) as writer:
        for _ in range(9):
            writer.write_table(table)
    entry = DataFile("part", 18, 0, "")
    dataset = Dataset(tmp_path, None, [entry, entry], [])
    assert count_repeats(dataset) == Repeats(36, 18)
    assert count_repeats(dataset, sample=12) == Repeats(12, 6)
    assert not Repeats(0, 0).mask_seen


@pytest.mark.usefixtures("no_report")
def test_topk_omits_seen_items_and_has_raw_ids(tiny):
    run(tiny, "out", "blend=none")
    rows = {r["user_id"]: r for r in pq.read_table(tiny / "out" / "topk.parquet").to_pylist()}
    # User 1 saw items 1 to 5 and scores by (1, 0): only item 6 is left.
    assert (rows[1]["items"], rows[1]["item_ids"], rows[1]["scores"]) == ([6], [106], [0.0])
    # User 8 saw 1 2 5 3 1 and scores by (0, 1): 6 before 4.
    assert rows[8]["items"] == [6, 4]


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("seen", ["true", "false"])
def test_metrics_are_the_averages_over_the_ranks_file(tiny, seen):
    actual = run(tiny, "out", f"mask_seen={seen}")
    for split in ("valid", "test"):
        by_ranker = read_ranks(tiny / "out" / "ranks.parquet", split)
        assert set(by_ranker) == {"model", "blend", *BASELINES}
        for name, table in by_ranker.items():
            message = {"model": actual, "blend": actual["blend"]}.get(name, actual["baselines"].get(name))[split]
            assert len(table) == message["queries"]
            assert len(set(table["user_id"].to_pylist())) == len(table)
            assert max(table["rank"].to_pylist()) <= 5 + 1  # ranks beyond the largest cutoff are written as one
            for metric in ("hr@5", "ndcg@5", "mrr@2"):
                assert gains(table["rank"].to_numpy(), metric).mean() == pytest.approx(message[metric], abs=1e-12)


def make_refit(tiny):
    """Make the tiny bundle one of a refit model, beside the bundle before the refit."""
    shutil.move(tiny / "bundle", tiny / "bundle-selected")
    shutil.copytree(tiny / "bundle-selected", tiny / "bundle")
    for part in ("queries-valid", "feedback-valid"):
        shutil.rmtree(tiny / "bundle" / part)
    manifest = json.loads((tiny / "bundle" / MANIFEST).read_text())
    finish_bundle(tiny / "bundle", dataset=manifest["dataset"], refit=True, n_items=6, dimension=2, model="tiny")


def test_index_of_a_refit_bundle_is_tuned_on_the_bundle_before_the_refit(tiny):
    make_refit(tiny)
    actual = run(tiny, "out", "index=ivf_flat")
    assert "valid" not in actual
    assert actual["index"]["tuned_on_valid"]


def markov_ranks(split, counted):
    """Ranks by transitions among each user's first `counted` clicks, ties by train clicks (the first three)."""
    numbers = {user: ["ABCDEF".index(letter) + 1 for letter in clicks] for user, clicks in CLICKS.items()}
    pairs = Counter(pair for clicks in numbers.values() for pair in pairwise(clicks[:counted]))
    popular = Counter(item for clicks in numbers.values() for item in clicks[:3])
    at, ranks = {"valid": 3, "test": 4}[split], {}
    for user, clicks in numbers.items():
        key = [(pairs[clicks[at - 1], item], popular[item]) for item in range(1, 7)]
        ranks[user] = sum(each >= key[clicks[at] - 1] for each in key)
    return [ranks[user] for user in sorted(ranks)]


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("refit", [False, True])
def test_sources_count_valid_clicks_only_beside_a_refit_model_and_never_to_fit_the_blend(tiny, refit):
    if refit:
        make_refit(tiny)
    actual = run(tiny, "out", "blend=[model,markov]", "baselines=[markov]", "mask_seen=false")
    expected = markov_ranks("test", 4 if refit else 3)
    assert (expected != markov_ranks("test", 3)) is refit
    ranks = read_ranks(tiny / "out" / "ranks.parquet", "test")
    assert ranks["markov"]["rank"].to_pylist() == expected
    for metric in ("hr@2", "ndcg@5"):
        value = gains(np.array(expected), metric).mean()
        assert actual["blend"]["sources"]["markov"]["test"][metric] == pytest.approx(value)
    fitted = gains(np.array(markov_ranks("valid", 3)), "ndcg@5").mean()
    assert actual["blend"]["selection"]["ndcg@5"]["sources"]["markov"] == pytest.approx(fitted)


def test_bundle_with_feedback_only_gives_no_ranking_metrics(tiny):
    for part in ("queries-valid", "queries-test", "queries-next"):
        shutil.rmtree(tiny / "bundle" / part)
    (tiny / "bundle" / "items.parquet").unlink()
    dataset = json.loads((tiny / "bundle" / MANIFEST).read_text())["dataset"]
    finish_bundle(tiny / "bundle", dataset=dataset, refit=False, n_items=6, dimension=0, model="rank")
    actual = run(tiny)
    assert "hr@5" not in actual["test"]
    assert actual["test"]["auc/like"] == pytest.approx(0.475)
    assert not (tiny / "out" / "topk.parquet").exists()


@pytest.mark.parametrize("exposures", [True, False])
def test_item_rates_are_smoothed_shares_of_positives_in_train(fifty, exposures):
    """Without exposures the rows are the clicks but the first."""
    manifest = replace(fifty.manifest, protocol=fifty.manifest.protocol | {"exposures": exposures})
    rates = item_rates(replace(fifty, manifest=manifest), ["click", "like"])
    shown, positive = np.zeros(fifty.manifest.n_items + 1), {"click": 0.0, "like": 0.0}
    own = {task: np.zeros(len(shown)) for task in positive}
    for entry in fifty.session_files:
        for row in pq.read_table(fifty.file(entry.path)).to_pylist():
            places = zip(row["exposure_items"], row["exposure_position"], row["exposure_feedback"], strict=True)
            if not exposures:
                clicks = zip(row["items"], row["feedback"], strict=True)
                places = ((item, position, bits | 128) for position, (item, bits) in enumerate(clicks))
            for item, position, bits in places:
                if 1 <= position <= len(row["items"]) - 3:
                    shown[item] += 1
                    own["click"][item] += bits >> 7 & 1
                    own["like"][item] += bits & 1
    for task, rate in rates.items():
        mean = own[task].sum() / shown.sum()
        assert rate == pytest.approx((own[task] + 20 * mean) / (shown + 20), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ["cutoffs=[1,99]"],
        ["cutoffs=[]"],
        ["cutoffs=[5,1]"],
        ["cutoffs=many"],
        ["cutoffs=10"],
        ["index=magic"],
        ["fidelity=2"],
        ["candidates=some"],
        ["no_such=1"],
        ["mask_seen=perhaps"],
        ["threads=100000"],
        ["index"],
    ],
)
def test_invalid_options_fail_with_a_one_line_error(tiny, options, capfd):
    status = main([f"bundle={tiny / 'bundle'}", f"data={tiny / 'data'}", f"output={tiny / 'out'}", *options])
    _, err = capfd.readouterr()
    assert status == 2
    assert err.startswith("error: expected ")
    assert options[-1].partition("=")[0] in err
    assert err.count("\n") == 1
    assert not (tiny / "out").exists()
