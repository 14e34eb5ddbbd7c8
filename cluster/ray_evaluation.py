"""Distributed evaluation: one Ray task per part of the queries.

The index is prepared once and memory-mapped by each worker; Ray retries a lost task on another machine. The result is
that of a single process: the same parts are merged in the same order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from etl.runtime.errors import InputError
from etl.runtime.progress import ProgressLine
from retrieval.config import RetrievalConfig
from retrieval.evaluate import evaluate, reopen
from retrieval.evaluation import Evaluation
from retrieval.parts import Part
from retrieval.rank_part import run_part
from trainer.ray_train import ray_session

PROGRESS_SECONDS = 5.0
TASK_RETRIES = 10
"""Maximum retries of a part whose machine was lost."""

_opened: dict[str, Evaluation] = {}
"""This worker's evaluation, cached between its tasks."""


def make_part(config: RetrievalConfig, part: Part, folder: Path) -> InputError | None:
    """Compute a part in a Ray worker; user errors are returned, so that Ray does not retry."""
    try:
        key = repr(config)
        if key not in _opened:
            _opened.clear()
            _opened[key] = reopen(config)
        run_part(_opened[key], part, folder)
    except InputError as error:
        return error
    return None


def run_on_ray(evaluation: Evaluation, parts: list[Part], folder: Path) -> None:
    """Compute all parts as Ray tasks, with progress.

    Raises:
        InputError: an input error in a task.
    """
    task = ray.remote(num_cpus=1, max_retries=TASK_RETRIES)(make_part)
    line, done = ProgressLine(), 0
    rows = {task.remote(evaluation.config, part, folder): evaluation.ranked(part) for part in parts}
    waiting, total = list(rows), sum(rows.values())
    while waiting:
        ready, waiting = ray.wait(waiting, timeout=PROGRESS_SECONDS)
        for reference in ready:
            if problem := ray.get(reference):
                raise problem
            done += rows[reference]
        line.update("evaluating", done, total, "queries")
    line.close()


def evaluate_on_ray(config: RetrievalConfig) -> dict[str, Any]:
    """Write the result folder `config.output` on the cluster at RAY_ADDRESS, and return its metrics."""
    with ray_session():
        return evaluate(config, run_on_ray)
