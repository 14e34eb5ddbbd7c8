"""`ray.workers=auto`: the number of workers from the size of the work."""

from __future__ import annotations

import os

from etl.dataset import Dataset
from trainer.config import TrainerConfig

WORKER_TARGETS = 2048
"""Target clicks of a step for each worker: with fewer, exchanging gradients costs more than a further core saves."""
RAY_CLICKS = 5_000_000
"""Clicks of a complete run below which starting Ray takes longer than its workers save."""


def choose_workers(config: TrainerConfig, dataset: Dataset) -> None:
    """Replace `ray.workers=auto` by a number, saying in one line which and why.

    On this machine that is 0, this process with all cores, unless each of two or more cores would have `WORKER_TARGETS`
    target clicks of a step and the run goes through `RAY_CLICKS`. On a cluster, and on GPUs, it is a range, since how
    many of them there are is not known before the run starts.
    """
    if config.ray.workers != "auto":
        return
    clicks = config.train.epochs * max(dataset.manifest.counts.get(name, 0) for name in ("clicks", "rows"))
    elsewhere = config.ray.use_gpu or "RAY_ADDRESS" in os.environ
    config.ray.workers = worker_count(config.train.batch_tokens, clicks, os.cpu_count() or 1, elsewhere=elsewhere)
    print(f"ray.workers=auto: {_described(config.ray.workers)} for {config.train.batch_tokens:,} targets a step")


def worker_count(batch_targets: int, clicks: int, cores: int, *, elsewhere: bool) -> int | list[int]:
    """Workers for a run.

    Args:
        batch_targets: target clicks of a step.
        clicks: that the run goes through, over all epochs.
        cores: of this machine.
        elsewhere: the workers run on a cluster or on GPUs: at least one is needed.

    Returns:
        A number, or least and most.
    """
    worth = batch_targets // WORKER_TARGETS
    if elsewhere:
        return [1, max(1, worth)]
    return min(worth, cores) if min(worth, cores) >= 2 and clicks >= RAY_CLICKS else 0


def _described(workers: int | list[int]) -> str:
    if isinstance(workers, list):
        return f"{workers[0]} to {workers[1]} Ray workers"
    return f"{workers} Ray workers" if workers else "this process alone"
