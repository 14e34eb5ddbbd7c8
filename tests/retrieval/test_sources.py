"""Counted sources stored on disk, and lists built in ranges of items."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from etl.runtime.errors import InputError
from retrieval.sources import counts, store
from retrieval.sources.counts import cosine_lists, successor_lists
from retrieval.sources.sessions import TrainSessions
from retrieval.sources.store import COUNTED, SourceOptions, open_counted
from tests.retrieval.test_source_ranker import queries_of

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
