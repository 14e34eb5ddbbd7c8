"""The engine interface: runs the job's tasks in local processes or on Spark.

The tasks and the numbers of their parts are the same in both, so the dataset has the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pyarrow as pa

from etl.config import EtlConfig, SparkOptions
from etl.engines.spark import is_submitted
from etl.logs.splits import Split
from etl.stages.task_files import Job

LOCAL_BYTES = 512 << 20
"""Log up to which starting Spark costs more than it saves."""
COMPRESSED = 8
"""How often a compressed log's bytes count: about what it unpacks to."""

Task = Callable[[int], Any]
"""Does the part of this number and returns a JSON value; files are its true output."""
Combine = Callable[[int], Iterator[pa.RecordBatch]]
"""Reads the split of this number and yields partial users."""
Gather = Callable[[int, Iterator[pa.RecordBatch]], Any]
"""Takes the partial users of the partition of this number, in any order, and returns a JSON value."""


class Engine(Protocol):
    """Runs tasks; an `InputError` of a task is raised here as if the task had run here."""

    def map(self, task: Task, n: int) -> list[Any]:
        """`task(0)` to `task(n - 1)`, results in this order."""
        ...

    def shuffle(self, combine: Combine, n: int, gather: Gather) -> list[Any]:
        """`combine` over `n` splits, then `gather` over the job's partitions, results in their order."""
        ...


@contextlib.contextmanager
def open_engine(config: EtlConfig, job: Job, splits: list[Split]) -> Iterator[Engine]:
    """The engine that the options name, or that suits the size of the log; it ends with the block.

    Raises:
        InputError: Spark is to run and there is no Java.
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
    """Whether the job needs no Spark: `engine=auto` takes it for large logs and whoever sets it up."""
    if config.engine != "auto":
        return config.engine == "local"
    unpacked = sum((s.end - s.begin) * (COMPRESSED if s.file.compression else 1) for s in splits)
    return unpacked <= LOCAL_BYTES and config.spark == SparkOptions() and not is_submitted()


def log_bytes(splits: list[Split]) -> int:
    """Bytes of the input as it lies."""
    return sum(split.end - split.begin for split in splits)
