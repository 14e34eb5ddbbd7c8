"""Popularity of items, overall and by category, and their rates of feedback."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from etl.dataset import CLICKED, TRAIN_HOLDOUT, Dataset, feedback_labels
from retrieval.item_lists import first_listed, seen_among
from retrieval.metrics.ranking import MISS
from retrieval.queries import Queries
from retrieval.ragged import index_in_group

RATE_ROWS = 20.0
"""Pseudo-count of rows at the mean rate, to smooth each item's rate."""


class Popularity:
    """Scores items by train clicks, the same for all queries.

    Args:
        item: dense ids of the candidates, sorted, `[C]`.
        train_clicks: their train clicks `[C]`.
        n_items: number of items of the dataset; default: the last candidate's id.
    """

    def __init__(
        self, item: npt.NDArray[np.integer], train_clicks: npt.NDArray[np.integer], n_items: int | None = None
    ) -> None:
        self.clicks = np.full(int(item.max(initial=0)) + 1, -1, np.int64)
        self.clicks[item] = train_clicks
        self.negated_clicks = np.sort(-train_clicks)  # ascending, for binary search
        self.best_first = item[np.lexsort((item, -train_clicks))]
        self.n_items = n_items or len(self.clicks) - 1

    @classmethod
    def of(cls, dataset: Dataset, item: npt.NDArray[np.integer]) -> Popularity:
        """From the candidates `item` of a dataset."""
        clicks = dataset.items(["train_clicks"])["train_clicks"].to_numpy()
        return cls(item, clicks[item - 1], dataset.manifest.n_items)

    def ranks(self, queries: Queries, *, mask_seen: bool) -> npt.NDArray[np.int64]:
        """Rank of each target: the number of candidates, including itself, with at least as many train clicks."""
        clicks = self.clicks_of(queries.target)
        rank = np.searchsorted(self.negated_clicks, -clicks, side="right").astype(np.int64)
        if mask_seen:
            query = np.repeat(np.arange(len(queries)), queries.n_seen)
            once = _distinct(query, queries.seen)
            seen_clicks = self.clicks_of(queries.seen[once])
            above = seen_clicks >= clicks[query[once]]
            rank -= np.bincount(query[once][above], minlength=len(queries))
            rank[queries.is_repeat] = MISS
        rank[clicks < 0] = MISS
        return rank

    def lists(self, queries: Queries, k: int, *, mask_seen: bool) -> npt.NDArray[np.integer]:
        """The `k` most popular candidates for each query `[Q, k]`, padded with 0."""
        out = np.zeros((len(queries), k), self.best_first.dtype)
        if not mask_seen:
            out[:, : len(self.best_first)] = self.best_first[:k]
            return out
        deep = np.tile(self.best_first[: k + int(queries.n_seen.max(initial=0))], (len(queries), 1))
        deep[seen_among(queries, deep)] = 0
        left = first_listed(deep, k)
        out[:, : left.shape[1]] = left
        return out

    def clicks_of(self, item_N: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Train clicks of items, -1 for items that are not candidates."""
        inside = item_N < len(self.clicks)
        return np.where(inside, self.clicks[np.where(inside, item_N, 0)], -1)


def item_rates(dataset: Dataset, tasks: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
    """Smoothed share of positives among each item's train exposures, by task: float32 `[n_items + 1]`.

    Smoothed with `RATE_ROWS` pseudo-rows at the overall rate. Without exposures, the rows are the retained clicks.
    Rows of scenario `ctr` give no rates.
    """
    size = dataset.manifest.n_items + 1
    rows, positives = np.zeros(size), {task: np.zeros(size) for task in tasks}
    if not dataset.session_files:
        return {}
    shown = dataset.shows_exposures
    columns = ["items", "exposure_items", "exposure_position", "exposure_feedback"] if shown else ["items", "feedback"]
    for entry in dataset.session_files:
        with pq.ParquetFile(dataset.file(entry.path)) as file:
            for group in range(file.num_row_groups):
                item, feedback = _train_rows(file.read_row_group(group, columns=columns), shown=shown)
                rows += np.bincount(item, minlength=size)
                for task, count in positives.items():
                    count += np.bincount(item, weights=feedback_labels(feedback, task), minlength=size)
    out = {}
    for task, count in positives.items():
        mean = count.sum() / max(rows.sum(), 1.0)
        out[task] = ((count + RATE_ROWS * mean) / (rows + RATE_ROWS)).astype(np.float32)
    return out


def _train_rows(table: pa.Table, *, shown: bool) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
    """Item and outcome bits of the rows of train blocks (positions 1..n-3)."""
    lists = {name: table[name].combine_chunks() for name in table.column_names}
    n_clicks = np.diff(lists["items"].offsets.to_numpy())
    if not shown:
        index = index_in_group(n_clicks)
        train = (index > 0) & (index < np.repeat(n_clicks - TRAIN_HOLDOUT, n_clicks))
        feedback = lists["feedback"].flatten().to_numpy().astype(np.int16) | CLICKED
        return lists["items"].flatten().to_numpy()[train], feedback[train]
    last = np.repeat(n_clicks - TRAIN_HOLDOUT, np.diff(lists["exposure_items"].offsets.to_numpy()))
    position = lists["exposure_position"].flatten().to_numpy()
    train = (position > 0) & (position < last)
    return tuple(lists[name].flatten().to_numpy()[train] for name in ("exposure_items", "exposure_feedback"))


class CategoryPopularity:
    """Ranks items of the last click's category by train clicks, then all others by train clicks.

    Args:
        popularity: popularity of the candidates.
        category: int64 `[n_items + 1]`, category of each item.
    """

    def __init__(self, popularity: Popularity, category: npt.NDArray[np.int64]) -> None:
        self.popularity, self.category = popularity, category
        best_first = popularity.best_first
        order = np.argsort(category[best_first], kind="stable")
        self.best_first = best_first[order]  # category by category, the most clicked first
        bounds = np.searchsorted(category[self.best_first], np.arange(int(category.max(initial=0)) + 2))
        self.begin, self.end = bounds[:-1], bounds[1:]
        self.sizes = self.end - self.begin
        self.key = self._key(category[self.best_first], popularity.clicks_of(self.best_first))

    def rank(
        self, queries: Queries, k: int, *, mask_seen: bool
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.integer]]:
        """Ranks of the targets (ties count against them), and the `k` best candidates of each query, padded with 0."""
        own_category = self.category[queries.seen[queries.seen_offset[1:] - 1]]
        lists = self._lists(queries, own_category, k, mask_seen=mask_seen)
        overall = self.popularity.ranks(queries, mask_seen=mask_seen)
        own = self.popularity.clicks_of(queries.target)
        size = self.sizes[own_category]
        at_least = (
            np.searchsorted(self.key, self._key(own_category, np.maximum(own, 0)), side="right")
            - self.begin[own_category]
        )
        if mask_seen:  # exclude seen items
            query = np.repeat(np.arange(len(queries)), queries.n_seen)
            once = _distinct(query, queries.seen)
            query, clicks = query[once], self.popularity.clicks_of(queries.seen[once])
            is_within = (self.category[queries.seen[once]] == own_category[query]) & (clicks >= 0)
            size = size - np.bincount(query[is_within], minlength=len(queries))
            at_least -= np.bincount(query[is_within & (clicks >= own[query])], minlength=len(queries))
        # Within the category by clicks; others rank behind the complete category.
        rank = np.where(self.category[queries.target] == own_category, at_least, overall - at_least + size)
        rank[overall == MISS] = MISS
        return rank.astype(np.int64), lists

    def _listed(
        self, queries: Queries, category_Q: npt.NDArray[np.int64], k: int, *, mask_seen: bool
    ) -> npt.NDArray[np.integer]:
        """The `k` most clicked candidates of one category for each query `[Q, k]`, padded with 0."""
        deep = k + (int(queries.n_seen.max(initial=0)) if mask_seen else 0)
        index = self.begin[category_Q][:, None] + np.arange(deep)
        inside = index < self.end[category_Q][:, None]
        listed = np.where(inside, self.best_first[np.where(inside, index, 0)], 0).astype(np.int64)
        if mask_seen:
            listed[seen_among(queries, listed)] = 0
        return first_listed(listed, k)

    def _lists(
        self, queries: Queries, category_Q: npt.NDArray[np.int64], k: int, *, mask_seen: bool
    ) -> npt.NDArray[np.integer]:
        listed = self._listed(queries, category_Q, k, mask_seen=mask_seen)
        general = self.popularity.lists(queries, k, mask_seen=mask_seen).astype(np.int64)
        general[self.category[general] == category_Q[:, None]] = 0
        return first_listed(np.concatenate([listed, general], axis=1), k)

    def _key(self, category_N: npt.NDArray[np.int64], clicks_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sort key in the order of `best_first`."""
        max_clicks = int(self.popularity.clicks.max(initial=0))
        return category_N * (max_clicks + 1) + (max_clicks - clicks_N)


def _distinct(query_N: npt.NDArray[np.integer], item_N: npt.NDArray[np.integer]) -> npt.NDArray[np.intp]:
    """Index of the first occurrence of each (query, item) pair."""
    pair = query_N.astype(np.int64) << 32 | item_N.astype(np.int64)
    return np.unique(pair, return_index=True)[1]
