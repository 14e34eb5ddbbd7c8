"""The evaluation program on the frozen tiny bundle, on random ones, and on rubbish."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.dataset import DataFile, Dataset, open_dataset
from etl.runtime.errors import InputError
from retrieval.__main__ import main
from retrieval.bundle import ITEMS, MANIFEST, Bundle, BundleManifest, finish_bundle, open_bundle, vectors_array
from retrieval.config import BASELINES, load
from retrieval.evaluate import evaluate, reopen
from retrieval.metrics.ranking import MISS
from retrieval.metrics.significance import gains
from retrieval.queries import Queries
from retrieval.query_files import open_inputs
from retrieval.rankers.index_ranker import rank_by_index, search_unseen
from retrieval.rankers.lists import first_listed
from retrieval.rankers.popularity import Popularity, item_rates
from retrieval.ranks_file import read_ranks
from retrieval.repeats import Repeats, count_repeats
from retrieval.search.index import KINDS, Catalogue, build_index
from retrieval.search.prepare import make_catalogue, prepare_index
from retrieval.search.tuning import measure
from tests.data.make_tiny import CLICKS


def run(tiny, name="out", *options):
    return evaluate(
        load(
            [f"bundle={tiny / 'bundle'}", f"data={tiny / 'data'}", f"output={tiny / name}", "cutoffs=[1,2,5]", *options]
        )
    )


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("index", ["flat", "ivf_flat", "ivf_sq8", "ivf_pq_refine", "hnsw", "auto"])
def test_the_tiny_result_is_the_one_worked_by_hand(tiny, index):
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
def test_seen_items_are_masked_by_default_where_no_valid_target_repeats(tiny, repeats, capfd, monkeypatch):
    """Of the tiny log's valid targets, the fourth clicks, some repeat one of the three before."""
    expected = sum(clicks[3] in clicks[:3] for clicks in CLICKS.values())
    assert count_repeats(open_dataset(tiny / "data")) == Repeats(12, expected)
    if not repeats:
        monkeypatch.setattr("retrieval.repeats.MOST_REPEATS", expected / 12)
    actual = run(tiny)
    assert actual["mask_seen"] is not repeats
    assert f"mask_seen={str(not repeats).lower()}: {expected} of 12 valid targets" in capfd.readouterr().err
    result = json.loads((tiny / "result" / "metrics.json").read_text())
    expected_test = (result if repeats else result["mask_seen"])["test"]
    assert {name: actual["test"][name] for name in expected_test} == pytest.approx(expected_test, abs=1e-12)


def test_repeats_are_counted_over_evenly_spread_row_groups(tmp_path):
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
def test_topk_leaves_out_seen_items_and_names_raw_ids(tiny):
    run(tiny, "out", "blend=none")
    rows = {r["user_id"]: r for r in pq.read_table(tiny / "out" / "topk.parquet").to_pylist()}
    # User 1 saw items 1 to 5 and scores by (1, 0): item 6 alone is left.
    assert (rows[1]["items"], rows[1]["item_ids"], rows[1]["scores"]) == ([6], [106], [0.0])
    # User 8 saw 1 2 5 3 1 and scores by (0, 1): 6 before 4.
    assert rows[8]["items"] == [6, 4]


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("seen", ["true", "false"])
def test_the_ranks_file_holds_what_the_metrics_average(tiny, seen):
    actual = run(tiny, "out", f"mask_seen={seen}")
    for split in ("valid", "test"):
        by_ranker = read_ranks(tiny / "out" / "ranks.parquet", split)
        assert set(by_ranker) == {"model", "blend", *BASELINES}
        for name, table in by_ranker.items():
            message = {"model": actual, "blend": actual["blend"]}.get(name, actual["baselines"].get(name))[split]
            assert len(table) == message["queries"]
            assert len(set(table["user_id"].to_pylist())) == len(table)
            for metric in ("hr@5", "ndcg@5", "mrr@2"):
                assert gains(table["rank"].to_numpy(), metric).mean() == pytest.approx(message[metric], abs=1e-12)


def random_queries(rng, n_items, n, dimension):
    lengths = rng.integers(1, 6, n)
    return Queries(
        np.arange(n),
        rng.integers(1, n_items + 1, n).astype(np.int32),
        np.concatenate([[0], np.cumsum(lengths)]),
        rng.integers(1, n_items + 1, lengths.sum()).astype(np.int32),
        lengths.astype(np.int32),
        rng.integers(-2, 3, (n, dimension)).astype(np.float32),
    )


@pytest.mark.parametrize("mask_seen", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_ranks_equal_a_slow_ranking_of_all_candidates(seed, mask_seen):
    rng = np.random.default_rng(seed)
    n_items = 40
    vectors = rng.integers(-1, 2, (n_items, 3)).astype(np.float32)  # few values: ties abound
    candidates = np.sort(rng.choice(np.arange(1, n_items + 1), 30, replace=False)).astype(np.int32)
    catalogue = Catalogue(candidates, vectors[candidates - 1])
    clicks = rng.integers(0, 5, 30)
    queries = random_queries(rng, n_items, 60, 3)
    rank, lists = rank_by_index(build_index("flat", catalogue), queries, 5, mask_seen=mask_seen)
    popular = Popularity(candidates, clicks)
    popular_rank = popular.ranks(queries, mask_seen=mask_seen)
    popular_lists = popular.lists(queries, 5, mask_seen=mask_seen)
    for q in range(60):
        seen = set(queries.seen[queries.seen_offset[q] : queries.seen_offset[q + 1]].tolist()) if mask_seen else set()
        target = int(queries.target[q])
        for scores, actual, listed in (
            (
                dict(zip(candidates.tolist(), (catalogue.vector @ queries.vector[q]).tolist(), strict=True)),
                rank[q],
                lists[q],
            ),
            (dict(zip(candidates.tolist(), clicks.tolist(), strict=True)), popular_rank[q], popular_lists[q]),
        ):
            if target not in scores or target in seen:
                assert actual == MISS
            else:
                wanted = 1 + sum(s >= scores[target] for i, s in scores.items() if i != target and i not in seen)
                assert min(actual, 6) == min(wanted, 6)
            best = sorted((i for i in scores if i not in seen), key=lambda i: (-scores[i], i))[:5]
            assert [i for i in listed.tolist() if i] == best


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("kind", list(KINDS))
def test_an_index_is_kept_and_used_again_with_what_tuning_found(tiny, kind, monkeypatch):
    first = run(tiny, "a", f"index={kind}")

    def never(*given):
        raise AssertionError("built again")

    monkeypatch.setattr("retrieval.search.prepare.build_index", never)
    monkeypatch.setattr("retrieval.search.prepare.tune", never)
    second = run(tiny, "b", f"index={kind}")
    for name in ("kind", "space", "recall_at_20_vs_exact", "tuned_on_valid", "build_seconds"):
        assert first["index"][name] == second["index"][name]
    without = {"ranking_seconds"}
    assert {k: v for k, v in first["test"].items() if k not in without} == {
        k: v for k, v in second["test"].items() if k not in without
    }


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(("asked", "kind"), [("auto", "flat"), ("ivf_flat", "ivf_flat")])
def test_an_index_slower_than_exact_search_or_below_the_fidelity_is_told(tiny, asked, kind, monkeypatch, capfd):
    def slow(index, reference):
        return replace(
            measure(index, reference), recall=0.5, recall_low=0.4, queries_per_second=1, exact_queries_per_second=9
        )

    monkeypatch.setattr("retrieval.search.index.FLAT_UP_TO", 0)
    monkeypatch.setattr("retrieval.search.prepare.measure", slow)
    config = load([*(f"{n}={tiny / n}" for n in ("bundle", "data", "output")), f"index={asked}", "cutoffs=[2]"])
    dataset, bundle = open_inputs(config)
    for again in (False, True):
        index, described = prepare_index(bundle, dataset, make_catalogue(bundle, dataset, config), config)
        assert (index.kind, described["kind"]) == (kind, kind), again
        err = capfd.readouterr().err
        assert (
            "keeps recall@20 0.5000 (0.4000 – 1.0000) and HR@20 1.0000 of exact search, less than fidelity=0.99" in err
        )
        assert f"warning: ivf_flat is slower than exact search (1 against 9 queries/s); {INSTEAD[asked]}" in err
    assert reopen(config).index.kind == kind


INSTEAD = {"auto": "exact search is taken", "ivf_flat": "index=flat is exact"}


BROKEN_RECORDS = {
    "an effort below 1": lambda record: record["tuned"]["0.99"].update(effort=-5),
    "words for numbers": lambda record: record["tuned"]["0.99"]["test"].update(recall="all"),
    "no kind": lambda record: record.pop("kind"),
    "a kind that is none": lambda record: record.update(kind="magic"),
    "a list of tunings": lambda record: record.update(tuned=[]),
}


def test_broken_index_records_are_named(tiny):
    options = [*(f"{n}={tiny / n}" for n in ("bundle", "data")), f"output={tiny / 'b'}", "cutoffs=[1]"]
    config = load([*options, "index=ivf_flat", f"index_file={tiny / 'mine.faiss'}"])
    dataset, bundle = open_inputs(config)
    catalogue = make_catalogue(bundle, dataset, config)
    prepare_index(bundle, dataset, catalogue, config)
    path = tiny / "mine.faiss.json"
    good = path.read_text()
    for spoil in BROKEN_RECORDS.values():
        record = json.loads(good)
        spoil(record)
        path.write_text(json.dumps(record))
        with pytest.raises(InputError, match=r"index.* record"):
            prepare_index(bundle, dataset, catalogue, config)
    path.write_text("[]")
    with pytest.raises(InputError, match="an index record with made_from"):
        prepare_index(bundle, dataset, catalogue, config)
    record = json.loads(good)
    del record["tuned"]["0.99"]["test"]["recall_low"]  # as an earlier version wrote it: tuned again
    path.write_text(json.dumps(record))
    prepare_index(bundle, dataset, catalogue, config)
    assert json.loads(path.read_text())["tuned"]["0.99"]["test"]["recall_low"] == 1.0


@pytest.mark.usefixtures("no_report")
def test_an_index_of_another_bundle_or_a_changed_file_is_refused(tiny):
    index = f"index_file={tiny / 'mine.faiss'}"
    run(tiny, "a", "index=ivf_flat", index)
    flip(tiny / "mine.faiss")
    with pytest.raises(InputError, match="the index file that was written"):
        run(tiny, "b", "index=ivf_flat", index)
    flip(tiny / "mine.faiss")
    with pytest.raises(InputError, match="an index of kind hnsw, got ivf_flat"):
        run(tiny, "b", "index=hnsw", index)
    rewrite_items(tiny, lambda table: with_vector(table, 0.25))
    with pytest.raises(InputError, match="an index of this bundle"):
        run(tiny, "b", "index=ivf_flat", index)
    assert not (tiny / "b").exists()


def test_a_refit_bundle_tunes_on_the_model_before(tiny):
    shutil.move(tiny / "bundle", tiny / "bundle-selected")
    shutil.copytree(tiny / "bundle-selected", tiny / "bundle")
    for part in ("queries-valid", "feedback-valid"):
        shutil.rmtree(tiny / "bundle" / part)
    manifest = json.loads((tiny / "bundle" / MANIFEST).read_text())
    finish_bundle(tiny / "bundle", dataset=manifest["dataset"], refit=True, n_items=6, dimension=2, model="tiny")
    actual = run(tiny, "out", "index=ivf_flat")
    assert "valid" not in actual
    assert actual["index"]["tuned_on_valid"]


def test_a_bundle_of_feedback_alone_has_no_ranking(tiny):
    for part in ("queries-valid", "queries-test", "queries-next"):
        shutil.rmtree(tiny / "bundle" / part)
    (tiny / "bundle" / "items.parquet").unlink()
    dataset = json.loads((tiny / "bundle" / MANIFEST).read_text())["dataset"]
    finish_bundle(tiny / "bundle", dataset=dataset, refit=False, n_items=6, dimension=0, model="rank")
    actual = run(tiny)
    assert "hr@5" not in actual["test"]
    assert actual["test"]["auc/like"] == pytest.approx(0.475)
    assert not (tiny / "out" / "topk.parquet").exists()


def rewrite_items(tiny, change):
    path = tiny / "bundle" / "items.parquet"
    table = pq.read_table(path)
    pq.write_table(change(table), path)
    raw = json.loads((tiny / "bundle" / MANIFEST).read_text())
    finish_bundle(tiny / "bundle", dataset=raw["dataset"], refit=False, n_items=6, dimension=2, model="tiny")


def with_vector(table, value):
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(6, 2).copy()
    vectors[3, 1] = value
    return table.set_column(1, table.schema.field("vector"), vectors_array(vectors))


BROKEN = {
    "a flipped byte": lambda t: flip(t / "bundle" / "items.parquet"),
    "a cut file": lambda t: (t / "bundle" / "items.parquet").write_bytes(b"PAR1"),
    "a missing file": lambda t: (t / "bundle" / "items.parquet").unlink(),
    "no manifest": lambda t: (t / "bundle" / MANIFEST).unlink(),
    "a manifest that is no JSON": lambda t: (t / "bundle" / MANIFEST).write_text("{"),
    "a manifest with a path outside": lambda t: edit_manifest(t / "bundle" / MANIFEST, path="../data/items.parquet"),
    "another dataset": lambda t: edit_manifest(t / "bundle" / MANIFEST, dataset="0" * 64),
    "NaN": lambda t: rewrite_items(t, lambda table: with_vector(table, np.nan)),
    "infinity": lambda t: rewrite_items(t, lambda table: with_vector(table, np.inf)),
    "an item twice": lambda t: rewrite_items(
        t, lambda x: x.set_column(0, x.schema.field(0), pa.array([1, 2, 3, 4, 5, 5], pa.int32()))
    ),
    "a manifest without files": lambda t: edit_manifest(t / "bundle" / MANIFEST, files=None),
    "a manifest whose dimension is a word": lambda t: edit_manifest(t / "bundle" / MANIFEST, dimension="2"),
    "a manifest of more rows": lambda t: edit_manifest(t / "bundle" / MANIFEST, rows=7),
    "a manifest without its items": lambda t: edit_manifest(t / "bundle" / MANIFEST, files=[]),
    "an empty seen": lambda t: rewrite(t, "queries-test", seen=[[], *[[1]] * 11]),
    "a null seen": lambda t: rewrite(t, "queries-test", seen=[None, *[[1]] * 11]),
    "a null in seen": lambda t: rewrite(t, "queries-next", seen=[[1, None], *[[1]] * 11]),
    "a user twice": lambda t: rewrite(t, "queries-test", user_id=[1, *range(1, 12)]),
    "no query for next": lambda t: rewrite(t, "queries-next", rows=0),
    "no query for valid": lambda t: rewrite(t, "queries-valid", rows=0),
    "label 2": lambda t: rewrite(t, "feedback-test", label=[2] * 24),
    "item 0 in feedback": lambda t: rewrite(t, "feedback-valid", item=[0] * 24),
    "an unknown task": lambda t: rewrite(t, "feedback-test", task=["jump"] * 24),
    "a null score": lambda t: rewrite(t, "feedback-test", score=[None] * 24),
    "a NaN score": lambda t: rewrite(t, "feedback-test", score=[np.nan] * 24),
    "a dataset file that differs": lambda t: flip(t / "data" / "items.parquet"),
}


def rewrite(tiny, part, rows=None, **columns):
    """A bundle's file with other columns, or its first rows alone, and a manifest that goes with it."""
    (path,) = (tiny / "bundle" / part).glob("*.parquet")
    table = pq.read_table(path).slice(0, rows)
    for name, values in columns.items():
        field = table.schema.field(name).with_nullable(True)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values[: len(table)], field.type))
    pq.write_table(table, path)
    rewrite_items(tiny, lambda items: items)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def edit_manifest(manifest, **changes):
    raw = json.loads(manifest.read_text())
    if "path" in changes:
        raw["files"][0]["path"] = changes.pop("path")
    if "rows" in changes:
        raw["files"][0]["rows"] = changes.pop("rows")
    manifest.write_text(json.dumps(raw | changes))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_ends_with_one_plain_line_and_no_output(tiny, name, capfd):
    BROKEN[name](tiny)
    status = main([f"bundle={tiny / 'bundle'}", f"data={tiny / 'data'}", f"output={tiny / 'out'}", "cutoffs=[1,2]"])
    out, err = capfd.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("error: expected ")
    assert err.count("\n") == 1
    assert ", got " in err
    assert not (tiny / "out").exists()


def test_masking_falls_back_to_exact_search_where_an_index_lists_too_few():
    """One list of a few candidates is probed, most of which the query has seen."""
    rng = np.random.default_rng(3)
    vectors = np.concatenate([rng.normal(5, 0.1, (40, 2)), rng.normal(-5, 0.1, (400, 2))]).astype(np.float32)
    catalogue = Catalogue(np.arange(1, 441, dtype=np.int32), vectors)
    index = build_index("ivf_flat", catalogue)
    seen = np.arange(1, 39, dtype=np.int32)
    queries = Queries(
        np.array([1]),
        np.array([440], np.int32),
        np.array([0, len(seen)]),
        seen,
        np.array([38], np.int32),
        np.ones((1, 2), np.float32),
    )
    index.set_effort(1)
    assert (index.search(queries.vector, 60)[1] < 0).any()
    _, listed = search_unseen(index, queries, 10)
    exact = np.argsort(-(vectors.astype(np.float64) @ np.ones(2)), kind="stable") + 1
    assert first_listed(listed, 10)[0].tolist() == [i for i in exact.tolist() if i > 38][:10]


def test_feedback_stands_beside_each_items_own_rate(fifty):
    rates = item_rates(fifty, ["click", "like"])
    shown, positive = np.zeros(fifty.manifest.n_items + 1), {"click": 0.0, "like": 0.0}
    own = {task: np.zeros(len(shown)) for task in positive}
    for entry in fifty.session_files:
        for row in pq.read_table(fifty.file(entry.path)).to_pylist():
            places = zip(row["exposure_items"], row["exposure_position"], row["exposure_feedback"], strict=True)
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
        ["index=magic"],
        ["fidelity=2"],
        ["candidates=some"],
        ["no_such=1"],
        ["mask_seen=perhaps"],
        ["threads=100000"],
        ["index"],
    ],
)
def test_wrong_options_end_with_one_plain_line(tiny, options, capfd):
    status = main([f"bundle={tiny / 'bundle'}", f"data={tiny / 'data'}", f"output={tiny / 'out'}", *options])
    _, err = capfd.readouterr()
    assert status == 2
    assert err.startswith("error: expected ")
    assert options[-1].partition("=")[0] in err
    assert err.count("\n") == 1
    assert not (tiny / "out").exists()


def test_targets_outside_the_catalogue_are_refused(tiny):
    path = tiny / "bundle" / "queries-test" / "part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, table.schema.field("target"), pa.array([7] * 12, pa.int32())), path)
    raw = json.loads((tiny / "bundle" / MANIFEST).read_text())
    finish_bundle(tiny / "bundle", dataset=raw["dataset"], refit=False, n_items=6, dimension=2, model="tiny")
    with pytest.raises(InputError, match=r"target items in 1\.\.6, got 7"):
        list(open_bundle(tiny / "bundle").queries("test"))


def test_more_items_than_the_manifest_says_are_refused_wherever_they_begin(tmp_path):
    """Vectors are read in batches: the surplus stands in one of its own here."""
    n = 1 << 17
    item = np.concatenate([np.arange(1, n + 1), [1]]).astype(np.int32)
    vector = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(len(item), np.float32)), 1)
    pq.write_table(pa.table({"item": item, "vector": vector}), tmp_path / ITEMS)
    manifest = BundleManifest("", refit=False, n_items=n, dimension=1, model="", files=[])
    with pytest.raises(InputError, match="once each in order"):
        Bundle(tmp_path, manifest, {}, str(tmp_path)).item_vectors()
