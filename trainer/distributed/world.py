"""Rank, world size, device and collectives of a worker."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`: free memory at the heap's end, and blocks mapped one by one, in bytes."""

WAIT = timedelta(days=1)
"""How long workers wait for one that writes or copies alone; Ray notices one that is dead within a minute."""


@dataclass(frozen=True)
class World:
    """The workers of a run, seen from one of them.

    Without a process group (`size` 1) every reduction returns its input.

    Attributes:
        waits: the same workers as a gloo group with the timeout `WAIT`, for `gather` and `barrier`. What a step sends
            goes through the default group, whose timeout is short: a worker lost in a step ends the step.
    """

    global_rank: int
    size: int
    device: torch.device
    waits: Any = None

    @classmethod
    def alone(cls) -> World:
        """This process by itself, without Ray."""
        return cls(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    @classmethod
    def of_process_group(cls) -> World:
        """The initialised process group, and a second one for long waits; to be called by all workers."""
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        waits = dist.new_group(backend="gloo", timeout=WAIT)
        return cls(dist.get_rank(), dist.get_world_size(), device, waits)

    @property
    def is_first(self) -> bool:
        """Whether this worker writes what is written once."""
        return self.global_rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over workers in a step, the same bits on each."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """A small picklable value of every worker, in the order of ranks, however long one takes."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.waits)
        return values

    def barrier(self) -> None:
        """Wait for all workers, however long one takes."""
        if self.size > 1:
            dist.barrier(group=self.waits)


def set_threads(world: World) -> None:
    """Give each worker its share of this machine's cores.

    Ray sets OMP_NUM_THREADS from the CPUs it assigned; without Ray the process has all cores.
    """
    options = os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(int(options) if options else max(1, (os.cpu_count() or 1) // world.size))


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, instead of handing it back and faulting it in again."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 28)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)
