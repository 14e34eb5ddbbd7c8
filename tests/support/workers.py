"""Worker processes of tests, forked from one server that has imported torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from trainer.config import TrainerConfig
from trainer.distributed.world import World
from trainer.loop import train


def run_workers(function: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    """Call `function(rank, *args)` in `nprocs` processes, like torch's `spawn`, and wait for them."""
    set_forkserver_preload(["torch.distributed", "torch._dynamo", "trainer.task.registry", "trainer.loop"])
    start_processes(function, args, nprocs, start_method="forkserver")


def train_on_two(meet: Path, config: TrainerConfig) -> None:
    """Train with two workers of one thread, which meet at a new file."""
    run_workers(_train, (meet, config), nprocs=2)


def _train(rank: int, meet: Path, config: TrainerConfig) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    train(config, World.from_process_group())
    os._exit(0)
