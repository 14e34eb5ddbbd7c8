"""Item vectors to begin with: factors of how often items are clicked near one another in train.

The matrix of positive pointwise mutual information (PPMI) with smoothed contexts is factorised by a truncated
eigendecomposition (Levy and Goldberg 2014; Levy et al. 2015), which is what word2vec does in the limit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import sparse

from retrieval.sources.sessions import TrainSessions

WINDOW = 5
"""Largest distance in clicks of a pair; it counts 1 / distance."""
SMOOTHING = 0.75
"""Power of the items' counts as contexts, so that rare ones do not have the highest mutual information."""
OVERSAMPLING, ITERATIONS = 16, 4
"""Of the randomized range finder (Halko et al. 2011)."""

Floats = npt.NDArray[np.float32]


def start_vectors(sessions: TrainSessions, dimension: int, seed: int) -> Floats:
    """Vectors of length 1 for items with a neighbour in train, zeros for the others.

    Args:
        sessions: the clicks that may be counted.
        dimension: D; elements beyond the number of items are 0.
        seed: of the random start of the factorisation.

    Returns:
        float32 `[n_items, D]`.
    """
    vector = factors(positive_pmi(near_clicks(sessions)), dimension, seed)
    length: Floats = np.sqrt(np.square(vector).sum(axis=1, keepdims=True))
    scaled = vector / np.where(length > 0, length, np.float32(1.0))
    return np.pad(scaled, ((0, 0), (0, dimension - scaled.shape[1])))


def near_clicks(sessions: TrainSessions) -> sparse.csr_matrix:
    """How often items are clicked near one another: symmetric float32 `[n_items, n_items]`, Σ 1 / distance."""
    session, item, n = sessions.session, sessions.items - 1, sessions.n_items
    total = sparse.csr_matrix((n, n), dtype=np.float32)
    for gap in range(1, WINDOW + 1):
        near = np.flatnonzero(session[:-gap] == session[gap:])
        weight = np.full(len(near), 1.0 / gap, np.float32)
        total += sparse.csr_matrix((weight, (item[near], item[near + gap])), shape=(n, n))
    return (total + total.T).tocsr()


def positive_pmi(count: sparse.csr_matrix) -> sparse.csr_matrix:
    """max(0, log p(i, j) / (p(i) p'(j))) with p' ∝ count^`SMOOTHING`, made symmetric by the mean of both directions."""
    of_item = np.asarray(count.sum(axis=1), np.float64).ravel()
    context = of_item**SMOOTHING
    entry = count.tocoo()
    expected = of_item[entry.row] * context[entry.col] / max(context.sum(), 1e-300)
    value = np.maximum(np.log(entry.data / expected), 0.0).astype(np.float32)
    directed = sparse.csr_matrix((value, (entry.row, entry.col)), shape=count.shape)
    result = ((directed + directed.T) / 2).tocsr()
    result.eliminate_zeros()
    return result


def factors(matrix: sparse.csr_matrix, rank: int, seed: int) -> Floats:
    """U |Λ|^½ of the `rank` largest eigenvalues, by magnitude, of a symmetric matrix: float32 `[n, rank]`."""
    n = matrix.shape[0]
    width = min(n, rank + OVERSAMPLING)
    base = np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)
    for _ in range(ITERATIONS):
        base, _ = np.linalg.qr(matrix @ base)
    value, vector = np.linalg.eigh(base.T @ (matrix @ base))
    largest = np.argsort(-np.abs(value), kind="stable")[:rank]
    magnitude = np.abs(value[largest])
    magnitude[magnitude < 1e-6 * magnitude.max(initial=0.0)] = 0.0  # of a matrix of lower rank: rounding
    result: Floats = ((base @ vector[:, largest]) * np.sqrt(magnitude)).astype(np.float32)
    result[np.diff(matrix.indptr) == 0] = 0.0
    return result
