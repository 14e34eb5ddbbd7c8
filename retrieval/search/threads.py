"""Parallel search: several batches at a time, one thread each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import faiss

Job = TypeVar("Job")
Result = TypeVar("Result")


def search_threads() -> int:
    """Number of threads for searching and counting: FAISS's setting in this thread."""
    return int(faiss.omp_get_max_threads())


def in_threads(work: Callable[[Job], Result], jobs: Sequence[Job], threads: int) -> list[Result]:
    """Map `work` over jobs, in order, on `threads` threads; a single job uses all of FAISS's threads.

    FAISS's thread count is per calling thread and defaults to all cores: without a limit T threads would search on
    T × cores.
    """
    if threads == 1 or len(jobs) == 1:
        return [work(job) for job in jobs]
    with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(work, jobs))
