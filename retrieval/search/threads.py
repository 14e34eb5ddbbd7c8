"""Threads of a search: several batches at a time, each on one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import faiss

Job = TypeVar("Job")
Result = TypeVar("Result")


def search_threads() -> int:
    """Threads that searches and counts run on: as many as FAISS is set to in this thread."""
    return int(faiss.omp_get_max_threads())


def in_threads(work: Callable[[Job], Result], jobs: Sequence[Job], threads: int) -> list[Result]:
    """`work` of every job, in order, so many at a time; one job alone has all of FAISS's threads.

    FAISS keeps the number of threads apart for every thread that calls it, and a new one begins with all cores: without
    a limit T threads would search on T × cores.
    """
    if threads == 1 or len(jobs) == 1:
        return [work(job) for job in jobs]
    with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(work, jobs))
