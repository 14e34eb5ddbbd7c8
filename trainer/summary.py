"""`summary.json` and `diagnostics.json` of a run."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import torch

from etl.dataset import Dataset
from etl.runtime.files import write_json
from trainer.config import TrainerConfig
from trainer.inference.popularity_weight import read_weight
from trainer.inference.validation import Validation
from trainer.models.recommender import Recommender
from trainer.run.folder import SUMMARY
from trainer.run.metrics_log import METRICS, read_metrics
from trainer.run.progress import Progress
from trainer.training.step import TrainStep

DIAGNOSTICS = "diagnostics.json"


def write_diagnostics(run: Path, validation: Validation, train_step: TrainStep) -> None:
    """Write `diagnostics.json`: curves by epoch, gates and their entropy, for the report."""
    curves: dict[str, list[list[float]]] = {}
    for line in read_metrics(run / METRICS):
        if line["split"] in ("valid", "train-epoch") and line["value"] is not None:
            curves.setdefault(f"{line['split'].removesuffix('-epoch')}/{line['name']}", []).append(
                [line["epoch"], line["value"]]
            )
    gates = {
        "tasks": train_step.tasks,
        "mean_weight": validation.gates,
        "entropy_nats": validation.entropy,
        "largest_weight_share": validation.leads,
    }
    write_json(run / DIAGNOSTICS, {"curves": curves, "gates": gates if validation.gates else None})


def write_summary(
    run: Path,
    config: TrainerConfig,
    dataset: Dataset,
    train_step: TrainStep,
    progress: Progress,
    validation: Validation,
) -> None:
    """Write `summary.json`, last: it marks the run as finished."""
    flops, weight = forward_flops(config, dataset, train_step), config.network.popularity_weight
    write_json(
        run / SUMMARY,
        {
            "model": config.model,
            "tasks": train_step.tasks,
            "seed": config.seed,
            "recipe": config.recipe,
            "best_epoch": progress.best_epoch,
            "best_epoch_by_metric": best_epochs(run),
            "epoch_by_task": {task: epoch for task, (epoch, *_) in progress.best_by_task.items()},
            "epochs": progress.epoch,
            "steps": progress.step,
            "valid": validation.metrics,
            "mask_seen": validation.mask_seen,
            "examples_per_second": progress.examples / progress.seconds if progress.seconds else None,
            "seconds": progress.seconds,
            "parameters": parameter_counts(train_step),
            # A backward pass costs twice as much as the forward pass.
            "flops_per_example": 3 * sum(flops.values()),
            "flops_forward_by_part": flops,
            "n_items": dataset.manifest.n_items,
            "dataset": dataset.manifest.fingerprint,
            "refit": config.train.refit,
            "popularity_weight": read_weight(run) if weight is None else weight,
            "workers": train_step.world.size,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        },
    )


def parameter_counts(train_step: TrainStep) -> dict[str, int]:
    """Parameter counts of each table, of the networks, and in total."""
    counts = {name: table.parameters() for name, table in train_step.tables.items()}
    counts["networks"] = sum(p.numel() for p in train_step.model.parameters())
    return counts | {"total": sum(counts.values())}


def forward_flops(config: TrainerConfig, dataset: Dataset, train_step: TrainStep) -> dict[str, int]:
    """FLOPs (multiply-adds × 2) of one example's forward pass, by part; at half the maximum session length."""
    if not isinstance(train_step.model, Recommender):
        return train_step.model.flops()
    candidates = dataset.manifest.n_items if config.loss == "softmax" else config.train.negatives
    clicks = max(1, dataset.manifest.max_clicks // 2)
    return train_step.model.flops(candidates=candidates, embedding_dim=config.network.embedding_dim, clicks=clicks)


def best_epochs(run: Path) -> dict[str, int]:
    """The epoch in which each valid metric was highest."""
    best: dict[str, tuple[float, int]] = {}
    for line in read_metrics(run / METRICS):
        if line["split"] == "valid" and line["value"] is not None:
            best[line["name"]] = max(best.get(line["name"], (-1.0, 0)), (line["value"], -line["epoch"]))
    return {name: -epoch for name, (_, epoch) in best.items()}
