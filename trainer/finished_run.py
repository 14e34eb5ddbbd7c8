"""Opens a finished run: configuration, dataset, parameters of the selected epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from etl.dataset import REFIT_HOLDOUT, TRAIN_HOLDOUT, Dataset, open_dataset
from etl.runtime.errors import InputError
from etl.runtime.object_store import download_if_remote
from trainer.config import ENCODERS, HEADS, MODELS, TrainerConfig, from_dict
from trainer.inference.export import FeedbackPass
from trainer.prepare import read_config
from trainer.run import checkpoint
from trainer.run.folder import CHECKPOINTS, CONFIG, REFIT_CHECKPOINTS, SUMMARY, is_finished
from trainer.run.progress import Progress
from trainer.task.base import ModelTask
from trainer.task.task_epochs import feedback_passes
from trainer.training.step import TrainStep


def open_run(folder: str, data: str | None) -> tuple[TrainerConfig, Dataset]:
    """Configuration and dataset of a finished run, by path or URI; `data` overrides the dataset's location.

    Raises:
        InputError: the run is not finished, or the dataset is not the one it was trained on.
    """
    run = download_if_remote(folder, last_file=SUMMARY)
    if not is_finished(run):
        raise InputError(f"a finished run with {SUMMARY}", run, "set run to a folder written by python -m trainer")
    settled = read_config(run / CONFIG)
    fingerprint = settled.pop("dataset", "")
    try:
        typed = OmegaConf.merge(OmegaConf.structured(TrainerConfig), OmegaConf.create(settled))
        config = from_dict(cast(dict[str, Any], OmegaConf.to_container(typed)))
        config.output = folder  # the run may have moved
        if config.model not in MODELS or config.head not in HEADS or set(config.encoders) - set(ENCODERS):
            raise TypeError(f"model {config.model}, head {config.head}, encoder {config.encoder}")
    except (TypeError, OmegaConfBaseException) as error:
        problem = " ".join(str(error).split())
        raise InputError("a run of this version", problem, "train it again") from None
    dataset = open_dataset(data or config.data, verify=False)
    if dataset.manifest.fingerprint != fingerprint:
        raise InputError(f"dataset {fingerprint[:12]}", dataset.manifest.fingerprint[:12], "set data to that one")
    return config, dataset


def load_selected(run: Path, train_step: TrainStep) -> Progress:
    """Load the parameters of the selected epoch into a new train_step; returns the run's final progress.

    Raises:
        InputError: a checkpoint is missing or damaged.
    """
    folder = run / CHECKPOINTS
    newest = checkpoint.latest(folder)
    if newest is None:
        raise InputError("a complete checkpoint", folder, "train the run again")
    progress = checkpoint.read_progress(newest)
    checkpoint.load_best(folder, progress.best_step, train_step)
    return progress


def load_exported(run: Path, config: TrainerConfig, model_task: ModelTask, train_step: TrainStep) -> list[FeedbackPass]:
    """Load the parameters that `RUN/bundle` was exported with (of the refit, if any) into a new train_step.

    Returns:
        Export passes for feedback tasks scored with other checkpoints.
    """
    model_task.load_score_weights(run, REFIT_HOLDOUT if config.train.refit else TRAIN_HOLDOUT)
    refit = checkpoint.latest(run / REFIT_CHECKPOINTS) if config.train.refit else None
    if refit:
        checkpoint.load(refit, train_step)
        return []
    progress = load_selected(run, train_step)
    return feedback_passes(progress, run / CHECKPOINTS, model_task, train_step)
