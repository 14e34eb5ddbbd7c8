"""Counted sources: stored on disk, lists built in ranges of items, popularity by category."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.runtime.errors import InputError
from retrieval.popularity import CategoryPopularity, Popularity
from retrieval.sources import counts, store
from retrieval.sources.counts import cosine_lists, successor_lists
from retrieval.sources.scores import category_popularity
from retrieval.sources.sessions import TrainSessions
from retrieval.sources.store import COUNTED, SourceOptions, open_counted
from tests.retrieval.test_source_ranker import N_ITEMS, queries_of, sequences

OPTIONS = SourceOptions(held_out=2, rules_per_item=5, gaps=3, neighbours=4)
ASKED = [[1, 2, 3], [5], [9, 9, 1, 4]]


def scores(sources):
    queries = queries_of(ASKED, [1, 2, 999], [1, 1, 1])
    return {name: source(queries).toarray() for name, source in sources.items()}


def test_sources_are_stored_and_reused_as_memory_maps(fifty, tmp_path, monkeypatch):
    first = scores(open_counted(list(COUNTED), fifty, tmp_path, OPTIONS))

    def never(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(TrainSessions, "of", never)
    again = open_counted(list(COUNTED), fifty, tmp_path, OPTIONS)
    assert isinstance(again["v_sknn"].user_id, np.memmap)
    for name, values in scores(again).items():
        assert np.array_equal(values, first[name]), name
    # Options that a source uses make it another source; options that it does not use do not.
    open_counted(["markov"], fifty, tmp_path, replace(OPTIONS, gaps=7, neighbours=9))
    for other in (replace(OPTIONS, rules_per_item=6), replace(OPTIONS, held_out=1)):
        with pytest.raises(AssertionError, match="read again"):
            open_counted(["markov"], fifty, tmp_path, other)


def test_held_out_1_adds_the_valid_click_of_each_session(fifty, tmp_path):
    train, valid = (TrainSessions.of(fifty, held_out) for held_out in (2, 1))
    assert len(valid.items) == len(train.items) + len(train.user_id)
    begin = valid.offset[:-1]
    assert np.array_equal(np.delete(valid.items, valid.offset[1:] - 1), train.items)
    assert (np.diff(valid.offset) == np.diff(train.offset) + 1).all()
    assert len(begin) == 50


@pytest.mark.parametrize("broken", ["item.npy", "record.json"])
def test_changed_source_file_is_refused(fifty, tmp_path, broken):
    open_counted(["item_knn"], fifty, tmp_path, OPTIONS)
    (folder,) = tmp_path.iterdir()
    content = bytearray((folder / broken).read_bytes())
    content[-1] ^= 1
    (folder / broken).write_bytes(content)
    with pytest.raises(InputError, match="delete"):
        open_counted(["item_knn"], fifty, tmp_path, OPTIONS)


def test_unwritable_source_folder_gives_a_warning_only(fifty, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    actual = open_counted(["markov"], fifty, tmp_path / "file" / "below", OPTIONS)
    assert "warning: the source is not stored" in capsys.readouterr().err
    assert scores(actual)["markov"].any()


@pytest.mark.parametrize("threads", [1, 3])
def test_lists_do_not_depend_on_ranges_or_threads(fifty, monkeypatch, threads):
    sessions = TrainSessions.of(fifty)
    built = {
        "rules": lambda: successor_lists(sessions, 4, 6, threads),
        "knn": lambda: cosine_lists(sessions, 6, threads),
    }
    whole = {name: build() for name, build in built.items()}
    monkeypatch.setattr(counts, "PAIRS_AT_ONCE", 40)
    for name, build in built.items():
        parts = build()
        for array in ("data", "indices", "indptr"):
            assert np.array_equal(getattr(parts, array), getattr(whole[name], array))


def test_source_of_another_version_is_not_reused(fifty, tmp_path, monkeypatch):
    open_counted(["markov"], fifty, tmp_path, OPTIONS)
    monkeypatch.setattr(store, "VERSION", store.VERSION + 1)
    open_counted(["markov"], fifty, tmp_path, OPTIONS)
    assert len(list(tmp_path.iterdir())) == 2


def test_equal_cosines_are_ordered_by_id():
    """Item 1 is in four sessions: 3 / sqrt(4 * 9) with item 2 in nine, 1 / sqrt(4 * 1) with item 3 in one: both 1/2."""
    lists = [[1, 2]] * 3 + [[1, 3]] + [[2, 4]] * 6
    offset = np.arange(0, 2 * len(lists) + 1, 2)
    sessions = TrainSessions(np.arange(len(lists)), offset, np.concatenate(lists).astype(np.int32), 4)
    both = cosine_lists(sessions, 2)
    assert both[1].toarray()[0].tolist() == [0, 0, 0.5, 0.5, 0]
    assert cosine_lists(sessions, 1)[1].indices.tolist() == [2]


@pytest.mark.parametrize("mask_seen", [False, True])
@given(data=st.data())
@settings(max_examples=80)
def test_source_of_popularity_by_category_equals_a_slow_one(mask_seen, data):
    seen_lists = data.draw(st.lists(sequences, min_size=1, max_size=5))
    candidates = np.array(sorted(data.draw(st.sets(st.integers(1, N_ITEMS), min_size=1))))
    clicks = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(candidates), max_size=len(candidates))))
    category = np.array([0, *data.draw(st.lists(st.integers(0, 2), min_size=N_ITEMS, max_size=N_ITEMS))], np.int32)
    queries = queries_of(seen_lists, [99] * len(seen_lists), [1] * len(seen_lists))
    most = data.draw(st.integers(1, 4))
    source = category_popularity(
        CategoryPopularity(Popularity(candidates, clicks, N_ITEMS), category), most, mask_seen=mask_seen
    )
    actual = source(queries).toarray()
    expected = np.zeros((len(seen_lists), N_ITEMS + 1))
    popular = dict(zip(candidates.tolist(), clicks.tolist(), strict=True))
    for row, seen in enumerate(seen_lists):
        for each in {category[item] for item in seen}:
            share = np.mean([category[item] == each for item in seen])
            usable = [c for c in popular if category[c] == each and not (mask_seen and c in seen)]
            for item in sorted(usable, key=lambda c: (-popular[c], c))[:most]:
                expected[row, item] = (1 + popular[item]) * share
    assert actual == pytest.approx(expected, rel=1e-6)
