"""Indexes that are tuned, saved next to a bundle and reused; broken index records."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import pytest

from etl.runtime.errors import InputError
from retrieval.config import load
from retrieval.evaluate import reopen
from retrieval.evaluation import open_inputs
from retrieval.search.index import KINDS, SPACES
from retrieval.search.prepare import make_catalogue, prepare_index
from retrieval.search.tuning import measure
from tests.support.bundles import flip, rewrite_items, run, with_vector


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("kind", list(KINDS))
def test_saved_index_is_reused_with_its_tuning(tiny, kind, monkeypatch):
    first = run(tiny, "a", f"index={kind}")

    def never(*arguments):
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


@pytest.mark.parametrize("best", SPACES)
def test_index_is_built_in_the_space_with_the_higher_recall(tiny, best, monkeypatch):
    recalls = {space: 0.9 if space == best else 0.8 for space in SPACES}
    monkeypatch.setattr("retrieval.search.prepare.compare_spaces", lambda *_: recalls)
    config = load([*(f"{n}={tiny / n}" for n in ("bundle", "data", "output")), "index=ivf_flat", "cutoffs=[2]"])
    dataset, bundle = open_inputs(config)
    index, described = prepare_index(bundle, dataset, make_catalogue(bundle, dataset, config), config)
    assert (index.space, described["space"], described["spaces"]) == (best, best, recalls)


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(("asked", "kind"), [("auto", "flat"), ("ivf_flat", "ivf_flat")])
def test_warns_of_an_index_slower_than_exact_search_or_below_fidelity(tiny, asked, kind, monkeypatch, capfd):
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
    "no recall": lambda record: record["tuned"]["0.99"]["test"].update(recall=None),
    "no kind": lambda record: record.pop("kind"),
    "a kind that is none": lambda record: record.update(kind="magic"),
    "a list of tunings": lambda record: record.update(tuned=[]),
}


def test_broken_index_records_are_refused(tiny):
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
def test_index_of_another_bundle_or_kind_or_a_changed_file_is_refused(tiny):
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


@pytest.mark.usefixtures("no_report")
def test_record_that_cannot_be_written_gives_a_warning_only(tiny, monkeypatch, capfd):
    def full(path, record):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("retrieval.search.index_file.write_json", full)
    actual = run(tiny, "a", "index=ivf_flat")
    assert "warning: the index's record is not saved: " in capfd.readouterr().err
    assert actual["index"]["kind"] == "ivf_flat"
