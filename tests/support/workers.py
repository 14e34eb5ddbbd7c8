"""Worker processes of tests, forked from one server that has imported torch."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import set_forkserver_preload
from typing import Any

from torch.multiprocessing.spawn import start_processes


def run_workers(function: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    """Call `function(rank, *args)` in `nprocs` processes, like torch's `spawn`, and wait for them."""
    set_forkserver_preload(["torch.distributed", "torch._dynamo", "trainer.task.registry", "trainer.loop"])
    start_processes(function, args, nprocs, start_method="forkserver")
