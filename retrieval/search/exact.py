"""Exact maximum-inner-product search in bounded memory: the reference for every index."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from retrieval.ragged import index_in_group
from retrieval.search.threads import in_threads, search_threads

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


QUERIES_AT_ONCE, ITEMS_AT_ONCE = 512, 1_024
"""Shape of a block of scores: 2 MiB, which stays in the cache."""
PENDING = 4
"""Mean pending candidates per query before they are merged into the top lists."""


def search_exact(item_CD: Vectors, query_QD: Vectors, k: int) -> tuple[npt.NDArray[np.float32], Ids]:
    """The `k` best rows of `item_CD` for each query by float32 scores, best first; `search_ordered` orders ties by row.

    Blocks of scores are compared with each query's current k-th best score; only the few better ones are processed
    further. So it takes little longer than the matrix product, and memory does not grow with C × Q. (`faiss.knn` has
    a fifth of the speed at 400,000 × 65, k = 21, one AVX2 core.) It uses the number of threads that FAISS is set to.

    Returns:
        Scores float32 `[Q, k]` and rows int64 `[Q, k]`; -inf and -1 where C < k.
    """
    tiles = [query_QD[i : i + QUERIES_AT_ONCE] for i in range(0, len(query_QD), QUERIES_AT_ONCE)]
    with threadpool_limits(1, user_api="blas"):
        result = in_threads(lambda tile: _search_tile(item_CD, np.ascontiguousarray(tile), k), tiles, search_threads())
    if not result:
        return np.zeros((0, k), np.float32), np.zeros((0, k), np.int64)
    return np.concatenate([score for score, _ in result]), np.concatenate([row for _, row in result])


class _Best:
    """The current top rows of some queries, and pending candidates."""

    def __init__(self, n: int, k: int) -> None:
        self.score, self.row = np.full((n, k), -np.inf, np.float32), np.full((n, k), -1, np.int64)
        self.threshold = np.full((n, 1), -np.inf, np.float32)
        self.waiting: list[tuple[npt.NDArray[np.intp], Ids, npt.NDArray[np.float32]]] = []
        self.count = 0

    def add(self, query: npt.NDArray[np.intp], row: Ids, score: npt.NDArray[np.float32]) -> None:
        """Add candidates that score above their query's k-th best."""
        self.waiting.append((query, row, score))
        self.count += len(query)
        if self.count > PENDING * len(self.score):
            self.merge()

    def merge(self) -> None:
        """Merge the pending candidates."""
        if not self.waiting:
            return
        query, row, score = (np.concatenate(part) for part in zip(*self.waiting, strict=True))
        self.waiting, self.count = [], 0
        order = np.argsort(query, kind="stable")
        query, row, score = query[order], row[order], score[order]
        n, k = self.score.shape
        count = np.bincount(query, minlength=n)
        column = k + index_in_group(count)
        scores = np.pad(self.score, ((0, 0), (0, int(count.max()))), constant_values=-np.inf)
        rows = np.pad(self.row, ((0, 0), (0, int(count.max()))), constant_values=-1)
        scores[query, column], rows[query, column] = score, row
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        self.score, self.row = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
        self.threshold = self.score.min(axis=1, keepdims=True)

    def in_order(self) -> tuple[npt.NDArray[np.float32], Ids]:
        """Scores and rows, best first."""
        self.merge()
        order = np.lexsort((self.row, -self.score), axis=1)
        return np.take_along_axis(self.score, order, 1), np.take_along_axis(self.row, order, 1)


def _search_tile(item_CD: Vectors, query_MD: Vectors, k: int) -> tuple[npt.NDArray[np.float32], Ids]:
    best = _Best(len(query_MD), k)
    for begin in range(0, len(item_CD), ITEMS_AT_ONCE):
        score = query_MD @ item_CD[begin : begin + ITEMS_AT_ONCE].T
        query, column = np.divmod(np.flatnonzero(score > best.threshold), score.shape[1])
        if len(query):
            best.add(query, column + begin, score[query, column])
    return best.in_order()


MAX_CONTENDERS = 4_096
"""Maximum near-ties of a query's last neighbour to compare exactly, lowest rows first."""


def search_ordered(item_CD: Vectors, query_QD: Vectors, k: int) -> tuple[npt.NDArray[np.float64], Ids]:
    """The `k` best rows for each query by float64 scores, best first, ties by ascending row.

    `search_exact` compares float32 scores, which may differ even for equal vectors. Where rounding could have swapped
    the last listed score and the next, all near-ties are compared again in float64.

    Returns:
        Scores float64 `[Q, k]` and rows int64 `[Q, k]`; -inf and -1 where C < k.
    """
    _, row = search_exact(item_CD, query_QD, k + 1)
    score, row = _sorted(rescore(item_CD, query_QD, row), row)
    if k >= len(item_CD) or not len(query_QD):
        return score[:, :k], row[:, :k]
    item_norm, query_norm = (np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64)) for x in (item_CD, query_QD))
    # The rounding error of a score is at most this × the item's norm; an item that is not listed may be the longest.
    error = item_CD.shape[1] * np.finfo(np.float32).eps * query_norm
    near = np.flatnonzero(score[:, k - 1] - score[:, k] <= error * item_norm.max())
    slack_C = 2 * item_norm.astype(np.float32)
    for begin in range(0, len(near), QUERIES_AT_ONCE // 8):
        part = near[begin : begin + QUERIES_AT_ONCE // 8]
        threshold_M, error_M = (values[part].astype(np.float32) for values in (score[:, k - 1], error))
        more = _contenders(item_CD, slack_C, query_QD[part], error_M, threshold_M, row[part])
        best_score, best_row = _sorted(rescore(item_CD, query_QD[part], more), more)
        score[part, :k], row[part, :k] = best_score[:, :k], best_row[:, :k]
    return score[:, :k], row[:, :k]


def _contenders(
    item_CD: Vectors, slack_C: Vectors, query_MD: Vectors, error_M: Vectors, threshold_M: Vectors, row_MK: Ids
) -> Ids:
    """Rows whose score may be at least `threshold_M`, in addition to `row_MK`; distinct, padded with -1.

    Float32 scores are off by up to `error_M` × `slack_C`.
    """
    count_M = np.zeros(len(query_MD), np.int64)
    query, row = [np.repeat(np.arange(len(query_MD)), row_MK.shape[1])], [row_MK.ravel()]
    for begin in range(0, len(item_CD), ITEMS_AT_ONCE):
        block = slice(begin, begin + ITEMS_AT_ONCE)
        score = query_MD @ item_CD[block].T + error_M[:, None] * slack_C[block]
        of_query, column = np.nonzero(score >= threshold_M[:, None])
        query.append(of_query)
        row.append(column + begin)
        count_M += np.bincount(of_query, minlength=len(count_M))
        threshold_M[count_M >= MAX_CONTENDERS] = np.inf
    pair = np.unique(np.stack([np.concatenate(query), np.concatenate(row)]), axis=1)
    count = np.bincount(pair[0], minlength=len(query_MD))
    column = index_in_group(count)
    out = np.full((len(query_MD), int(count.max())), -1, np.int64)
    out[pair[0], column] = pair[1]
    return out


def _sorted(score_QK: npt.NDArray[np.float64], row_QK: Ids) -> tuple[npt.NDArray[np.float64], Ids]:
    """Sort best first, ties by ascending row, empty entries last."""
    order = np.lexsort((np.where(row_QK < 0, np.iinfo(np.int64).max, row_QK), -score_QK), axis=1)
    return np.take_along_axis(score_QK, order, 1), np.take_along_axis(row_QK, order, 1)


def rescore(item_CD: Vectors, query_QD: Vectors, row_QK: Ids, *, chunk_rows: int = 1 << 13) -> npt.NDArray[np.float64]:
    """Inner products of each query with its listed rows, in float64; -inf for row -1.

    Blocked matrix multiplication rounds the same vector differently by position. Here every product is
    summed in the same order, so that items with equal vectors have equal scores and ties are exact.
    A chunk's rows fit into a core's cache.
    """
    score = np.empty(row_QK.shape)
    step = max(1, chunk_rows // max(row_QK.shape[1], 1))
    for begin in range(0, len(query_QD), step):
        rows = row_QK[begin : begin + step]
        query = query_QD[begin : begin + step].astype(np.float64)
        score[begin : begin + step] = np.einsum("qkd,qd->qk", item_CD[rows].astype(np.float64), query)
    score[row_QK < 0] = -np.inf
    return score
