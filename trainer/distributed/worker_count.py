"""`ray.workers=auto`: chooses the number of workers by the amount of work."""

from __future__ import annotations

import os

from etl.dataset import Dataset
from etl.runtime.processes import n_cores
from trainer.config import TrainerConfig

WORKER_TARGETS = 2048
"""Minimum target clicks per worker and step: below, the gradient exchange costs more than another core saves."""
RAY_CLICKS = 5_000_000
"""Clicks of a run (all epochs) below which starting Ray takes longer than its workers save."""


def choose_workers(config: TrainerConfig, dataset: Dataset) -> None:
    """Replace `ray.workers=auto` by a number, and print it with the reason.

    Locally it is 0 (this process, all cores), unless two or more workers would each get `WORKER_TARGETS` target clicks
    per step and the run has `RAY_CLICKS`. On a cluster or GPUs it is a range, since the available number is not known
    before the run starts.
    """
    if config.ray.workers != "auto":
        return
    clicks = config.train.epochs * max(dataset.manifest.counts.get(name, 0) for name in ("clicks", "rows"))
    on_cluster_or_gpus = config.ray.use_gpu or "RAY_ADDRESS" in os.environ
    config.ray.workers = worker_count(
        config.train.batch_tokens, clicks, n_cores(), on_cluster_or_gpus=on_cluster_or_gpus
    )
    print(f"ray.workers=auto: {_described(config.ray.workers)} for {config.train.batch_tokens:,} targets a step")


def worker_count(batch_targets: int, clicks: int, cores: int, *, on_cluster_or_gpus: bool) -> int | list[int]:
    """Number of workers for a run.

    Args:
        batch_targets: target clicks per step.
        clicks: clicks of the run, over all epochs.
        cores: that this process may use.
        on_cluster_or_gpus: whether workers run on a cluster or GPUs, which needs at least one.

    Returns:
        A number, or minimum and maximum.
    """
    useful_workers = batch_targets // WORKER_TARGETS
    if on_cluster_or_gpus:
        return [1, max(1, useful_workers)]
    return min(useful_workers, cores) if min(useful_workers, cores) >= 2 and clicks >= RAY_CLICKS else 0


def _described(workers: int | list[int]) -> str:
    if isinstance(workers, list):
        return f"{workers[0]} to {workers[1]} Ray workers"
    return f"{workers} Ray workers" if workers else "this process alone"
