"""Diagnostics of a dataset before training: how well counted transitions predict the next click."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from etl.dataset import TRAIN_HOLDOUT
from etl.runtime.arrays import IntArray
from etl.runtime.hashing import multiplicative_hash
from etl.runtime.lookup import lookup

SAMPLED_SESSIONS = 20_000
SAMPLED_CLICKS = 5_000_000
"""Maximum train clicks for the branching; larger datasets use an even sample of items."""
SHARES = ("from_last", "from_last_three", "from_any", "from_random", "repeats")
FILTER_BITS = 24


def diagnose(paths: list[Path]) -> dict[str, float | int | None]:
    """Shares of test targets covered by train transitions, over an even sample of sessions.

    A transition is a pair of consecutive train clicks (positions 1…n-2) of any session. The test query sees the clicks
    1…n-1.

    Args:
        paths: session files.

    Returns:
        `sessions`: number sampled, of two clicks or more; `from_last`, `from_last_three`, `from_any`: share of test
        targets that follow, in train, the last visible click, one of the last three, any visible click; `from_random`:
        the same for a random visible click, an estimate of `from_last` under shuffled order; `repeats`: share of
        targets among the visible clicks; `branching`: mean number of different items that follow an item in train.
        All null without sessions.
    """
    rows = sum(pq.ParquetFile(path).metadata.num_rows for path in paths)
    stride = max(1, -(-rows // SAMPLED_SESSIONS))
    samples, clicks, begin = [], 0, 0
    for offset, item in _sessions(paths):
        index = np.arange(-begin % stride, len(offset) - 1, stride)
        # Copies: a view would keep all clicks of the row group in memory.
        samples += [item[offset[i] : offset[i + 1]].copy() for i in index if offset[i + 1] - offset[i] > 1]
        begin += len(offset) - 1
        clicks += len(item)
    if not samples:
        return {"sessions": 0, **dict.fromkeys((*SHARES, "branching"))}
    pairs = np.unique(np.concatenate([_keys(session[:-1], session[-1]) for session in samples]))
    counted, branching = _count(paths, pairs, max(1, clicks // SAMPLED_CLICKS))
    known = pairs[counted]
    hits, chosen = np.zeros(5), multiplicative_hash(np.arange(len(samples)), FILTER_BITS)
    for number, session in enumerate(samples):
        visible, target = session[:-1], session[-1]
        follows = lookup(known, _keys(visible, target))[1]
        random = follows[chosen[number] % len(follows)]
        hits += [follows[-1], follows[-3:].any(), follows.any(), random, target in visible]
    shares = (hits / len(samples)).tolist()
    return {"sessions": len(samples), **dict(zip(SHARES, shares, strict=True)), "branching": branching}


def _sessions(paths: list[Path]) -> Iterator[tuple[IntArray, IntArray]]:
    """Offsets and items of sessions, one row group at a time."""
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(columns=["items"]):
            column = batch.column(0)
            offset = column.offsets.to_numpy().astype(np.int64)
            yield offset - offset[0], column.flatten().to_numpy().astype(np.int64)


def _keys(source_N: Any, target_N: Any) -> IntArray:
    """Encode pairs of items as one number."""
    return np.asarray(source_N, np.int64) << 32 | np.asarray(target_N, np.int64)


def _distinct(value_N: IntArray) -> IntArray:
    """Distinct values, sorted: takes a third of the time of np.unique, which hashes, if most values are distinct."""
    value_N = np.sort(value_N)
    return value_N[np.diff(value_N, prepend=value_N[:1] - 1) > 0]


def _count(paths: list[Path], pairs: IntArray, every: int) -> tuple[npt.NDArray[np.bool_], float | None]:
    """Mask of the sorted `pairs` that are train transitions, and the branching of one item in `every`."""
    counted = np.zeros(len(pairs), bool)
    # Few transitions are among the pairs: a bitmap of hashes filters most of them out before the search.
    candidate = np.zeros(1 << FILTER_BITS, bool)
    candidate[multiplicative_hash(pairs, FILTER_BITS)] = True
    sampled = []
    for offset, item in _sessions(paths):
        train = np.ones(len(item), bool)
        train[offset[:-1]] = False  # first clicks have no predecessor
        for back in range(1, TRAIN_HOLDOUT + 1):
            train[offset[1:] - back] = False
        at = np.flatnonzero(train)
        key = _keys(item[at - 1], item[at])
        sampled.append(_distinct(key[multiplicative_hash(item[at - 1], FILTER_BITS) % every == 0]))
        key = key[candidate[multiplicative_hash(key, FILTER_BITS)]]
        index, match = lookup(pairs, key)
        counted[index[match]] = True
    distinct = _distinct(np.concatenate(sampled))
    sources = len(_distinct(distinct >> 32))
    return counted, len(distinct) / sources if sources else None
