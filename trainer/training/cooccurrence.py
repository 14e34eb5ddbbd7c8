"""Initial item vectors by factorising the PPMI matrix of item co-occurrence in train.

The matrix of positive pointwise mutual information (PPMI) with smoothed contexts is factorised by a truncated
eigendecomposition (Levy and Goldberg 2014; Levy et al. 2015), which word2vec approximates. The matrix is counted
by ranges of rows, so that little more than the matrix and the clicks is in memory.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow.parquet as pq
import torch

from etl.dataset import Dataset
from etl.runtime.arrays import FloatArray, IntArray
from etl.runtime.errors import InputError
from trainer.data.ragged import Ragged

WINDOW = 5
"""Largest distance in clicks of a pair; pairs are weighted by 1 / distance."""
SMOOTHING = 0.75
"""Exponent of context counts, so that rare contexts do not have the highest mutual information."""
OVERSAMPLING, ITERATIONS = 16, 4
"""Parameters of the randomised range finder (Halko et al. 2011)."""

COMMON = math.lcm(*range(1, WINDOW + 1))
"""Makes weights integers: `COMMON` / distance is exact."""
PAIRS_AT_ONCE, ROWS_AT_ONCE = 1 << 24, 65_536
"""Pairs counted, and rows of random numbers drawn, at a time."""
BYTES_A_CLICK, BYTES_A_NUMBER, BYTES_A_PAIR = 100, 14, 110
"""Peak memory in bytes: of the matrix, per click; of the factorisation, per element of the range basis; of counting,
per pair in memory."""


@dataclass(frozen=True)
class Matrix:
    """A sparse matrix in CSR format.

    Attributes:
        offset: int64 `[n + 1]`, row offsets.
        column: int32, sorted in each row.
        value: float32.
    """

    offset: IntArray
    column: npt.NDArray[np.int32]
    value: npt.NDArray[np.float32]


def ppmi_vectors(dataset: Dataset, holdout: int, dimension: int, seed: int) -> torch.Tensor:
    """Unit vectors for items with a neighbour, zeros for the others.

    Args:
        dataset: dataset with the sessions.
        holdout: number of final clicks of each session that are not counted.
        dimension: D; elements beyond the number of items are 0.
        seed: seed of the randomised factorisation.

    Returns:
        float32 `[n_items, D]`.

    Raises:
        InputError: not enough memory.
    """
    n = dataset.manifest.n_items
    check_memory(dataset.manifest.counts["clicks"], n, dimension)
    matrix = positive_pmi(*counted_clicks(dataset, holdout), n)
    vector = torch.nn.functional.normalize(factors(matrix, dimension, seed), dim=1)
    return torch.nn.functional.pad(vector, (0, dimension - vector.shape[1]))


def needed_bytes(clicks: int, n_items: int, dimension: int) -> int:
    """Peak additional memory of counting and factorising."""
    counting = BYTES_A_CLICK * clicks + BYTES_A_PAIR * min(PAIRS_AT_ONCE, 2 * WINDOW * clicks)
    return counting + BYTES_A_NUMBER * n_items * min(n_items, dimension + OVERSAMPLING)


def check_memory(clicks: int, n_items: int, dimension: int) -> None:
    """Raise `InputError` if counting and factorising may not fit into free memory."""
    needed = needed_bytes(clicks, n_items, dimension)
    free = psutil.virtual_memory().available
    if needed > free:
        what = f"{needed / 2**30:.1f} GiB of free memory for train.ppmi_start"
        raise InputError(what, f"{free / 2**30:.1f} GiB", "train.ppmi_start=0 begins with random vectors")


def counted_clicks(dataset: Dataset, holdout: int) -> tuple[IntArray, IntArray]:
    """Session and dense id of every click but the last `holdout` of each session, oldest first."""
    sessions, items, before = [], [], 0
    for entry in dataset.session_files:
        clicks = Ragged.of(pq.read_table(dataset.file(entry.path), columns=["items"])["items"])
        is_train = clicks.index_in_row < np.repeat(clicks.lengths - holdout, clicks.lengths)
        sessions.append(clicks.row[is_train] + before)
        items.append(clicks.values[is_train].astype(np.int64))
        before += len(clicks.lengths)
    return np.concatenate(sessions), np.concatenate(items)


def positive_pmi(session_N: IntArray, item_N: IntArray, n_items: int, at_once: int = PAIRS_AT_ONCE) -> Matrix:
    """The matrix of max(0, log p(i, j) / (p(i) p'(j))) with p' ∝ count^`SMOOTHING`, symmetrised by the mean.

    Args:
        session_N: session of each click; the clicks of a session are contiguous.
        item_N: dense ids, in order.
        n_items: number of items.
        at_once: number of pairs in memory at a time; does not affect the result.
    """
    in_session = np.append(np.flatnonzero(np.diff(session_N, prepend=-1)), len(session_N))
    end_N = np.repeat(in_session[1:], np.diff(in_session)).astype(np.int32)
    begin_N = np.repeat(in_session[:-1], np.diff(in_session)).astype(np.int32)
    index_N = (item_N - 1).astype(np.int32)
    of_item = np.zeros(n_items)
    for gap in range(1, WINDOW + 1):
        near = np.flatnonzero(session_N[:-gap] == session_N[gap:])
        for positions in (near, near + gap):
            of_item += COMMON // gap * np.bincount(index_N[positions], minlength=n_items)
    of_item /= COMMON
    context = of_item**SMOOTHING
    with np.errstate(divide="ignore"):
        log_item, log_context = np.log(of_item), np.log(context / max(context.sum(), 1e-300))
    lengths, columns, values = [np.zeros(1, np.int64)], [], []
    for begin, end in row_blocks(np.bincount(index_N, minlength=n_items), max(1, at_once // (2 * WINDOW))):
        keys, weights = [], []
        for other, weight, click in near_clicks(index_N, begin_N, end_N, begin, end):
            keys.append((index_N[click].astype(np.int64) - begin) * n_items + index_N[other])
            weights.append(np.full(len(click), float(weight)))
        key, total = sum_by_key(np.concatenate(keys), np.concatenate(weights))
        row, column = np.divmod(key, n_items)
        log_count, row = np.log(total / COMMON), row + begin
        value = np.maximum(log_count - log_item[row] - log_context[column], 0.0)
        value += np.maximum(log_count - log_item[column] - log_context[row], 0.0)
        positive = value > 0
        lengths.append(np.bincount(row[positive] - begin, minlength=end - begin))
        columns.append(column[positive].astype(np.int32))
        values.append((value[positive] / 2).astype(np.float32))
    return Matrix(np.cumsum(np.concatenate(lengths)), joined(columns), joined(values))


def joined(parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Concatenate parts, freeing each once it is copied, to limit peak memory."""
    result, end = np.empty(sum(map(len, parts)), parts[0].dtype), 0
    while parts:
        part = parts.pop(0)
        result[end : end + len(part)] = part
        end += len(part)
    return result


def row_blocks(click_I: IntArray, at_once: int) -> list[tuple[int, int]]:
    """Ranges of items with at most `at_once` clicks, or a single item.

    As `bounds_by_work` of `retrieval.sources.counts`, which imports scipy: no first step should wait for that.

    >>> row_blocks(np.array([5, 1, 1, 1, 9]), 3)
    [(0, 1), (1, 4), (4, 5)]
    """
    total, bounds = np.cumsum(click_I), [0]
    while bounds[-1] < len(click_I):
        before = total[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(max(int(np.searchsorted(total, before + at_once, side="right")), bounds[-1] + 1))
    return list(itertools.pairwise(bounds))


def near_clicks(
    index_N: npt.NDArray[np.int32], begin_N: npt.NDArray[np.int32], end_N: npt.NDArray[np.int32], low: int, high: int
) -> Iterator[tuple[IntArray, int, IntArray]]:
    """Pairs of clicks within the window in one session, the first of them on an item in `low..high`.

    Yields:
        Positions of the second clicks, `COMMON` / distance, positions of the first clicks.
    """
    click = np.flatnonzero((index_N >= low) & (index_N < high))
    for gap in range(1, WINDOW + 1):
        for other in (click + gap, click - gap):
            near = (other >= begin_N[click]) & (other < end_N[click])
            yield other[near], COMMON // gap, click[near]


def sum_by_key(key_N: IntArray, value_N: FloatArray) -> tuple[IntArray, FloatArray]:
    """Distinct keys, sorted, and the sum of each key's values; integer values add up exactly in any order."""
    order = np.argsort(key_N)
    key = key_N[order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    return key[first], np.add.reduceat(value_N[order], first) if len(key) else value_N


def factors(matrix: Matrix, rank: int, seed: int) -> torch.Tensor:
    """U |Λ|^½ of the `rank` largest eigenvalues, by magnitude, of a symmetric matrix: float32 `[n_items, rank]`."""
    n = len(matrix.offset) - 1
    kind = np.int32 if len(matrix.column) < 2**31 else np.int64
    offset, column = (torch.from_numpy(part.astype(kind, copy=False)) for part in (matrix.offset, matrix.column))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that CSR is in beta
        rows = torch.sparse_csr_tensor(offset, column, torch.from_numpy(matrix.value), size=(n, n))
    width = min(n, rank + OVERSAMPLING)
    base, random = torch.empty(n, width), np.random.default_rng(seed)
    for part in base.split(ROWS_AT_ONCE):  # drawn in float64: float32 draws would differ
        part.copy_(torch.from_numpy(random.normal(size=part.shape)))
    for _ in range(ITERATIONS):
        base, _ = torch.linalg.qr(rows @ base)
    eigenvalue, vector = torch.linalg.eigh((base.t() @ (rows @ base)).double())
    largest = torch.argsort(eigenvalue.abs(), descending=True, stable=True)[:rank]
    magnitude = eigenvalue[largest].abs()
    magnitude[magnitude < 1e-6 * magnitude.max()] = 0.0  # rounding, if the matrix has lower rank
    factor = base @ (vector[:, largest] * magnitude.sqrt()).float()
    factor[torch.from_numpy(np.diff(matrix.offset) == 0)] = 0.0
    return factor
