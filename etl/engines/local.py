"""The local engine: tasks in this process, or in a pool of worker processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from etl.runtime.files import atomic_file
from etl.runtime.processes import n_cores, process_pool
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
    with process_pool(n, "free memory, or take fewer: processes=1") as pool:
        yield LocalEngine(job, pool)


class LocalEngine:
    """Runs tasks sequentially, or in a process pool."""

    def __init__(self, job: Job, pool: Executor | None) -> None:
        self.job, self.pool = job, pool

    def map(self, task: Callable[[int], Any], n: int) -> list[Any]:
        """Run `task(0)` to `task(n - 1)`; results in this order."""
        return list((self.pool.map if self.pool else map)(task, range(n)))

    def map_reduce(
        self,
        map_split: Callable[[int], Iterator[pa.RecordBatch]],
        n: int,
        reduce_partition: Callable[[int, Iterator[pa.RecordBatch]], Any],
    ) -> list[Any]:
        """Run `map_split` over `n` splits, then `reduce_partition` over the partitions; results in partition order."""
        self.map(partial(_write_partial, self.job, map_split), n)
        return self.map(partial(_reduce, self.job, reduce_partition, n), self.job.partitions)


def _write_partial(job: Job, map_split: Callable[[int], Iterator[pa.RecordBatch]], split: int) -> None:
    """Write the output of `map_split` for a split, for all partitions, as one Arrow file."""
    from etl.stages.read_split import PARTIAL_SCHEMA

    with atomic_file(job.work(PARTIAL, split, "arrow")) as path, pa.ipc.new_file(str(path), PARTIAL_SCHEMA) as writer:
        for batch in map_split(split):
            writer.write_batch(batch)


def _reduce(job: Job, reduce_partition: Callable[[int, Iterator[pa.RecordBatch]], Any], n: int, partition: int) -> Any:
    return reduce_partition(partition, partial_users(job, n, partition))


def partial_users(job: Job, n: int, partition: int) -> Iterator[pa.RecordBatch]:
    """Read a partition's records from the files of `n` splits, skipping those of other partitions."""
    for split in range(n):
        with pa.memory_map(str(job.work(PARTIAL, split, "arrow"))) as file:
            reader = pa.ipc.open_file(file)
            for index in range(reader.num_record_batches):
                batch = reader.get_batch(index)
                for row in np.flatnonzero(batch.column("partition").to_numpy() == partition):
                    yield batch.slice(row, 1)
