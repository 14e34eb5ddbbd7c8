"""Writes a twin as CSV: chunks of users in parallel, their rows interleaved as in the real log.

A user's rows are cut into blocks, which get random times in order. The log is written as `SEGMENTS` time segments in
parallel: each chunk of users adds its blocks to every segment, so memory holds only a few chunks whatever the size of
the log, and a user's rows are spread over it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from etl.logs.tenrec import SCENARIOS
from etl.logs.tenrec_published import PUBLISHED
from etl.runtime.arrays import IntArray
from etl.runtime.processes import n_cores, process_pool
from etl.twin.columns import columns
from etl.twin.history import with_history
from etl.twin.rows import rows_of
from etl.twin.simulate import USERS_PER_CHUNK, Twin

SEGMENTS = 10
USERS_PER_WINDOW = 10_000
"""Number of users whose blocks are interleaved: the first 100,000 rows of QK-video have some 8,000 users."""


def write(twin: Twin, stream: IO[bytes], scratch: Path, *, history: bool = False) -> int:
    """Write the log; its bytes do not depend on the number of cores.

    Args:
        twin: the twin to write.
        stream: output stream.
        scratch: path next to which temporary files are written (nine tenths of the log's size).
        history: whether to write scenario `ctr`.

    Returns:
        The number of rows.
    """
    chunks = range(-(-twin.users // USERS_PER_CHUNK))
    names = [scratch.with_name(f".{scratch.name}.{os.getpid()}.{segment}") for segment in range(1, segments(twin))]
    rows = 0
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.callback(name.unlink, missing_ok=True)
        streams = [stream, *(stack.enter_context(name.open("wb")) for name in names)]
        header = SCENARIOS["ctr" if history else twin.scenario].columns
        streams[0].write((",".join(header) + "\n").encode())
        # One chunk needs no processes.
        pool = stack.enter_context(process_pool(n_cores(), "free memory, run again")) if len(chunks) > 1 else None
        jobs = [(twin, chunk, history) for chunk in chunks]
        for count, texts in _in_order(pool, jobs) if pool else [_chunk_csv(*jobs[0])]:
            for segment, text in zip(streams, texts, strict=True):
                segment.write(text)
            rows += count
        for segment, name in zip(streams[1:], names, strict=True):
            segment.close()
            with name.open("rb") as part:
                shutil.copyfileobj(part, stream, 16 << 20)
            name.unlink()
    return rows


def segments(twin: Twin) -> int:
    """Number of time segments; 1 if each user's rows are contiguous."""
    return SEGMENTS if twin.blocks > 1 else 1


def interleaved(twin: Twin, chunk: int, user_R: IntArray) -> tuple[IntArray, IntArray]:
    """The order of a chunk's rows in the log.

    Args:
        twin: gives the mean number of blocks per user.
        chunk: number of the chunk.
        user_R: user of each row, in time order within a user.

    Returns:
        Row numbers in the order of the log `[R]`, and the end of each segment in them `[segments]`.
    """
    n = len(user_R)
    if segments(twin) == 1:
        return np.arange(n), np.array([n])
    rng = np.random.default_rng([twin.process.seed, chunk + 1, 5])
    published = PUBLISHED[twin.scenario]
    cut = rng.random(n) < (twin.blocks - 1) / (published.exposures / published.users - 1)
    cut[:1] = True
    cut[1:] |= user_R[1:] != user_R[:-1]
    begin = np.flatnonzero(cut)
    length, user = np.diff(np.append(begin, n)), user_R[begin]
    time = rng.random(len(begin))
    time = time[np.lexsort((time, user))]  # keep a user's blocks in order
    segment = (time * SEGMENTS).astype(np.int64)
    order = np.lexsort((time, user // USERS_PER_WINDOW, segment))
    length = length[order]
    through = np.cumsum(length)
    row = np.arange(n) + np.repeat(begin[order] - (through - length), length)
    last = np.searchsorted(segment[order], np.arange(SEGMENTS), side="right")
    return row, np.append(0, through)[last]


def _in_order(pool: Executor, jobs: list[tuple[Twin, int, bool]]) -> Iterator[tuple[int, list[bytes]]]:
    """Chunks in order, with limited read-ahead to bound memory if the disk is slower than the cores."""
    ahead: deque[Future[tuple[int, list[bytes]]]] = deque()
    for job in jobs:
        ahead.append(pool.submit(_chunk_csv, *job))
        if len(ahead) > 2 * n_cores():
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _chunk_csv(twin: Twin, chunk: int, history: bool) -> tuple[int, list[bytes]]:
    """A chunk's number of rows, and its CSV for each segment."""
    rows = rows_of(twin, chunk)
    table = pa.table(columns(twin, chunk, rows), names=list(SCENARIOS[twin.scenario].columns))
    user = rows["user"]
    if history:
        table, user = with_history(table, user, rows["position"])
    order, ends = interleaved(twin, chunk, user)
    if segments(twin) > 1:
        table = table.take(pa.array(order))
    texts = []
    for begin, end in itertools.pairwise([0, *ends.tolist()]):
        sink = pa.BufferOutputStream()
        options = pa_csv.WriteOptions(include_header=False, quoting_style="none")
        pa_csv.write_csv(table.slice(begin, end - begin), sink, options)
        texts.append(sink.getvalue().to_pybytes())
    return len(table), texts
