"""Search threads: parallel jobs use no more cores than a single one."""

import threading

import faiss
import pytest

from retrieval.search.threads import in_threads, search_threads


@pytest.fixture(params=[1, 3])
def threads(request):
    before = search_threads()
    faiss.omp_set_num_threads(request.param)
    yield request.param
    faiss.omp_set_num_threads(before)


def test_parallel_jobs_get_one_thread_each_and_keep_their_order(threads):
    seen = set()

    def work(job):
        seen.add(threading.get_ident())
        return job, search_threads()

    assert in_threads(work, range(7), threads) == [(job, 1) for job in range(7)]
    assert len(seen) <= threads
    assert in_threads(work, [5], threads) == [(5, threads)]  # a single job gets all threads
    assert in_threads(work, [], threads) == []
