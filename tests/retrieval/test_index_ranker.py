"""Ranks and lists against a slow ranking of all candidates."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from retrieval.item_lists import first_listed
from retrieval.metrics.ranking import MISS
from retrieval.popularity import Popularity
from retrieval.queries import Queries
from retrieval.rankers.index_ranker import rank_by_index, search_unseen
from retrieval.search.index import Catalogue, build_index


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
    vectors = rng.integers(-1, 2, (n_items, 3)).astype(np.float32)  # few values, so ties are common
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
                expected_rank = 1 + sum(s >= scores[target] for i, s in scores.items() if i != target and i not in seen)
                assert min(actual, 6) == min(expected_rank, 6)
            best = sorted((i for i in scores if i not in seen), key=lambda i: (-scores[i], i))[:5]
            assert [i for i in listed.tolist() if i] == best


def test_target_that_the_index_did_not_return_ranks_behind_the_returned_ones():
    """Item 1 is the best of ten, item 4 the fourth; the index lists six others, or all but the target."""
    catalogue = Catalogue(np.arange(1, 11, dtype=np.int32), np.arange(10, 0, -1, dtype=np.float32)[:, None])
    index = build_index("flat", catalogue)
    queries = replace(random_queries(np.random.default_rng(0), 10, 2, 1), target=np.array([1, 4], np.int32))
    queries.vector[:] = 1
    row = np.array([[4, 5, 6, 7, 8, 9], [0, 1, 2, 4, 5, 6]])
    index.faiss_index = SimpleNamespace(search=lambda query, k: (None, row[:, :k]))
    rank, _ = rank_by_index(index, queries, 5, mask_seen=False)
    assert (rank > 5).all()


def test_masking_falls_back_to_exact_search_if_the_index_lists_too_few():
    """A single list of few candidates is probed, and the query has seen most of them."""
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
    index.set_search_effort(1)
    assert (index.search(queries.vector, 60)[1] < 0).any()
    _, listed = search_unseen(index, queries, 10)
    exact = np.argsort(-(vectors.astype(np.float64) @ np.ones(2)), kind="stable") + 1
    assert first_listed(listed, 10)[0].tolist() == [i for i in exact.tolist() if i > 38][:10]
