"""The order of an epoch and the content of batches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.batch import BatchOptions, feedback_rows, targets_of, train_batch
from trainer.data.order import Order, share
from trainer.data.prefetch import Prefetch
from trainer.data.ragged import Ragged
from trainer.data.ranking_rows import block_rows, rank_batch
from trainer.data.reader import SessionReader, Sessions
from trainer.inference.validation import sample_groups


def batch_options(**changes) -> BatchOptions:
    plain = {"holdout": 2, "tasks": ["like"], "exposures": True, "rows_per_session": 10**6, "salt": 0}
    return BatchOptions(**plain | changes)


def users_of(window, mine, step):
    return window.user_id[mine]


def order(reader, epoch=0, tokens=64, buffer=20) -> Order:
    return Order(reader.group_rows, 5, epoch, reader.dataset.manifest.fingerprint, tokens, buffer)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=200), st.integers(1, 200), st.integers(0, 5))
def test_batches_contain_each_session_once_with_about_equal_tokens(tokens, batch_tokens, window):
    tokens = np.array(tokens)
    batches = Order(np.array([len(tokens)]), 1, 2, "ab" * 20, batch_tokens, 10).batches(window, tokens)
    rows = np.concatenate([*batches, np.zeros(0, np.int64)])
    assert sorted(rows.tolist()) == np.flatnonzero(tokens > 0).tolist()
    for batch in batches:
        assert 0 < tokens[batch].sum() <= batch_tokens + 29


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_session_is_read_once_per_epoch_for_any_number_of_workers(fifty, world_size):
    reader = SessionReader(fifty, exposures=False, holdout=2)
    users = []
    for rank in range(world_size):
        batches = reader.epoch(order(reader), users_of, start=0, global_rank=rank, world_size=world_size)
        users += [int(u) for batch in batches for u in batch.data]
    assert sorted(users) == list(range(1, 51))


def test_order_is_reproducible_and_changes_with_the_epoch(fifty):
    reader = SessionReader(fifty, exposures=False, holdout=2)

    def users(o):
        return [int(u) for b in reader.epoch(o, users_of, start=0, global_rank=0, world_size=1) for u in b.data]

    assert users(order(reader)) == users(order(reader))
    assert users(order(reader)) != users(order(reader, epoch=1))


@pytest.mark.parametrize("change", [{"seed": 6}, {"epoch": 1}, {"fingerprint": "cd" * 20}])
def test_windows_and_batches_are_shuffled_by_seed_epoch_and_dataset(change):
    plain, tokens = Order(np.full(40, 10), 5, 0, "ab" * 20, 64, 20), np.arange(200) % 9 + 1
    other = replace(plain, **change)
    windows, others = ([window.tolist() for window in each.windows()] for each in (plain, other))
    assert windows != others
    for drawn in (windows, others):
        assert drawn != sorted(drawn)
        assert sorted(group for window in drawn for group in window) == list(range(40))
    batches, others = ([batch.tolist() for batch in each.batches(1, tokens)] for each in (plain, other))
    assert batches != others
    for drawn in (batches, others):
        lengths = [tokens[batch].mean() for batch in drawn]
        assert lengths not in (sorted(lengths), sorted(lengths)[::-1])


@pytest.mark.parametrize(("buffer", "groups"), [(1, [1] * 7), (20, [2, 2, 2, 1]), (21, [3, 3, 1]), (99, [7])])
def test_windows_are_complete_row_groups_with_at_least_the_sessions_of_the_buffer(buffer, groups):
    windows = Order(np.full(7, 10), 5, 0, "ab" * 20, 64, buffer).windows()
    assert [len(window) for window in windows] == groups


@pytest.mark.parametrize("worlds", [(1, 1), (2, 1), (2, 3), (1, 2)])
def test_resuming_with_another_number_of_workers_reads_the_rest_once(fifty, worlds):
    reader = SessionReader(fifty, exposures=False, holdout=2)

    def read(world, start, stop=None):
        users, end = [], start
        for rank in range(world):
            for batch in reader.epoch(order(reader), users_of, start=start, global_rank=rank, world_size=world):
                if stop is not None and batch.first_sample >= stop:
                    break
                users += batch.data.tolist()
                end = max(end, batch.first_sample + batch.samples)
        return users, end

    for stop in (1, 13, 37):
        first, position = read(worlds[0], 0, stop)
        rest, _ = read(worlds[1], position)
        assert sorted(first + rest) == list(range(1, 51))


def test_worker_shares_cover_a_batch_and_differ_by_at_most_one_session():
    batch = np.arange(10)
    shares = [share(batch, rank, 3) for rank in range(3)]
    assert sorted(np.concatenate(shares).tolist()) == batch.tolist()
    assert {len(p) for p in shares} <= {3, 4}


def all_rows(dataset) -> list[dict]:
    return [row for f in dataset.session_files for row in pq.read_table(dataset.file(f.path)).to_pylist()]


def all_sessions(dataset) -> Sessions:
    reader = SessionReader(dataset, exposures=True, holdout=2)
    return reader.read(np.arange(len(reader.groups)))


@pytest.mark.parametrize("holdout", [1, 2])
@pytest.mark.parametrize("exposures", [True, False])
def test_batch_equals_a_slow_reading_of_the_sessions(fifty, holdout, exposures):
    batch = train_batch(
        all_sessions(fifty), batch_options(holdout=holdout, tasks=["click", "like"], exposures=exposures)
    )
    width = batch.items.shape[1]
    wanted_rows = []
    for number, row in enumerate(all_rows(fifty)):
        n = len(row["items"])
        last_state = n - 1 - holdout
        assert batch.items[number].tolist() == row["items"][:last_state] + [0] * (width - last_state)
        assert batch.targets[number].tolist() == row["items"][1 : last_state + 1] + [0] * (width - last_state)
        shown = zip(row["exposure_items"], row["exposure_position"], row["exposure_feedback"], strict=True)
        if not exposures:
            shown = [
                (item, position, bits | 128)
                for position, (item, bits) in enumerate(zip(row["items"], row["feedback"], strict=True))
            ]
        wanted_rows += [
            (number * width + position - 1, item, float(bits >> 7 & 1), float(bits & 1))
            for item, position, bits in shown
            if 1 <= position <= last_state
        ]
    actual = zip(batch.row_state.tolist(), batch.row_item.tolist(), *batch.row_label.t().tolist(), strict=True)
    assert list(actual) == wanted_rows


def test_batches_do_not_contain_held_out_clicks_or_their_rows(fifty):
    """Changing every session's last clicks and all rows of the last two blocks makes no difference to training."""
    sessions = all_sessions(fifty)
    changed = all_sessions(fifty)
    last = changed.items.offset[1:] - 1
    values = changed.items.values.copy()
    values[last] = 1
    values[last - 1] = 2
    object.__setattr__(changed.items, "values", values)
    feedback = changed.feedback.values.copy()
    feedback[last] ^= 1
    feedback[last - 1] ^= 1
    object.__setattr__(changed.feedback, "values", feedback)
    late = changed.exposure_position.values >= np.repeat(changed.items.lengths - 2, changed.exposure_items.lengths)
    outcome = changed.exposure_feedback.values.copy()
    outcome[late] ^= 1
    object.__setattr__(changed.exposure_feedback, "values", outcome)
    for exposures in (True, False):
        batches = [
            train_batch(s, batch_options(exposures=exposures, skipped=3), targets_of(s, 2)) for s in (sessions, changed)
        ]
        for name in vars(batches[0]):
            assert (getattr(batches[0], name) == getattr(batches[1], name)).all(), name


def test_sampled_rows_do_not_depend_on_how_a_batch_is_split(fifty):
    sessions = all_sessions(fifty)

    def rows(s, salt):
        batch = train_batch(s, batch_options(rows_per_session=4, salt=salt))
        width = batch.items.shape[1]
        return {
            (int(s.user_id[i // width]), i % width, j)
            for i, j in zip(batch.row_state.tolist(), batch.row_item.tolist(), strict=True)
        }

    rows_once = rows(sessions, 1)
    halves = [rows(sessions.take(np.arange(len(sessions))[r::2]), 1) for r in range(2)]
    assert halves[0] | halves[1] == rows_once
    assert rows_once != rows(sessions, 2)
    everything = feedback_rows(sessions, exposures=True)
    assert len(rows_once) <= 4 * 50 < len(everything.item)


def test_positions_of_long_sessions_are_those_of_the_files(fifty):
    """Sessions may have a thousand clicks."""
    sessions = all_sessions(fifty)
    position = sessions.exposure_position
    late = replace(sessions, exposure_position=Ragged(position.offset, position.values + 900))
    assert feedback_rows(late, exposures=True).position.tolist() == (position.values + 900).tolist()


def test_sampled_prefixes_are_a_subset_of_targets_with_their_rows(fifty):
    sessions = all_sessions(fifty)
    everything, some = (train_batch(sessions, batch_options(prefixes=k, salt=7)) for k in (0, 3))
    has_target_BT = some.targets != 0
    assert torch.equal(some.targets[has_target_BT], everything.targets[has_target_BT])
    assert (has_target_BT.sum(1) == (everything.targets != 0).sum(1).clamp(max=3)).all()
    assert torch.equal(some.items, everything.items)
    has_target = has_target_BT.flatten()[everything.row_state]
    assert torch.equal(some.row_state, everything.row_state[has_target])
    assert torch.equal(some.row_item, everything.row_item[has_target])
    other = train_batch(sessions, batch_options(prefixes=3, salt=8))
    assert not torch.equal(other.targets, some.targets)


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_skipped_items_are_shown_with_a_target_and_not_clicked(fifty, limit):
    batch = train_batch(all_sessions(fifty), batch_options(skipped=limit))
    width, expected = batch.items.shape[1], {}
    for number, row in enumerate(all_rows(fifty)):
        shown = zip(row["exposure_items"], row["exposure_position"], row["exposure_feedback"], strict=True)
        for item, position, bits in shown:
            if 1 <= position <= len(row["items"]) - 3 and not bits & 128:
                expected.setdefault(number * width + position - 1, []).append(item)
    actual = {}
    for state, item, slot in zip(batch.skipped_state, batch.skipped_item, batch.skipped_slot, strict=True):
        assert int(slot) == len(actual.setdefault(int(state), []))
        actual[int(state)].append(int(item))
    assert actual.keys() == expected.keys()
    for state, items in actual.items():
        assert len(items) == min(limit, len(expected[state]))
        assert Counter(items) <= Counter(expected[state])


def test_sampled_rows_differ_between_users_seeds_and_kinds(fifty):
    """Users with the same rows: which are sampled depends on the user too."""
    sessions = all_sessions(fifty).take(np.zeros(40, np.int64))
    other = replace(sessions, user_id=np.arange(40))
    for options, name, of_row in (
        ({"rows_per_session": 4}, "row_item", "row_state"),
        ({"skipped": 1}, "skipped_item", "skipped_state"),
    ):
        chosen, again = (train_batch(other, batch_options(salt=salt, **options)) for salt in (1, 2))
        assert not torch.equal(getattr(chosen, name), getattr(again, name))
        session, items = getattr(chosen, of_row) // chosen.items.shape[1], getattr(chosen, name)
        assert len({tuple(items[session == user].tolist()) for user in range(40)}) > 1
    with_prefixes = train_batch(other, batch_options(prefixes=3)).targets
    assert len({tuple(row) for row in with_prefixes.tolist()}) > 1


@pytest.mark.parametrize(("holdout", "prefixes"), [(2, 0), (1, 0), (2, 3), (2, 29)])
def test_targets_counted_from_the_lengths_are_those_of_the_batches(fifty, holdout, prefixes):
    """Some sessions have more clicks than are kept."""
    reader = SessionReader(fifty, exposures=False, holdout=holdout, prefixes=prefixes)
    assert reader.read(range(len(reader.groups))).n_clicks.max() > fifty.manifest.max_clicks
    for group in range(len(reader.groups)):
        options = batch_options(holdout=holdout, prefixes=prefixes, tasks=[], exposures=False)
        batch = train_batch(reader.read([group]), options)
        assert reader.targets(group).tolist() == (batch.targets != 0).sum(1).tolist()


def test_targets_of_equals_the_targets_of_the_batch(fifty):
    sessions = all_sessions(fifty)
    for holdout in (1, 2):
        batch = train_batch(sessions, batch_options(holdout=holdout))
        assert targets_of(sessions, holdout).tolist() == batch.targets[batch.targets != 0].tolist()


def test_ranking_rows_have_the_last_ten_clicks_before_their_block(fifty):
    sessions = all_sessions(fifty)
    rows = feedback_rows(sessions, exposures=True)
    actual = block_rows(sessions, rows)
    users = np.unique(sessions.user_id)
    batch = rank_batch(actual, users, ["click", "follow"])
    slow = {row["user_id"]: row for row in all_rows(fifty)}
    for i in range(len(actual)):
        row = slow[int(actual.user_id[i])]
        seen = row["items"][: int(rows.position[i])][-10:]
        assert actual.history[i].tolist() == [0] * (10 - len(seen)) + seen
        assert users[batch.user[i] - 1] == row["user_id"]
        assert actual.profile[i].tolist() == [row["gender"], row["age"]]
    assert batch.label[:, 0].tolist() == [float(bits >> 7 & 1) for bits in rows.feedback.tolist()]
    assert batch.label[:, 1].tolist() == [float(bits >> 2 & 1) for bits in rows.feedback.tolist()]


def test_empty_share_of_a_batch_is_one_padding_session(fifty):
    sessions = all_sessions(fifty).take(np.zeros(0, np.int64))
    batch = train_batch(sessions, batch_options(skipped=2))
    assert batch.items.tolist() == batch.targets.tolist() == [[0]]
    assert len(batch.row_item) == 0


def test_prefetch_passes_on_elements_and_errors():
    def source():
        yield 1
        raise ValueError("broken shard")

    prefetched = iter(Prefetch(source()))
    assert next(prefetched) == 1
    with pytest.raises(ValueError, match="broken shard"):
        next(prefetched)


def test_validation_sample_is_spread_over_many_row_groups():
    """Users with adjacent ids are similar in real data: a few complete row groups would not be representative."""
    reader = SimpleNamespace(groups=range(400), dataset=SimpleNamespace(manifest=SimpleNamespace(fingerprint="f" * 64)))
    counts = np.full(400, 1_000)
    groups, _ = sample_groups(reader, counts, 10_000)
    assert 8 * 10_000 <= counts[groups].sum() < 9 * 10_000
    assert np.diff(groups).max() < 60
    assert len(sample_groups(reader, counts, 60_000)[0]) == 400
