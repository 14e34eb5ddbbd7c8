"""Exact maximum-inner-product search in bounded memory: the yardstick for every index."""

from __future__ import annotations

import faiss
import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def search_exact(item_CD: Vectors, query_QD: Vectors, k: int) -> tuple[npt.NDArray[np.float32], Ids]:
    """The `k` best rows of `item_CD` for each query, best first.

    FAISS multiplies in blocks and keeps a heap for each query, so memory does not grow with C × Q.

    Returns:
        Scores float32 `[Q, k]` and rows int64 `[Q, k]`; -1 where C < k.
    """
    return faiss.knn(query_QD, item_CD, k, metric=faiss.METRIC_INNER_PRODUCT)


def rescore(item_CD: Vectors, query_QD: Vectors, row_QK: Ids, *, chunk_rows: int = 1 << 19) -> npt.NDArray[np.float64]:
    """Inner products of each query with its listed rows, in float64; -inf where a row is -1.

    Blocked matrix multiplication rounds the same vector differently in different places. Here every
    product is summed in the same order, so that items with equal vectors have equal scores and the
    tie rule means something.
    """
    score = np.empty(row_QK.shape)
    step = max(1, chunk_rows // max(row_QK.shape[1], 1))
    for begin in range(0, len(query_QD), step):
        rows = row_QK[begin : begin + step]
        query = query_QD[begin : begin + step].astype(np.float64)
        score[begin : begin + step] = np.einsum("qkd,qd->qk", item_CD[rows].astype(np.float64), query)
    score[row_QK < 0] = -np.inf
    return score
