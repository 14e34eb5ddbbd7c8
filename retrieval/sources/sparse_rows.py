"""Arithmetic on the rows of sparse matrices: selection, samples, the clicks of queries."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import sparse

from etl.runtime.lookup import lookup
from retrieval.queries import Queries
from retrieval.ragged import index_in_group

LEVELS, MANY = 1_024, 4
"""Histogram bins to prefilter values before partitioning, used if rows have `MANY` × k values on average."""
CELLS_AT_ONCE = 1 << 21
"""Maximum cells of a block of padded rows."""


def row_of_entries(matrix: sparse.csr_matrix) -> npt.NDArray[np.int64]:
    """The row of each non-zero entry."""
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))


def position_in_row(row_N: npt.NDArray[np.integer], n_rows: int) -> npt.NDArray[np.int64]:
    """Index of each entry in its row; `row_N` is sorted.

    >>> position_in_row(np.array([0, 0, 2]), 3).tolist()
    [0, 1, 0]
    """
    return index_in_group(np.bincount(row_N, minlength=n_rows))


def kth_largest(value_N: npt.NDArray[np.floating], indptr: npt.NDArray[np.integer], k: int) -> npt.NDArray[np.floating]:
    """The `k`-th largest value of each row; -inf for rows of at most `k` values.

    >>> kth_largest(np.array([5.0, 1.0, 3.0, 2.0]), np.array([0, 3, 4]), 2).tolist()
    [3.0, -inf]
    """
    long = np.flatnonzero(np.diff(indptr) > k)
    if len(value_N) > MANY * k * (len(indptr) - 1):
        contends = _may_be_among_largest(value_N, indptr, k)
        value_N, indptr = value_N[contends], np.concatenate([[0], np.cumsum(contends)])[indptr]
    begin_of, count = indptr[:-1].astype(np.int64), np.diff(indptr).astype(np.int64)
    out = np.full(len(count), -np.inf, value_N.dtype)
    long = long[np.argsort(-count[long], kind="stable")]
    begin = 0
    while begin < len(long):
        width = int(count[long[begin]])  # the longest row of the block
        rows = long[begin : begin + max(1, CELLS_AT_ONCE // width)]
        begin += len(rows)
        column = np.arange(width)
        inside = column < count[rows][:, None]
        cells = np.full(inside.shape, -np.inf, value_N.dtype)
        cells[inside] = value_N[(begin_of[rows][:, None] + column)[inside]]
        out[rows] = np.partition(cells, width - k, axis=1)[:, width - k]
    return out


def _may_be_among_largest(
    value_N: npt.NDArray[np.floating], indptr: npt.NDArray[np.integer], k: int
) -> npt.NDArray[np.bool_]:
    """Mask of values in the histogram bins of a row's `k` largest; takes a third of the time of partitioning."""
    length = np.diff(indptr)
    filled = np.flatnonzero(length)
    lowest, highest = (np.zeros(len(length), value_N.dtype) for _ in range(2))
    lowest[filled] = np.minimum.reduceat(value_N, indptr[filled])
    highest[filled] = np.maximum.reduceat(value_N, indptr[filled])
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        span = highest - lowest
        scale = ((LEVELS - 1) / span).astype(value_N.dtype)
    if not np.isfinite(span).all():
        return np.ones(len(value_N), bool)
    scale[~np.isfinite(scale)] = 0  # nearly constant row: one bin
    level = ((value_N - np.repeat(lowest, length)) * np.repeat(scale, length)).astype(np.int32)
    cell = np.repeat(np.arange(len(length)) * LEVELS, length) + level
    times = np.bincount(cell, minlength=len(length) * LEVELS).reshape(len(length), LEVELS)
    at_least = np.cumsum(times[:, ::-1], axis=1)[:, ::-1]  # number of values in this or higher bins
    lowest_level = np.maximum(np.sum(at_least >= k, axis=1) - 1, 0).astype(np.int32)
    return np.asarray(level >= np.repeat(lowest_level, length))


def kth_largest_count(
    count_N: npt.NDArray[np.integer], indptr: npt.NDArray[np.integer], k: int
) -> npt.NDArray[np.int64]:
    """The `k`-th largest of each row's non-negative integers; smaller for rows of at most `k`, which keep all.

    Small numbers use counting, in a fifth of the time of partitioning.

    >>> kth_largest_count(np.array([5, 1, 3, 2]), np.array([0, 3, 4]), 2).tolist()
    [3, 0]
    """
    n_rows, n_counts = len(indptr) - 1, int(count_N.max(initial=0)) + 1
    if n_rows * n_counts > CELLS_AT_ONCE:
        threshold = kth_largest(count_N.astype(np.float64), indptr, k)
        return np.maximum(threshold, 0).astype(np.int64)  # rows of at most k values keep all
    cell = np.repeat(np.arange(n_rows) * n_counts, np.diff(indptr)) + count_N
    times = np.bincount(cell, minlength=n_rows * n_counts).reshape(n_rows, n_counts)
    at_least = np.cumsum(times[:, ::-1], axis=1)[:, ::-1]  # number of entries at least this large
    return np.maximum(np.sum(at_least >= k, axis=1) - 1, 0)


def entries_of_largest(
    value_N: npt.NDArray[np.number],
    column_N: npt.NDArray[np.integer],
    indptr: npt.NDArray[np.integer],
    k: int,
    threshold_R: npt.NDArray[np.number],
) -> npt.NDArray[np.int64]:
    """Sorted indices of the `k` largest entries of each row, ties by the lower column.

    Args:
        value_N, column_N, indptr: the rows in CSR format.
        k: maximum entries per row.
        threshold_R: the `k`-th largest value of each row, or a lower bound for rows with fewer entries.
    """
    top = np.flatnonzero(value_N >= np.repeat(threshold_R, np.diff(indptr)))
    row = np.searchsorted(top, indptr).astype(np.int64)  # row offsets among them
    count = np.diff(row)
    if count.max(initial=0) <= k:
        return top
    row = np.repeat(np.arange(len(count)), count)
    is_tied = value_N[top] == threshold_R[row]
    left = k - np.bincount(row[~is_tied], minlength=len(count))
    tied = np.flatnonzero(is_tied & (count > k)[row])
    tied = tied[np.argsort(row[tied] << 32 | column_N[top[tied]], kind="stable")]
    beyond = tied[position_in_row(row[tied], len(count)) >= left[row[tied]]]
    return np.delete(top, beyond)


def largest_of_rows(matrix: sparse.csr_matrix, k: int) -> sparse.csr_matrix:
    """The `k` largest entries of each row, ties by the lower column; columns are sorted."""
    if np.diff(matrix.indptr).max(initial=0) > k:
        threshold = kth_largest(matrix.data, matrix.indptr, k)
        chosen = entries_of_largest(matrix.data, matrix.indices, matrix.indptr, k, threshold)
        indptr = np.searchsorted(chosen, matrix.indptr)
        matrix = sparse.csr_matrix((matrix.data[chosen], matrix.indices[chosen], indptr), shape=matrix.shape)
    matrix.sort_indices()
    return matrix


def entries_where(matrix: sparse.csr_matrix, chosen_N: npt.NDArray[np.bool_]) -> sparse.csr_matrix:
    """Select non-zero entries by mask."""
    if chosen_N.all():
        return matrix
    indptr = np.concatenate([[0], np.cumsum(chosen_N)])[matrix.indptr]
    return sparse.csr_matrix((matrix.data[chosen_N], matrix.indices[chosen_N], indptr), shape=matrix.shape)


def entries_at(
    matrix: sparse.csr_matrix, row_N: npt.NDArray[np.integer], column_N: npt.NDArray[np.integer]
) -> npt.NDArray[np.floating]:
    """Values of cells, 0 if there is no entry; `matrix` has sorted columns.

    >>> entries_at(sparse.csr_matrix(([5.0, 7.0], [1, 3], [0, 2, 2]), shape=(2, 4)), np.array([0, 1]), np.array([3, 3]))
    array([7., 0.])
    """
    if not matrix.nnz:
        return np.zeros(len(row_N), matrix.dtype)
    key = row_of_entries(matrix) << 32 | matrix.indices.astype(np.int64)
    cell = np.asarray(row_N, np.int64) << 32 | np.asarray(column_N, np.int64)
    index, match = lookup(key, cell)
    return np.where(match, matrix.data[index], 0)


def sampled_rows(matrix: sparse.csr_matrix, max_entries: int) -> sparse.csr_matrix:
    """At most `max_entries` entries of each row, by a seeded sample."""
    count = np.diff(matrix.indptr)
    if count.max(initial=0) <= max_entries:
        return matrix
    row = row_of_entries(matrix)
    order = np.lexsort((np.random.default_rng(0).random(matrix.nnz), row))
    chosen = np.sort(order[index_in_group(count) < max_entries])
    indptr = np.concatenate([[0], np.cumsum(np.minimum(count, max_entries))])
    return sparse.csr_matrix((matrix.data[chosen], matrix.indices[chosen], indptr), shape=matrix.shape)


def latest_clicks(queries: Queries) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Query and index into `queries.seen` of each distinct seen item's last click, by query and item."""
    query = np.repeat(np.arange(len(queries)), queries.n_seen)
    pair = query << 32 | queries.seen
    last = len(pair) - 1 - np.unique(pair[::-1], return_index=True)[1]
    return query[last], last


def seen_matrix(queries: Queries, value_N: npt.NDArray[np.number], n_items: int) -> sparse.csr_matrix:
    """Values of the seen clicks `[Q, n_items + 1]`; for repeated items that of the latest click."""
    query, last = latest_clicks(queries)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(query, minlength=len(queries)))])
    shape = (len(queries), n_items + 1)
    return sparse.csr_matrix((value_N[last].astype(np.float32), queries.seen[last], indptr), shape=shape)
