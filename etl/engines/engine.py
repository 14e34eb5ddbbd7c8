"""The engine interface: runs the job's tasks in local processes or on Spark.

Tasks and part numbers are the same in both, so the dataset has the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pyarrow as pa

from etl.config import EtlConfig, SparkOptions
from etl.engines.spark import is_submitted
from etl.logs.splits import COMPRESSION_RATIO, Split
from etl.stages.task_files import Job

LOCAL_BYTES = 512 << 20
"""Largest log for which starting Spark costs more than it saves."""

Task = Callable[[int], Any]
"""Processes the part with this number and returns a JSON value; its main output are files."""
MapSplit = Callable[[int], Iterator[pa.RecordBatch]]
"""Reads the split with this number and yields partial users."""
ReducePartition = Callable[[int, Iterator[pa.RecordBatch]], Any]
"""Takes the partial users of the partition with this number, in any order, and returns a JSON value."""


class Engine(Protocol):
    """Runs tasks; a task's `InputError` is re-raised in this process."""

    def map(self, task: Task, n: int) -> list[Any]:
        """Run `task(0)` to `task(n - 1)`; results in this order."""
        ...

    def map_reduce(self, map_split: MapSplit, n: int, reduce_partition: ReducePartition) -> list[Any]:
        """Run `map_split` over `n` splits, then `reduce_partition` over the partitions; results in partition order."""
        ...


@contextlib.contextmanager
def open_engine(config: EtlConfig, job: Job, splits: list[Split]) -> Iterator[Engine]:
    """The requested engine, or one that suits the size of the log; closed after the block.

    Raises:
        InputError: Spark is needed but there is no Java.
    """
    if runs_locally(config, splits):
        from etl.engines.local import local_engine

        with local_engine(job, len(splits), config.processes) as engine:
            yield engine
    else:
        from etl.engines.spark import spark_engine

        with spark_engine(job, config.spark, log_bytes(splits)) as engine:
            yield engine


def runs_locally(config: EtlConfig, splits: list[Split]) -> bool:
    """Whether to run without Spark: `engine=auto` uses Spark for large logs, or if Spark options are set."""
    if config.engine != "auto":
        return config.engine == "local"
    unpacked = sum((s.end - s.begin) * (COMPRESSION_RATIO if s.file.compression else 1) for s in splits)
    return unpacked <= LOCAL_BYTES and config.spark == SparkOptions() and not is_submitted()


def log_bytes(splits: list[Split]) -> int:
    """Bytes of the input on disk."""
    return sum(split.end - split.begin for split in splits)
