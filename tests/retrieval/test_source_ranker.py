"""Co-occurrence baselines against slow references, one query at a time."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.item_lists import is_among
from retrieval.metrics.ranking import MISS
from retrieval.popularity import CategoryPopularity, Popularity
from retrieval.queries import Queries
from retrieval.rankers.source_ranker import SourceRanker
from retrieval.sources import scores as source_scores
from retrieval.sources import sparse_rows, stan
from retrieval.sources.counts import cosine_lists, successor_lists
from retrieval.sources.scores import ItemKNNScores, SuccessorScores, VSkNNScores, last_item, repeats
from retrieval.sources.sessions import TrainSessions, rows_of_users

N_ITEMS = 9
NEIGHBOURS = 3
GAPS, RULES = 4, 3
sequences = st.lists(st.integers(1, N_ITEMS), min_size=1, max_size=7)


def train_sessions(histories: list[list[int]]) -> TrainSessions:
    offset = np.cumsum([0, *map(len, histories)])
    items = np.array([item for history in histories for item in history], np.int32)
    return TrainSessions(np.arange(len(histories)) * 10, offset.astype(np.int64), items, N_ITEMS)


def queries_of(histories: list[list[int]], users: list[int], targets: list[int]) -> Queries:
    offset = np.cumsum([0, *map(len, histories)]).astype(np.int64)
    seen = np.array([item for history in histories for item in history], np.int32)
    n = len(histories)
    return Queries(
        np.array(users, np.int64),
        np.array(targets, np.int32),
        offset,
        seen,
        np.ones(n, np.int32),
        np.zeros((n, 2), np.float32),
    )


def slow_markov(train: dict[int, list[int]], user: int, seen: list[int]) -> dict[int, float]:
    actual = Counter(b for history in train.values() for a, b in itertools.pairwise(history) if a == seen[-1])
    return dict(actual)


def slow_sequential_rules(train: dict[int, list[int]], user: int, seen: list[int]) -> dict[int, float]:
    actual = defaultdict(Fraction)
    for history in train.values():
        for (i, a), (j, b) in itertools.combinations(enumerate(history), 2):
            if a == seen[-1] and j - i <= GAPS:
                actual[b] += Fraction(1, j - i)
    best = sorted(actual, key=lambda item: (-actual[item], item))[:RULES]
    return {item: float(actual[item]) for item in best}


def slow_repeats(train: dict[int, list[int]], user: int, seen: list[int]) -> dict[int, float]:
    return {item: 1 / (len(seen) - position) for position, item in enumerate(seen)}


def slow_item_knn(train: dict[int, list[int]], user: int, seen: list[int]) -> dict[int, float]:
    n = Counter(item for history in train.values() for item in set(history))
    actual = defaultdict(float)
    for i in set(seen):
        cosine = {
            j: sum({i, j} <= set(history) for history in train.values()) / math.sqrt(max(n[i], 1) * n[j])
            for j in n
            if j != i
        }
        nearest = sorted(cosine, key=lambda j: (-np.float32(cosine[j]), j))[:NEIGHBOURS]
        for j in nearest:
            actual[j] += cosine[j]
    return actual


def slow_v_sknn(train: dict[int, list[int]], user: int, seen: list[int]) -> dict[int, float]:
    position = {item: number for number, item in enumerate(seen, 1)}  # the later of two clicks
    similar = []
    for other, history in train.items():
        shared = set(seen) & set(history)
        if other != user and shared:
            similarity = sum(Fraction(position[i], len(seen)) for i in shared)
            steps_back = len(seen) - max(position[i] for i in shared)
            similar.append((similarity, other, max(1 - steps_back / 10, 1e-9)))
    similar.sort(key=lambda entry: (-entry[0], entry[1]))
    actual = defaultdict(float)
    for similarity, other, late in similar[:NEIGHBOURS]:
        for item in set(train[other]):
            actual[item] += float(similarity) * late
    return actual


def slow_stan(train: dict[int, list[int]], user: int, seen: list[int]) -> dict[int, float]:
    seen = seen[-stan.CLICKS :]
    back = {item: len(seen) - number for number, item in enumerate(seen, 1)}  # the later of two clicks
    times = Counter(item for history in train.values() for item in history)
    idf = {item: np.float32(np.log1p(len(train) / max(times[item], 1))) for item in seen}
    similar = []
    for other, history in train.items():
        shared = set(seen) & set(history)
        if other != user and shared:
            similarity = np.float32(0)
            for item in sorted(shared):  # float32, in one order: ties are ties
                similarity += np.float32(np.exp(-back[item] / stan.RECENCY) * idf[item])
            similar.append((similarity, other, min(shared, key=lambda item: back[item])))
    similar.sort(key=lambda entry: (-entry[0], entry[1]))
    actual = defaultdict(float)
    for similarity, other, latest in similar[:NEIGHBOURS]:
        history = train[other]
        at = len(history) - 1 - history[::-1].index(latest)
        for position, item in enumerate(history):
            decay = math.exp(-abs(position - at) / stan.NEARNESS) * (stan.BEFORE if position < at else 1.0)
            actual[item] += float(similarity) * (1 - back[latest] / stan.CLICKS) * decay
    return actual


def slow_last_item(train: dict[int, list[int]], user: int, seen: list[int]) -> dict[int, float]:
    return {seen[-1]: 1.0}


METHODS = {
    "last_item": (lambda sessions: last_item(sessions.n_items), slow_last_item),
    "repeats": (lambda sessions: repeats(sessions.n_items), slow_repeats),
    "markov": (lambda sessions: SuccessorScores(successor_lists(sessions, 1, N_ITEMS)), slow_markov),
    "sequential_rules": (
        lambda sessions: SuccessorScores(successor_lists(sessions, GAPS, RULES)),
        slow_sequential_rules,
    ),
    "item_knn": (lambda sessions: ItemKNNScores(cosine_lists(sessions, NEIGHBOURS)), slow_item_knn),
    "v_sknn": (lambda sessions: VSkNNScores.of(sessions, NEIGHBOURS), slow_v_sknn),
    "stan": (
        lambda sessions: stan.Stan.of(sessions, VSkNNScores.of(sessions, NEIGHBOURS).of_item, NEIGHBOURS),
        slow_stan,
    ),
}


@pytest.mark.parametrize("name", list(METHODS))
@given(
    histories=st.lists(sequences, min_size=1, max_size=8),
    asked=st.lists(st.tuples(sequences, st.integers(0, 9)), min_size=1, max_size=4),
)
@settings(max_examples=80)
def test_source_scores_equal_a_slow_reference(name, histories, asked):
    fast, slow = METHODS[name]
    train = {10 * number: history for number, history in enumerate(histories)}
    users = [10 * number for _, number in asked]  # some have a session among the train sessions
    queries = queries_of([seen for seen, _ in asked], users, [1] * len(asked))
    actual = fast(train_sessions(histories))(queries).toarray()
    for row, (seen, _) in enumerate(asked):
        expected = np.zeros(N_ITEMS + 1)
        for item, value in slow(train, users[row], seen).items():
            expected[item] = value
        assert actual[row] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("longest", [0, source_scores.LONGEST_TOGETHER])
@pytest.mark.parametrize("steps", [8, 9, 10, 11])
def test_v_sknn_gives_a_click_ten_steps_back_hardly_any_weight(steps, longest, monkeypatch):
    """The click on 1 is this many steps before the last of the query."""
    monkeypatch.setattr(source_scores, "LONGEST_TOGETHER", longest)
    seen, train = [1, *([2, 3] * steps)[:steps]], [[1, 4]]
    expected = slow_v_sknn({0: train[0]}, 99, seen)
    actual = VSkNNScores.of(train_sessions(train), NEIGHBOURS)(queries_of([seen], [99], [5])).toarray()[0]
    assert actual[[1, 4]] == pytest.approx([expected[1], expected[4]], rel=1e-5)


@pytest.mark.parametrize("mask_seen", [False, True])
@given(data=st.data())
@settings(max_examples=80)
def test_ranks_and_lists_equal_a_full_sort(mask_seen, data):
    histories = data.draw(st.lists(sequences, min_size=2, max_size=6))
    asked = data.draw(st.lists(st.tuples(sequences, st.integers(1, N_ITEMS)), min_size=1, max_size=5))
    candidates = np.array(sorted(data.draw(st.sets(st.integers(1, N_ITEMS), min_size=1))))
    clicks = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(candidates), max_size=len(candidates))))
    queries = queries_of([seen for seen, _ in asked], [99] * len(asked), [target for _, target in asked])
    scores = SuccessorScores(successor_lists(train_sessions(histories), 1, N_ITEMS))
    ranker = SourceRanker(scores, Popularity(candidates, clicks))
    k = data.draw(st.integers(1, 6))
    rank, lists = ranker.rank(queries, k, mask_seen=mask_seen)
    dense, popular = scores(queries).toarray(), dict(zip(candidates.tolist(), clicks.tolist(), strict=True))
    for row, (seen, target) in enumerate(asked):
        usable = [c for c in popular if not (mask_seen and c in seen)]
        key = {c: (dense[row, c], popular[c]) for c in usable}
        expected = 1 + sum(key[c] >= key[target] for c in usable if c != target) if target in key else MISS
        assert rank[row] == expected
        best = sorted(usable, key=lambda c: (-dense[row, c], -popular[c], c))[:k]
        assert lists[row].tolist() == best + [0] * (k - len(best))


@pytest.mark.parametrize("mask_seen", [False, True])
@given(data=st.data())
@settings(max_examples=80)
def test_category_popularity_equals_a_full_sort(mask_seen, data):
    asked = data.draw(st.lists(st.tuples(sequences, st.integers(1, N_ITEMS)), min_size=1, max_size=5))
    candidates = np.array(sorted(data.draw(st.sets(st.integers(1, N_ITEMS), min_size=1))))
    clicks = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(candidates), max_size=len(candidates))))
    category = np.array([0, *data.draw(st.lists(st.integers(0, 2), min_size=N_ITEMS, max_size=N_ITEMS))], np.int32)
    queries = queries_of([seen for seen, _ in asked], [99] * len(asked), [target for _, target in asked])
    k = data.draw(st.integers(1, 6))
    ranker = CategoryPopularity(Popularity(candidates, clicks), category)
    rank, lists = ranker.rank(queries, k, mask_seen=mask_seen)
    popular = dict(zip(candidates.tolist(), clicks.tolist(), strict=True))
    for row, (seen, target) in enumerate(asked):
        usable = [c for c in popular if not (mask_seen and c in seen)]
        key = {c: (category[c] == category[seen[-1]], popular[c]) for c in usable}
        expected = 1 + sum(key[c] >= key[target] for c in usable if c != target) if target in key else MISS
        assert rank[row] == expected
        best = sorted(usable, key=lambda c: (not key[c][0], -popular[c], c))[:k]
        assert lists[row].tolist() == best + [0] * (k - len(best))


@given(
    histories=st.lists(sequences, min_size=1, max_size=8),
    asked=st.lists(st.lists(st.integers(1, N_ITEMS), min_size=1, max_size=30), min_size=1, max_size=4),
)
@settings(max_examples=40)
def test_long_and_short_query_code_paths_find_the_same_neighbour_sessions(histories, asked):
    """Above `LONGEST_TOGETHER` clicks, positions and latest shared clicks are summed separately."""
    queries = queries_of(asked, [999] * len(asked), [1] * len(asked))
    near = VSkNNScores.of(train_sessions(histories), NEIGHBOURS)
    together = near(queries).toarray()
    with mock.patch.object(source_scores, "LONGEST_TOGETHER", 0):
        assert np.array_equal(near(queries).toarray(), together)


def test_packed_position_sums_of_the_longest_query_are_exact_in_float32():
    n, step = source_scores.LONGEST_TOGETHER, 1 << source_scores.DECAY_STEPS
    values = [place * step + (step >> 1 >> n - place) for place in range(1, n + 1)]
    total = np.float32(0)
    for value in values:
        total += np.float32(value)
    assert int(total) == sum(values) < 1 << 24


@given(rows=st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=5), k=st.integers(1, 6))
@pytest.mark.parametrize("cells", [0, 1 << 21])
def test_k_largest_values_of_a_row_equal_a_full_sort(cells, rows, k):
    value = np.array([v for row in rows for v in row], np.int32)
    column = np.array([c for row in rows for c in range(len(row), 0, -1)], np.int32)
    indptr = np.cumsum([0, *map(len, rows)])
    with mock.patch.object(sparse_rows, "CELLS_AT_ONCE", cells):
        least = sparse_rows.kth_largest_count(value, indptr, k)
    for row, value_of_kth in zip(rows, least.tolist(), strict=True):
        assert value_of_kth == sorted(row)[-k] if len(row) > k else value_of_kth <= min(row, default=0)
    actual = sparse_rows.entries_of_largest(value, column, indptr, k, least).tolist()
    expected = []
    for begin, end in itertools.pairwise(indptr.tolist()):
        best = sorted(range(begin, end), key=lambda i: (-value[i], column[i]))[:k]
        expected += sorted(best)
    assert actual == expected


@pytest.mark.parametrize("n", [0, 3, 5_000, 300_000])
def test_is_among_equals_numpy_isin(n):
    rng = np.random.default_rng(n)
    value, rising = rng.integers(0, 1 << 40, n), np.sort(rng.integers(0, 1 << 40, 900))
    value[::7] = rng.choice(rising, len(value[::7]))
    assert np.array_equal(is_among(value, rising), np.isin(value, rising))
    assert not is_among(value, rising[:0]).any()


def test_sampled_sessions_of_popular_items_estimate_the_full_scores(monkeypatch):
    """Sessions are in the order of their second item, so that the first of them would be no sample."""
    rng = np.random.default_rng(0)
    histories = sorted([1, *rng.choice(np.arange(2, N_ITEMS + 1), 2, replace=False)] for _ in range(3_000))
    sessions, queries = train_sessions(histories), queries_of([[1]], [5], [2])
    actual = []
    for most in (10_000, 1_000):
        monkeypatch.setattr(source_scores, "SESSIONS_PER_ITEM", most)
        actual.append(VSkNNScores.of(sessions, 10_000)(queries).toarray()[0])
    assert actual[0][1] == 3_000
    assert actual[1][1] == 1_000
    assert actual[1][2:] / 1_000 == pytest.approx(actual[0][2:] / 3_000, rel=0.15)


def test_train_sessions_contain_no_valid_or_test_click(fifty):
    import pyarrow.parquet as pq

    sessions = TrainSessions.of(fifty)
    slow = {
        r["user_id"]: r["items"] for f in fifty.session_files for r in pq.read_table(fifty.file(f.path)).to_pylist()
    }
    assert sessions.user_id.tolist() == sorted(slow)
    for row, user in enumerate(sessions.user_id.tolist()):
        assert sessions.items[sessions.offset[row] : sessions.offset[row + 1]].tolist() == slow[user][:-2]
    assert rows_of_users(sessions.user_id, np.array([1, 50, 999])).tolist() == [0, 49, -1]


@pytest.mark.parametrize("order", itertools.permutations(("markov", "sequential_rules", "item_knn", "v_sknn", "stan")))
def test_baselines_do_not_modify_shared_sessions(order):
    """All permutations and their prefixes, so every subset in every order: each baseline gives its scores alone."""
    histories = [[1, 2, 2, 3, 1], [2, 2, 4], [4, 1, 2, 1], [5, 5, 5, 2], [3, 4, 2, 4]]  # repeats, which SciPy sums
    queries = queries_of([[1, 2], [4], [5, 2, 2]], [0, 10, 99], [3, 1, 4])
    shared = train_sessions(histories)
    for end in range(1, len(order) + 1):
        built = {name: METHODS[name][0](shared) for name in order[:end]}
        for name, scores in built.items():
            alone = METHODS[name][0](train_sessions(histories))(queries).toarray()
            assert np.array_equal(scores(queries).toarray(), alone), name
    assert shared.items.tolist() == [item for history in histories for item in history]
    for array in (shared.items, shared.offset, shared.user_id):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 9


numbers = st.one_of(st.integers(0, 5).map(float), st.floats(-(2.0**126), 2.0**126, width=32), st.just(-math.inf))
rows_of_values = st.lists(st.lists(numbers, max_size=40), min_size=1, max_size=6)


@given(rows=rows_of_values, k=st.integers(1, 4), levels=st.integers(2, 20))
@settings(max_examples=300)
def test_kth_largest_by_levels_equals_a_sort(rows, k, levels):
    value = np.array([v for row in rows for v in row], np.float32)
    indptr = np.cumsum([0, *map(len, rows)])
    expected = [np.sort(np.float32(row))[-k] if len(row) > k else -math.inf for row in rows]
    for many in (0, 10**9):  # always by levels, and never
        with mock.patch.multiple(sparse_rows, LEVELS=levels, MANY=many):
            assert sparse_rows.kth_largest(value, indptr, k).tolist() == [float(v) for v in expected]


@given(histories=st.lists(sequences, min_size=1, max_size=4), n=st.integers(1, 8))
def test_latest_keeps_the_last_n_clicks_of_each_query(histories, n):
    queries = queries_of(histories, list(range(len(histories))), [1] * len(histories)).latest(n)
    parts = np.split(queries.seen, queries.seen_offset[1:-1])
    assert [part.tolist() for part in parts] == [history[-n:] for history in histories]
