"""Item-to-item lists (successors, co-occurrence), counted over the train sessions and truncated.

Both builders process items in ranges of bounded work, several in parallel, so memory does not grow with the number of
pairs. Ties are ordered by ascending dense id, that is by descending train clicks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy import sparse

from retrieval.sources.sessions import TrainSessions
from retrieval.sources.sparse_rows import largest_of_rows, row_of_entries

PAIRS_AT_ONCE = 1 << 24
"""Maximum click pairs (or products of shared sessions) per range of items."""
GAP_BITS = 8
"""Low bits of a pair's key, which hold the distance of its clicks."""


def successor_lists(sessions: TrainSessions, gaps: int, max_items: int, threads: int = 1) -> sparse.csr_matrix:
    """Successors of each item at most `gaps` clicks later: float32 `[n_items + 1, n_items + 1]`.

    The score of b after a is the sum of 1/gap over all clicks on b that come `gap` clicks after one on a in the same
    session (sequential rules, Ludewig and Jannach 2018; with `gaps=1` the counts of a first-order Markov chain). The
    `max_items` best of each item are retained.
    """
    if not 1 <= gaps < 1 << GAP_BITS:
        raise ValueError(f"expected gaps in 1..{(1 << GAP_BITS) - 1}, got {gaps}")
    size = sessions.n_items + 1
    items, end_of = sessions.items, sessions.offset[1:]
    common = math.lcm(*range(1, gaps + 1))
    weight = np.array([0, *(common // gap for gap in range(1, gaps + 1))], np.int64)  # integers add up exactly
    clicks = np.bincount(items, minlength=size)
    begin_of = np.concatenate([[0], np.cumsum(clicks)])
    order = np.argsort(items, kind="stable").astype(np.min_scalar_type(len(items)))  # clicks by item

    def pairs(low: int, high: int) -> npt.NDArray[np.int64]:
        first = order[begin_of[low] : begin_of[high]].astype(np.int64)
        end = end_of[np.searchsorted(end_of, first, side="right")]
        row = (items[first].astype(np.int64) - low) * size
        keys = []
        for gap in range(1, gaps + 1):
            inside = first + gap < end
            keys.append((row[inside] + items[first[inside] + gap]) << GAP_BITS | gap)
        return np.concatenate(keys)

    def counted(low: int, high: int) -> sparse.csr_matrix:
        key = np.sort(pairs(low, high))
        pair = key >> GAP_BITS
        begin = np.flatnonzero(np.diff(pair, prepend=-1))
        score = np.add.reduceat(weight[key & ((1 << GAP_BITS) - 1)], begin) if len(key) else np.zeros(0)
        row, column = np.divmod(pair[begin], size)
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=high - low))])
        lists = sparse.csr_matrix((score.astype(np.float64), column.astype(np.int32), indptr), shape=(high - low, size))
        lists = largest_of_rows(lists, max_items)
        return sparse.csr_matrix(
            ((lists.data / common).astype(np.float32), lists.indices, lists.indptr), shape=lists.shape
        )

    return in_ranges(counted, clicks * gaps, max_items, threads)


def cosine_lists(sessions: TrainSessions, max_items: int, threads: int = 1) -> sparse.csr_matrix:
    """The `max_items` nearest neighbours of each item by cosine: float32 `[n_items + 1, n_items + 1]`.

    The cosine of i and j is the number of train sessions with both / √(sessions of i · sessions of j)
    (Sarwar et al. 2001). An item is not its own neighbour.
    """
    has_item = sessions.incidence()
    times = np.bincount(has_item.indices, minlength=has_item.shape[1])
    of_item = has_item.T.tocsr()

    length = np.diff(has_item.indptr)
    work = np.bincount(has_item.indices, np.repeat(length, length), has_item.shape[1])
    return in_ranges(partial(_nearest, of_item, has_item, times, max_items), work, max_items, threads)


def _nearest(
    of_item: sparse.csr_matrix,
    has_item: sparse.csr_matrix,
    times_I: npt.NDArray[np.int64],
    max_items: int,
    low: int,
    high: int,
) -> sparse.csr_matrix:
    """The neighbours of items `low` to `high - 1`; counts are exact, so that equal cosines are equal numbers."""
    cosine = (of_item[low:high] @ has_item).tocsr()
    row = row_of_entries(cosine)
    cosine.data = (cosine.data / np.sqrt(times_I[low + row] * times_I[cosine.indices])).astype(np.float32)
    cosine.data[cosine.indices == low + row] = 0.0
    cosine.eliminate_zeros()
    return largest_of_rows(cosine, max_items)


def in_ranges(
    build: Callable[[int, int], sparse.csr_matrix], work_I: npt.NDArray[np.number], max_items: int, threads: int
) -> sparse.csr_matrix:
    """Stack the lists that `build(low, high)` returns for ranges of items of about equal work.

    Args:
        build: returns float32 lists of items `low` to `high - 1`, over all items.
        work_I: number of pairs of each item, an upper bound of its list's length.
        max_items: maximum items of a list.
        threads: ranges processed in parallel.
    """
    bounds, size = bounds_by_work(work_I, PAIRS_AT_ONCE), len(work_I)
    # Allocate for the longest lists: untouched pages take no memory, and no list is copied.
    room = int(np.minimum(work_I, max_items).sum())
    score, item, lengths, end = np.empty(room, np.float32), np.empty(room, np.int32), [], 0
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for block in pool.map(build, bounds[:-1], bounds[1:]):
            begin, end = end, end + block.nnz
            score[begin:end], item[begin:end] = block.data, block.indices
            lengths.append(np.diff(block.indptr))
    offset = np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)])
    for array in (score, item):
        array.resize(end, refcheck=False)  # in place: scipy would copy a view of a larger array
    return sparse.csr_matrix((score, item, offset), shape=(size, size))


def bounds_by_work(work_I: npt.NDArray[np.number], max_work: int) -> Sequence[int]:
    """Bounds of ranges with work of at most `max_work`, or a single item.

    >>> bounds_by_work(np.array([3, 3, 9, 1, 1]), 6)
    [0, 2, 3, 5]
    """
    total, bounds = np.cumsum(work_I), [0]
    while bounds[-1] < len(work_I):
        done = total[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(max(bounds[-1] + 1, int(np.searchsorted(total, done + max_work, side="right"))))
    return bounds
