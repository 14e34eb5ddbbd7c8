"""Rank, world size, device and collectives of a worker."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from etl.runtime.processes import n_cores

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`, in bytes: thresholds for trimming the heap and for using mmap."""

WAIT = timedelta(days=1)
"""Timeout while one worker writes or copies; Ray detects a dead worker within a minute."""


def do_not_report(*_: Any, **__: Any) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class World:
    """The workers of a run, from the view of one of them.

    Without a process group (`size` 1) collectives return their input.

    Attributes:
        long_timeout_group: gloo group of the same workers with timeout `WAIT`, for `gather` and `barrier`. Training
            steps use the default group, whose timeout is short, so that losing a worker ends the step.
        report: shows what the run does, with the arguments of `ProgressFile.write`; does nothing on other workers and
            outside of runs.
    """

    global_rank: int
    size: int
    device: torch.device
    long_timeout_group: Any = None
    report: Callable[..., None] = do_not_report

    @classmethod
    def alone(cls) -> World:
        """A single process, without Ray."""
        return cls(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    @classmethod
    def from_process_group(cls) -> World:
        """From the initialised process group; creates a second group for long waits. Collective."""
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        long_timeout_group = dist.new_group(backend="gloo", timeout=WAIT)
        return cls(dist.get_rank(), dist.get_world_size(), device, long_timeout_group)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes shared files."""
        return self.global_rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """All-reduce (sum) within a step, bit-identical on all workers."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """All-gather a small picklable value, in the order of ranks; waits up to `WAIT`."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.long_timeout_group)
        return values

    def barrier(self) -> None:
        """Wait for all workers, up to `WAIT`."""
        if self.size > 1:
            dist.barrier(group=self.long_timeout_group)


def set_threads(world: World) -> None:
    """Give each worker its share of this machine's cores.

    Ray sets OMP_NUM_THREADS to the CPUs it assigned; without Ray the process uses all cores.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(int(threads) if threads else max(1, n_cores() // world.size))


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step instead of returning it and page-faulting it in again."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 28)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
