"""Exact search, indexes and their fidelity, without bundles."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.search import exact
from retrieval.search.index import KINDS, SPACES, Catalogue, build_index, choose_kind
from retrieval.search.tuning import ExactReference, compare_spaces, measure, tune


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("space", ["inner_product", "augmented"])
def test_tuning_reaches_the_requested_fidelity_and_full_effort_is_exact(kind, space):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(3000, 16)).astype(np.float32) * rng.lognormal(0, 0.5, (3000, 1)).astype(np.float32)
    catalogue = Catalogue(np.arange(1, 3001, dtype=np.int32), vectors)
    query, target = rng.normal(size=(200, 16)).astype(np.float32), rng.integers(1, 3001, 200)
    reference = ExactReference.of(catalogue, query, target)
    index = build_index(kind, catalogue, space)
    curve = list(tune(index, reference, 0.95))
    assert curve[-1][1].recall >= 0.95
    assert all(actual.recall < 0.95 for _, actual in curve[:-1])
    if kind != "hnsw":  # a graph may have nodes that no search effort reaches
        index.set_search_effort(index.max_search_effort, len(vectors))
        assert measure(index, reference).recall == 1.0
        score, _ = index.search(query, 20)
        expected = np.sort(query.astype(np.float64) @ vectors.astype(np.float64).T, axis=1)[:, ::-1][:, :20]
        assert score == pytest.approx(expected, abs=1e-9)


@given(st.data())
@settings(max_examples=60)
def test_exact_search_equals_a_full_sort(data):
    """Blocks smaller than the problem, many ties, and sometimes k above the number of items."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    items, queries, k = (data.draw(st.integers(low, high)) for low, high in ((1, 60), (0, 12), (1, 9)))
    vectors, query = rng.integers(-2, 3, (items, 3)).astype("f"), rng.integers(-2, 3, (queries, 3)).astype("f")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "QUERIES_AT_ONCE", 5)
        patch.setattr(exact, "ITEMS_AT_ONCE", 7)
        score, row = exact.search_exact(vectors, query, k)
    whole = query @ vectors.T
    for q in range(queries):
        best = np.sort(whole[q])[::-1][:k]
        assert score[q, : len(best)].tolist() == best.tolist()
        assert (row[q, len(best) :] == -1).all()
        listed = row[q, : len(best)]
        assert len(set(listed.tolist())) == len(listed)
        assert whole[q, listed].tolist() == best.tolist()
        assert listed.tolist() == sorted(listed.tolist(), key=lambda r: (-whole[q, r], r))


def test_long_vector_whose_score_rounding_hides_is_listed():
    score = np.linspace(0.5, 0.1, 40)
    vector = np.stack([np.zeros(40), score, np.zeros(40)], axis=1).astype("f")
    vector[7] = 1e8, 1, -1e8  # its score is 1, in float32 0
    query = np.ones((3, 3), "f")
    actual, row = exact.search_ordered(vector, query, 3)
    assert row.tolist() == [[7, 0, 1]] * 3
    assert actual[0] == pytest.approx([1.0, *score[:2]])


def test_ordered_search_equals_a_full_sort_in_float64_for_vectors_of_all_lengths():
    rng = np.random.default_rng(0)
    length = 2.0 ** rng.integers(0, 27, 300)
    vector = np.stack([length, rng.permutation(300) / 256, -length], axis=1).astype("f")  # exact in float64
    query = np.stack([np.ones(20), 2.0 ** rng.integers(-3, 4, 20), np.ones(20)], axis=1).astype("f")
    expected = query.astype(np.float64) @ vector.astype(np.float64).T
    score, row = exact.search_ordered(vector, query, 5)
    assert row.tolist() == np.argsort(-expected, axis=1)[:, :5].tolist()
    assert score.tolist() == np.sort(expected, axis=1)[:, ::-1][:, :5].tolist()


@pytest.mark.parametrize("most", [4_096, 6])
def test_equal_scores_are_listed_by_rising_row_despite_rounding_of_products(most, monkeypatch):
    """Few distinct vectors, each in many rows, in blocks of odd sizes; some products differ only in the last bit."""
    monkeypatch.setattr(exact, "ITEMS_AT_ONCE", 37)
    monkeypatch.setattr(exact, "MAX_CONTENDERS", most)
    rng = np.random.default_rng(0)
    vector = rng.normal(size=(12, 33)).astype(np.float32)[rng.integers(0, 12, 500)]
    query = rng.normal(size=(70, 33)).astype(np.float32)
    query[:3] = 0  # all scores equal
    query[3:6] *= 1e20
    every = exact.rescore(vector, query, np.tile(np.arange(500), (70, 1)))
    for k in (1, 5, 20, 499, 500, 600):
        score, row = exact.search_ordered(vector, query, k)
        order = np.lexsort((np.tile(np.arange(500), (70, 1)), -every), axis=1)[:, :k]
        if most > 500:
            assert np.array_equal(row[:, :500], order)
        assert np.array_equal(score[:, :500], np.take_along_axis(every, order, 1))
        assert (row[:, 500:] == -1).all()


def test_scores_that_differ_by_less_than_their_rounding_are_ordered_exactly():
    """Each vector differs from another in a few last bits, so that float32 products are in another order."""
    rng = np.random.default_rng(0)
    vector = np.repeat(rng.normal(size=(1, 64)), 300, axis=0) + rng.normal(size=(300, 64)) * 1e-7
    vector, query = vector.astype(np.float32), rng.normal(size=(40, 64)).astype(np.float32)
    every = exact.rescore(vector, query, np.tile(np.arange(300), (40, 1)))
    assert not np.array_equal(np.argsort(-every, kind="stable")[:, :5], exact.search_exact(vector, query, 5)[1])
    score, row = exact.search_ordered(vector, query, 5)
    assert np.array_equal(row, np.lexsort((np.tile(np.arange(300), (40, 1)), -every), axis=1)[:, :5])
    assert np.array_equal(score, np.take_along_axis(every, row, 1))


def test_recall_of_each_vector_space_is_a_share_of_the_exact_neighbours():
    """A few long vectors draw most queries in inner product space, where lists are probed by inner product too."""
    rng = np.random.default_rng(0)
    vector = rng.normal(size=(2_000, 8)).astype(np.float32)
    catalogue, query = Catalogue(np.arange(1, 2_001, dtype=np.int32), vector), rng.normal(size=(50, 8)).astype("f")
    expected, nearest = {}, np.argsort(-(query @ vector.T), axis=1)[:, :20]
    for space in SPACES:
        index, found = build_index("ivf_flat", catalogue, space), []
        for probes in (1, 4, 16):
            index.set_search_effort(probes)
            listed = index.search(query, 20)[1]
            found += [len(set(a) & set(b)) / 20 for a, b in zip(nearest.tolist(), listed.tolist(), strict=True)]
        expected[space] = np.mean(found)
    assert compare_spaces(catalogue, query) == pytest.approx(expected)
    assert 0.2 < expected["inner_product"] < 1


def test_fidelity_matches_hand_computation():
    catalogue = Catalogue(np.arange(1, 41, dtype=np.int32), np.arange(40, dtype=np.float32)[:, None])
    reference = ExactReference.of(catalogue, np.ones((4, 1), np.float32), np.array([40, 21, 20, 30]))

    class Half:
        """Lists the ten best candidates and ten bad ones."""

        def search(self, query, k):
            row = np.concatenate([np.arange(39, 29, -1), np.arange(k - 10)])
            return None, np.tile(row, (len(query), 1))

    index = build_index("flat", catalogue)
    index.faiss_index = Half()
    actual = measure(index, reference)
    assert actual.recall == 0.5
    assert (actual.exact_hits, actual.hr_ratio) == (3, pytest.approx(1 / 3))  # of 40, 21 and 30 only 40 is listed
    assert actual.hr_ratio_low == pytest.approx(0.0615, abs=1e-4)  # Wilson's interval of 1 in 3


def test_items_tied_with_the_last_exact_neighbour_count_as_found():
    """Ten items score 2 and thirty score 1: any ten of the thirty complete the twenty best."""
    vector = np.repeat(np.float32([2, 1]), (10, 30))[:, None]
    catalogue = Catalogue(np.arange(1, 41, dtype=np.int32), vector)
    reference = ExactReference.of(catalogue, np.ones((3, 1), np.float32), np.array([5, 12, 40]))
    index = build_index("flat", catalogue)
    for rows, recall, ratio in (
        ([*range(10), *range(30, 40)], 1.0, 1.0),  # exact search lists the tied items with the lowest ids
        ([*range(5, 10), *range(25, 40)], 0.75, 2 / 3),  # five of score 2 are missing, item 5 among them
        ([*range(10), *[-1] * 10], 0.5, 1 / 3),
    ):
        listed = np.tile(np.array(rows), (3, 1))
        index.faiss_index = SimpleNamespace(search=lambda query, k, listed=listed: (None, listed))
        actual = measure(index, reference)
        assert (actual.exact_hits, actual.recall, actual.hr_ratio) == (3, recall, pytest.approx(ratio))
        assert actual.recall_low == actual.recall_high == recall


def test_auto_kind_follows_from_size_queries_and_memory():
    assert choose_kind("auto", 100_000, 10_000, 64) == "flat"
    assert choose_kind("auto", 3_750_000, 5_000_000, 64) == "ivf_flat"
    assert choose_kind("auto", 3_750_000, 5_000_000, 64, memory_gib=0.5) == "ivf_sq8"
    assert choose_kind("auto", 3_750_000, 5_000_000, 64, memory_gib=0.1) == "ivf_pq_refine"
    assert choose_kind("hnsw", 10, 10, 4) == "hnsw"
