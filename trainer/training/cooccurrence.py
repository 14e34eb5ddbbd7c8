"""Initial item vectors: factors of the PPMI matrix of items' co-occurrence in train.

The matrix of positive pointwise mutual information (PPMI) with smoothed contexts is factorised by a truncated
eigendecomposition (Levy and Goldberg 2014; Levy et al. 2015), which is what word2vec does in the limit. The matrix
`[n_items, n_items]` is held as its entries: keys `row * n_items + column`, rising, and values.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow.parquet as pq
import torch

from etl.dataset import Dataset
from etl.runtime.errors import InputError
from trainer.data.order import Int
from trainer.data.ragged import Ragged

WINDOW = 5
"""Largest distance in clicks of a pair; it counts 1 / distance."""
SMOOTHING = 0.75
"""Power of the items' counts as contexts, so that rare ones do not have the highest mutual information."""
OVERSAMPLING, ITERATIONS = 16, 4
"""Of the randomized range finder (Halko et al. 2011)."""

BYTES_A_CLICK, BYTES_A_NUMBER = 800, 32
"""Peak memory: of counting, for each click; of the factorisation, for each number of a base of its range."""

Floats = npt.NDArray[np.float64]


def start_vectors(dataset: Dataset, holdout: int, dimension: int, seed: int) -> torch.Tensor:
    """Vectors of length 1 for items with a neighbour, zeros for the others.

    Args:
        dataset: its sessions are read.
        holdout: clicks at the end of each session that are not counted.
        dimension: D; elements beyond the number of items are 0.
        seed: of the random start of the factorisation.

    Returns:
        float32 `[n_items, D]`.

    Raises:
        InputError: it would take more memory than there is.
    """
    n = dataset.manifest.n_items
    check_memory(dataset.manifest.counts["clicks"], n, dimension)
    key, value = positive_pmi(*near_clicks(*counted_clicks(dataset, holdout), n), n)
    vector = torch.nn.functional.normalize(factors(key, value, n, dimension, seed), dim=1)
    return torch.nn.functional.pad(vector, (0, dimension - vector.shape[1])).float()


def check_memory(clicks: int, n_items: int, dimension: int) -> None:
    """Raise `InputError` where counting and factorising may not fit into this machine's free memory."""
    needed = BYTES_A_CLICK * clicks + BYTES_A_NUMBER * n_items * min(n_items, dimension + OVERSAMPLING)
    free = psutil.virtual_memory().available
    if needed > free:
        what = f"{needed / 2**30:.1f} GiB of free memory for train.ppmi_start"
        raise InputError(what, f"{free / 2**30:.1f} GiB", "train.ppmi_start=0 begins with random vectors")


def counted_clicks(dataset: Dataset, holdout: int) -> tuple[Int, Int]:
    """Session and dense id of every click but the last `holdout` of each session, oldest first."""
    sessions, items, before = [], [], 0
    for entry in dataset.session_files:
        clicks = Ragged.of(pq.read_table(dataset.file(entry.path), columns=["items"])["items"])
        is_train = clicks.index_in_row < np.repeat(clicks.lengths - holdout, clicks.lengths)
        sessions.append(clicks.row[is_train] + before)
        items.append(clicks.values[is_train].astype(np.int64))
        before += len(clicks.lengths)
    return np.concatenate(sessions), np.concatenate(items)


def near_clicks(session_N: Int, item_N: Int, n_items: int) -> tuple[Int, Floats]:
    """Entries of the symmetric matrix of Σ 1 / distance over pairs of clicks within the window in one session."""
    common = math.lcm(*range(1, WINDOW + 1))  # integers add up exactly in any order
    keys, weights = [], []
    for gap in range(1, WINDOW + 1):
        near = np.flatnonzero(session_N[:-gap] == session_N[gap:])
        one, other = item_N[near] - 1, item_N[near + gap] - 1
        keys += [one * n_items + other, other * n_items + one]
        weights += [np.full(len(near), float(common // gap))] * 2
    key, total = sum_by_key(np.concatenate(keys), np.concatenate(weights))
    return key, total / common


def sum_by_key(key_N: Int, value_N: Floats) -> tuple[Int, Floats]:
    """Distinct keys, rising, and the sum of the values of each."""
    order = np.argsort(key_N, kind="stable")
    key = key_N[order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    return key[first], np.add.reduceat(value_N[order], first) if len(key) else value_N


def positive_pmi(key: Int, count: Floats, n_items: int) -> tuple[Int, Floats]:
    """Entries of max(0, log p(i, j) / (p(i) p'(j))) with p' ∝ count^`SMOOTHING`; the mean of both directions."""
    row, column = np.divmod(key, n_items)
    of_item = np.bincount(row, count, minlength=n_items)
    context = of_item**SMOOTHING
    pmi = np.log(count * context.sum() / (of_item[row] * context[column]))
    half = np.maximum(pmi, 0.0) / 2.0
    transposed = np.argsort(column * n_items + row)  # the same entries, for the counts are symmetric
    return key, half + half[transposed]


def factors(key: Int, value: Floats, n_items: int, rank: int, seed: int) -> torch.Tensor:
    """U |Λ|^½ of the `rank` largest eigenvalues, by magnitude, of a symmetric matrix: float64 `[n_items, rank]`."""
    index = np.stack(np.divmod(key, n_items))
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(index), torch.from_numpy(value), (n_items, n_items), check_invariants=False
    ).coalesce()
    width = min(n_items, rank + OVERSAMPLING)
    base = torch.from_numpy(np.random.default_rng(seed).normal(size=(n_items, width)))
    for _ in range(ITERATIONS):
        base, _ = torch.linalg.qr(torch.sparse.mm(matrix, base))
    eigenvalue, vector = torch.linalg.eigh(base.t() @ torch.sparse.mm(matrix, base))
    largest = torch.argsort(eigenvalue.abs(), descending=True, stable=True)[:rank]
    magnitude = eigenvalue[largest].abs()
    magnitude[magnitude < 1e-9 * magnitude.max()] = 0.0  # of a matrix of lower rank: rounding
    result = (base @ vector[:, largest]) * magnitude.sqrt()
    result[~torch.from_numpy(np.isin(np.arange(n_items), index[0, value > 0]))] = 0.0
    return result
