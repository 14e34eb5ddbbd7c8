"""The local engine: tasks in this process, or in a pool of worker processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from etl.runtime.errors import InputError
from etl.runtime.files import atomic_file
from etl.stages.task_files import Job

PARTIAL = "partial"
"""Work file kind of the partial users of a split."""


@contextlib.contextmanager
def local_engine(job: Job, n_splits: int, processes: int | None) -> Iterator[LocalEngine]:
    """An engine with `processes` processes (null: one per core), at most one per task.

    Raises:
        InputError: a worker process was killed.
    """
    n = min(processes or n_cores(), max(n_splits, job.partitions))
    if n == 1:
        yield LocalEngine(job, None)
        return
    # Spawn: a process with Arrow threads must not be forked.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(n, context, initializer=_start_worker)
    try:
        yield LocalEngine(job, pool)
    except BrokenProcessPool:
        hint = "free memory, or take fewer: processes=1"
        raise InputError(f"{n} worker processes until the job's end", "one that was killed", hint) from None
    finally:
        pool.shutdown(cancel_futures=True)


def n_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    """Ignore Ctrl-C, and exit when the parent exits for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class LocalEngine:
    """Runs tasks sequentially, or in a process pool."""

    def __init__(self, job: Job, pool: Executor | None) -> None:
        self.job, self.pool = job, pool

    def map(self, task: Callable[[int], Any], n: int) -> list[Any]:
        """Run `task(0)` to `task(n - 1)`; results in this order."""
        return list((self.pool.map if self.pool else map)(task, range(n)))

    def shuffle(
        self,
        combine: Callable[[int], Iterator[pa.RecordBatch]],
        n: int,
        gather: Callable[[int, Iterator[pa.RecordBatch]], Any],
    ) -> list[Any]:
        """Run `combine` over `n` splits, then `gather` over the job's partitions; results in partition order."""
        self.map(partial(_write_partial, self.job, combine), n)
        return self.map(partial(_gather, self.job, gather, n), self.job.partitions)


def _write_partial(job: Job, combine: Callable[[int], Iterator[pa.RecordBatch]], split: int) -> None:
    """Write the output of `combine` for a split, for all partitions, as one Arrow file."""
    from etl.stages.read_split import PARTIAL_SCHEMA

    with atomic_file(job.work(PARTIAL, split, "arrow")) as path, pa.ipc.new_file(str(path), PARTIAL_SCHEMA) as writer:
        for batch in combine(split):
            writer.write_batch(batch)


def _gather(job: Job, gather: Callable[[int, Iterator[pa.RecordBatch]], Any], n: int, partition: int) -> Any:
    return gather(partition, partial_users(job, n, partition))


def partial_users(job: Job, n: int, partition: int) -> Iterator[pa.RecordBatch]:
    """Read a partition's records from the files of `n` splits, skipping those of other partitions."""
    for split in range(n):
        with pa.memory_map(str(job.work(PARTIAL, split, "arrow"))) as file:
            reader = pa.ipc.open_file(file)
            for index in range(reader.num_record_batches):
                batch = reader.get_batch(index)
                for row in np.flatnonzero(batch.column("partition").to_numpy() == partition):
                    yield batch.slice(row, 1)
