"""Selection of the best epoch per feedback task (`train.best_epoch_by_task`)."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trainer.inference.export import FeedbackPass
from trainer.inference.scorer import RankScorer, SessionScorer
from trainer.run import checkpoint
from trainer.run.progress import Progress
from trainer.task.base import ModelTask
from trainer.training.step import TrainStep


def update_best_by_task(progress: Progress, metrics: dict[str, Any]) -> None:
    """Record the epoch that has just ended for each feedback task with a new highest valid AUC."""
    for name, value in metrics.items():
        task = name.removeprefix("auc/")
        if task == name or value is None or not math.isfinite(value):
            continue
        if task not in progress.best_by_task or value > progress.best_by_task[task][2]:
            # Copied, since a checkpoint that is being written holds the old dictionary.
            progress.best_by_task = progress.best_by_task | {task: (progress.epoch, progress.step, value)}


def feedback_passes(
    progress: Progress, checkpoints: Path, model_task: ModelTask, train_step: TrainStep
) -> list[FeedbackPass]:
    """Export passes for the tasks whose best epoch is not the run's, by ascending step."""
    tasks: dict[int, list[str]] = {}
    for task, (_, step, _) in progress.best_by_task.items():
        if step != progress.best_step:
            tasks.setdefault(step, []).append(task)

    def load(step: int) -> SessionScorer | RankScorer:
        checkpoint.load_best(checkpoints, step, train_step)
        return model_task.scorer(train_step)

    return [FeedbackPass(tasks[step], partial(load, step)) for step in sorted(tasks)]


def with_best_aucs(metrics: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Validation metrics of the selected epoch, with each task's AUC from its own best epoch, and their mean."""
    if not progress.best_by_task:
        return metrics
    metrics = metrics | {f"auc/{task}": score for task, (_, _, score) in progress.best_by_task.items()}
    aucs = [value for name, value in metrics.items() if name.startswith("auc/") and value is not None]
    return metrics | {"auc": float(np.mean(aucs))}
