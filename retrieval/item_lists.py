"""Item lists for a batch of queries: seen items, and the first unseen ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from etl.runtime.hashing import multiplicative_hash
from etl.runtime.lookup import lookup
from retrieval.queries import Queries

SLOTS = 8
"""Hash table slots per stored value."""
MIN_HASHED = 4_096
"""Minimum number of values for which a hash table is used."""


def seen_pairs(queries: Queries) -> npt.NDArray[np.int64]:
    """`query << 32 | item` of all seen clicks, sorted."""
    query = np.repeat(np.arange(len(queries)), queries.n_seen)
    return np.sort(query << 32 | queries.seen)


def is_among(value_N: npt.NDArray[np.int64], sorted_M: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Mask of the values that are in `sorted_M`; `value_N` may have any shape."""
    out = np.zeros(value_N.size, bool)
    out[matches(value_N.ravel(), sorted_M)[0]] = True
    return out.reshape(value_N.shape)


def matches(
    value_N: npt.NDArray[np.int64], sorted_M: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices of the values that are in `sorted_M`, and the index there of each.

    Optimised for few matches: a hash table filters out most values, and the rest is looked up.
    """
    possible = np.arange(len(value_N))
    if len(value_N) >= MIN_HASHED and len(sorted_M):
        bits = int(SLOTS * len(sorted_M)).bit_length()
        table = np.zeros(1 << bits, bool)
        table[multiplicative_hash(sorted_M, bits)] = True
        possible = np.flatnonzero(table[multiplicative_hash(value_N, bits)])
    index, match = lookup(sorted_M, value_N[possible])
    return possible[match], index[match]


def seen_among(queries: Queries, listed_QK: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Mask of the listed items that each query has seen."""
    return is_among(np.arange(len(queries))[:, None] << 32 | listed_QK, seen_pairs(queries))


def first_listed(listed_QK: npt.NDArray[np.integer], k: int) -> npt.NDArray[np.integer]:
    """The first `k` non-zero items, in order, padded with 0."""
    return np.take_along_axis(listed_QK, columns_of_listed(listed_QK, k), 1)


def columns_of_listed(listed_QK: npt.NDArray[np.integer], k: int) -> npt.NDArray[np.intp]:
    """Columns `[Q, k]` of the first `k` non-zero items, in order, then columns of zeros."""
    return np.argsort(listed_QK == 0, axis=1, kind="stable")[:, :k]
