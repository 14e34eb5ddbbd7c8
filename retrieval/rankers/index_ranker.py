"""Ranks the targets of a batch of queries by the model's vectors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from etl.runtime.errors import InputError
from retrieval.item_lists import first_listed, seen_among
from retrieval.metrics.ranking import MISS, rank_among
from retrieval.queries import Queries
from retrieval.search.exact import rescore
from retrieval.search.index import Index
from retrieval.sources.sparse_rows import entries_at


def check_targets(queries: Queries) -> None:
    """Raise `InputError` if the target of a valid or test query is padding."""
    if len(queries) and queries.target.min() < 1:
        raise InputError("targets that are items", "padding (0)", "export the bundle again")


def rank_by_index(
    index: Index, queries: Queries, deepest: int, *, mask_seen: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.integer]]:
    """Ranks of the targets and the top `deepest` candidates.

    `deepest` + 1 candidates decide every rank up to `deepest`, including ties; masked candidates are
    searched in addition.
    """
    score, listed = (
        search_unseen(index, queries, deepest + 1) if mask_seen else search_items(index, queries, deepest + 1)
    )
    target_row = index.catalogue.rows_of(queries.target)
    target_score = rescore_targets(index, queries, target_row)
    rank = rank_among(score, listed, queries.target, target_score)
    # A target that the index did not return ranks behind all returned ones, whatever its score.
    lost = (listed != queries.target[:, None]).all(axis=1)
    rank[lost] = np.maximum(rank[lost], deepest + 1)
    rank[target_row < 0] = MISS
    if mask_seen:
        rank[queries.is_repeat] = MISS
    return rank, first_listed(listed, deepest)


def search_items(index: Index, queries: Queries, k: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.integer]]:
    """The `k` best candidates of each query: float64 scores and dense ids `[Q, k]`, padded with 0."""
    score, row = index.search(queries.vector, k)
    item = np.where(row >= 0, index.catalogue.item[row], 0)
    term = index.catalogue.transition_term(queries)
    if term is None:
        return score, item
    return index.catalogue.join_term(term, queries.vector, score, item, k)


def search_unseen(index: Index, queries: Queries, k: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.integer]]:
    """The unseen candidates of each query, best first, at least `k` if there are as many.

    Searches k + n candidates, n the longest session, of which at most n are seen, so the list is complete. An index may
    return fewer than requested; queries left with fewer than k, although the catalogue has more, are searched exactly.
    """
    longest = int(queries.n_seen.max(initial=0))
    score, listed = search_items(index, queries, k + longest)
    listed[seen_among(queries, listed)] = 0
    if index.faiss_index is not None:
        unseen = np.count_nonzero(listed, axis=1)
        short = np.flatnonzero((unseen < k) & (unseen < len(index.catalogue.item) - queries.n_seen))
        if len(short):
            again = queries.take(short)
            exact = Index("flat", index.catalogue, None, 0.0)
            exact_score, exact_items = search_items(exact, again, k + longest)
            exact_items[seen_among(again, exact_items)] = 0
            score[short], listed[short] = -np.inf, 0
            n_listed = exact_items.shape[1]
            score[short, :n_listed], listed[short, :n_listed] = exact_score, exact_items
    return score, listed


def rescore_targets(index: Index, queries: Queries, target_row: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Float64 score of each target, -inf if it is not a candidate."""
    score = rescore(index.catalogue.vector, queries.vector, target_row[:, None])[:, 0]
    term = index.catalogue.transition_term(queries)
    return score if term is None else score + entries_at(term, np.arange(len(queries)), queries.target)
