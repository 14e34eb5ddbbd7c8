"""The training loop: resume; while epochs remain: train, validate, save the best, stop early; export."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from etl.dataset import REFIT_HOLDOUT, TRAIN_HOLDOUT, Dataset, open_dataset
from etl.runtime.arrays import IntArray
from etl.runtime.errors import InputError
from etl.runtime.locks import locked
from retrieval.bundle_folder import RUN_BUNDLE, SELECTED
from trainer.config import TrainerConfig
from trainer.data.hashing import mix
from trainer.data.order import share
from trainer.data.prefetch import Prefetch
from trainer.data.reader import GlobalBatch, Reader
from trainer.distributed.world import World, keep_freed_memory, set_threads
from trainer.inference.export import export
from trainer.inference.validation import Validation
from trainer.run import checkpoint
from trainer.run.folder import CHECKPOINTS, REFIT_CHECKPOINTS
from trainer.run.lost_checkpoints import replace_lost_best
from trainer.run.metrics_log import Meter, RunLog, mean_losses
from trainer.run.profiling import Profiler
from trainer.run.progress import Progress
from trainer.run.progress_file import reporting
from trainer.run.run_folder import RunFolder
from trainer.run.signals import Stopped, StopWatch, stop_requested
from trainer.summary import parameter_counts, write_diagnostics, write_summary
from trainer.task.base import ModelTask
from trainer.task.registry import model_task_of
from trainer.task.task_epochs import feedback_passes, update_best_by_task, with_best_aucs
from trainer.training.step import TrainStep

LOG_STEPS = 50


@dataclass(frozen=True)
class Phase:
    """A training phase: model selection holds out the last two clicks, a refit only the test click."""

    name: str
    holdout: int
    epochs: int
    validates: bool

    def checkpoints(self, run: Path) -> Path:
        """Folder of the phase's checkpoints."""
        return run / (CHECKPOINTS if self.validates else REFIT_CHECKPOINTS)


@dataclass(frozen=True)
class Selected:
    """A model after its training with selection: the best epoch's parameters and their validation."""

    model_task: ModelTask
    train_step: TrainStep
    progress: Progress
    phase: Phase
    validation: Validation


def train(config: TrainerConfig, world: World, on_epoch: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Train, select, export: the complete run, on each worker.

    Args:
        config: the resolved configuration; `output` is on storage that all workers share, or in an object store.
        world: the workers.
        on_epoch: called with the validation metrics after each epoch, on every worker.
    """
    set_threads(world)
    keep_freed_memory()
    if world.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as documented for train.precision
    run = RunFolder.of(config.output)
    run.pull_on_all(world)
    dataset = open_dataset(config.data, verify=False)
    if world.is_first:
        # A worker of a killed run may still be alive: two must not write the same checkpoints.
        with locked(run.path / CHECKPOINTS, wait_seconds=120.0), reporting(run, world) as world:
            _train(config, dataset, run, world, on_epoch)
    else:
        _train(config, dataset, run, world, on_epoch)


def select(
    config: TrainerConfig, world: World, on_epoch: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Train and select on valid, without bundle or refit: a trial of a hyperparameter search.

    Returns:
        Training seconds, parameter counts, the best epoch and its validation metrics.
    """
    set_threads(world)
    keep_freed_memory()
    run, dataset = RunFolder.of(config.output), open_dataset(config.data, verify=False)
    with reporting(run, world) as world:
        selected = _select(config, dataset, run, world, on_epoch)
    return {
        "seconds": selected.progress.seconds,
        "parameters": parameter_counts(selected.train_step)["total"],
        "best_epoch": selected.progress.best_epoch,
        "valid": selected.validation.metrics,
    }


def _select(
    config: TrainerConfig, dataset: Dataset, run: RunFolder, world: World, on_epoch: Callable[[dict[str, Any]], None]
) -> Selected:
    """Train, fit the weights that scores add at inference, and validate."""
    model_task = model_task_of(config, dataset, world)
    phase = Phase("train", TRAIN_HOLDOUT, config.train.epochs, validates=True)
    train_step, progress = fit(config, model_task, run, world, phase, on_epoch)
    sample = model_task.sample()
    model_task.fit_score_weights(train_step, sample, run.path)
    return Selected(model_task, train_step, progress, phase, model_task.validate(train_step, sample))


def _train(
    config: TrainerConfig, dataset: Dataset, run: RunFolder, world: World, on_epoch: Callable[[dict[str, Any]], None]
) -> None:
    selected = _select(config, dataset, run, world, on_epoch)
    model_task, train_step, progress = selected.model_task, selected.train_step, selected.progress
    validation = replace(selected.validation, metrics=with_best_aucs(selected.validation.metrics, progress))
    if stop_requested(run, world):
        raise Stopped("stopped after training; the same command writes the bundle")
    refit = config.train.refit
    passes = feedback_passes(progress, selected.phase.checkpoints(run.path), model_task, train_step)
    write_bundle = partial(export, dataset=dataset, world=world, model=model_task.name)
    folder = run.below(SELECTED if refit else RUN_BUNDLE)
    write_bundle(folder, model_task.scorer(train_step), refit=False, passes=passes)
    if refit:
        again = Phase("refit", REFIT_HOLDOUT, progress.best_epoch, validates=False)
        train_step, _ = fit(config, model_task, run, world, again, on_epoch)
        world.barrier()
        model_task.load_score_weights(run.path, again.holdout)
        write_bundle(run.below(RUN_BUNDLE), model_task.scorer(train_step), refit=True)
    if world.is_first:
        write_diagnostics(run.path, validation, train_step)
        write_summary(run.path, config, dataset, train_step, progress, validation)
        run.push()


def fit(
    config: TrainerConfig,
    model_task: ModelTask,
    run: RunFolder,
    world: World,
    phase: Phase,
    on_epoch: Callable[[dict[str, Any]], None],
) -> tuple[TrainStep, Progress]:
    """Train a phase to its end, resuming from its latest checkpoint if there is one.

    Returns:
        The parameters of the best epoch (of the last one without validation), and the progress.
    """
    reader = model_task.reader(phase.holdout)
    total_steps = planned_steps(config, reader, phase)
    world.barrier()  # creating the step runs collectives with a step's short timeout
    train_step = model_task.train_step(total_steps)
    folder = phase.checkpoints(run.path)
    path = checkpoint.latest(folder)
    progress = checkpoint.load(path, train_step) if path else Progress()
    if path is None:
        model_task.init_from_counts(train_step, phase.holdout)
    steps = world.gather(progress.step)
    if len(set(steps)) > 1:
        raise InputError(
            "the same checkpoint on all workers", f"steps {steps}", "put the run on storage that they share"
        )
    log = None
    writer = checkpoint.Writer(folder, config.train.keep_checkpoints, run.push_checkpoint)
    if world.is_first and not _ended(config, phase, progress):
        log = RunLog(run.path, progress.step, progress.epoch, refit=not phase.validates)
    sample = model_task.sample() if phase.validates else None
    training = Training(config, run, model_task, reader, train_step, progress, phase, writer, log, sample)
    while not _ended(config, phase, progress):
        training.epoch()
        values: dict[str, Any] = {}
        if sample is not None:
            values = model_task.validate(train_step, sample).metrics
            _record_epoch(progress, values, config.select_by, report=log is not None)
            if config.train.best_epoch_by_task:
                update_best_by_task(progress, values)
        if log:
            log.write(progress.step, progress.epoch, "valid", values)
        writer.save(train_step, progress)
        world.barrier()
        on_epoch({"epoch": progress.epoch, **{k: v for k, v in values.items() if v is not None}})
        training.stop_if_requested()
    if log:
        log.close()
    writer.wait()
    world.barrier()
    if phase.validates:
        _load_best(config, run, folder, train_step, progress)
    return train_step, progress


def _load_best(config: TrainerConfig, run: RunFolder, folder: Path, train_step: TrainStep, progress: Progress) -> None:
    """Load the parameters of the best epoch, of those that a full disk has not lost."""
    world = train_step.world
    replace_lost_best(folder, run, config.select_by, progress, world)
    if progress.best_steps != {progress.step}:
        run.pull_on_all(world)
        checkpoint.load_best(folder, progress.best_step, train_step)


def _ended(config: TrainerConfig, phase: Phase, progress: Progress) -> bool:
    """Whether all epochs are trained or early stopping applies."""
    stop_early = phase.validates and progress.worse_epochs >= config.train.early_stopping_patience
    return progress.sample == 0 and (progress.epoch >= phase.epochs or stop_early)


@dataclass
class Training:
    """State of a training phase; only the first worker has a `log`."""

    config: TrainerConfig
    run: RunFolder
    model_task: ModelTask
    reader: Reader[Any]
    train_step: TrainStep
    progress: Progress
    phase: Phase
    writer: checkpoint.Writer
    log: RunLog | None
    sample: Any

    def epoch(self) -> None:
        """Train the rest of the current epoch."""
        progress, train_step = self.progress, self.train_step
        train_step.model.train()
        if not progress.loss_sums:
            progress.loss_sums, progress.loss_counts = ([0.0] * len(train_step.tasks) for _ in range(2))
        if progress.sample == 0 or progress.first_step is None:
            progress.first_step = progress.step
        resumed, done = progress.step, sum(progress.loss_counts[:1])
        meter = Meter(self.model_task.unit, self.model_task.total(self.reader), self.phase.epochs, done)
        source = _batches(self.config, self.model_task, self.reader, progress, self.phase, train_step.world)
        stop = StopWatch(self.run, train_step.world)
        profiler = Profiler(self.run.path, enabled=self.config.train.profile and train_step.world.is_first)
        for batch in source:
            profiler.before(progress.step - resumed)
            loss_sums, counts = (totals.tolist() for totals in train_step.step(batch.data, progress.step))
            progress.advance(batch.first_sample + batch.samples, loss_sums, counts)
            self._after_step(progress.step - progress.first_step, loss_sums, counts, meter, source.waited)
            if stop(progress.step):
                self._save(meter)
                self.stop()
        profiler.finish()
        progress.seconds += meter.lap()
        self._log_epoch(meter, source.waited)
        progress.epoch, progress.sample = progress.epoch + 1, 0
        progress.loss_sums, progress.loss_counts = [], []

    def stop_if_requested(self) -> None:
        """Stop after a saved epoch: an epoch may have too few steps to stop within."""
        if stop_requested(self.run, self.train_step.world):
            self.stop()

    def stop(self) -> None:
        """End the run after a saved step.

        Raises:
            Stopped: always.
        """
        self.writer.wait()
        if self.log:
            self.log.close()
        self.train_step.world.barrier()
        raise Stopped(f"stopped after step {self.progress.step}; the same command resumes from there")

    def _after_step(self, steps: int, loss_sums: list[float], counts: list[float], meter: Meter, waited: float) -> None:
        """Log, validate and save if due after this step of the epoch."""
        progress, train = self.progress, self.config.train
        if self.log:
            self.train_step.world.report(**meter.shown(progress, waited))
            if progress.step % LOG_STEPS == 0:
                means = mean_losses(self.train_step.tasks, loss_sums, counts)
                self.log.write(progress.step, progress.epoch + 1, self.phase.name, means)
        if train.validate_steps and self.sample is not None and steps % train.validate_steps == 0:
            progress.seconds += meter.lap()
            values = self.model_task.validate(self.train_step, self.sample).metrics
            self.train_step.model.train()
            if self.log:
                self.log.write(progress.step, progress.epoch + 1, "valid-within", values)
            meter.lap()  # exclude validation time
        if steps % train.checkpoint_steps == 0:
            self._save(meter)  # last: a run that is resumed from here has all lines of this step

    def _save(self, meter: Meter) -> None:
        self.progress.seconds += meter.lap()
        self.writer.save(self.train_step, self.progress)
        self.train_step.world.barrier()  # the first worker may wait for the previous checkpoint

    def _log_epoch(self, meter: Meter, waited: float) -> None:
        if self.log:
            progress = self.progress
            means = mean_losses(self.train_step.tasks, progress.loss_sums, progress.loss_counts)
            means["examples_per_second"] = meter.mean_rate(progress.loss_counts[0])
            means["waiting_share"] = meter.waiting_share(waited)
            means["memory_gib"] = psutil.Process().memory_info().rss / 2**30
            self.log.write(progress.step, progress.epoch + 1, f"{self.phase.name}-epoch", means)


def planned_steps(config: TrainerConfig, reader: Reader[Any], phase: Phase) -> int:
    """Number of steps of all epochs of a phase; 0, uncounted, if the learning rate does not depend on it."""
    if config.train.schedule == "constant":
        return 0
    return sum(reader.steps(reader.order(config, epoch)) for epoch in range(phase.epochs))


def _batches(
    config: TrainerConfig, model_task: ModelTask, reader: Reader[Any], progress: Progress, phase: Phase, world: World
) -> Prefetch[GlobalBatch[list[Any]]]:
    """This worker's batches of the current epoch, `gradient_accumulation_steps` micro-batches per step, prefetched."""
    options = config.train
    order = reader.order(config, progress.epoch)
    salt = int(mix(np.array([(config.seed * 1_000_003 + progress.epoch) % 2**64], np.uint64))[0] >> np.uint64(1))
    collate_rows = model_task.collate(phase.holdout, salt)

    def collate(window: Any, mine: IntArray, step: IntArray) -> list[Any]:
        return [
            collate_rows(window, share(mine, part, options.gradient_accumulation_steps), step)
            for part in range(options.gradient_accumulation_steps)
        ]

    start, rank, size = progress.sample, world.global_rank, world.size
    return Prefetch(reader.epoch(order, collate, start=start, global_rank=rank, world_size=size))


def _record_epoch(progress: Progress, values: dict[str, Any], select_by: str, *, report: bool) -> None:
    value = values.get(select_by)
    if value is None and progress.epoch == 1 and report:
        what = "the valid rows of each task have one outcome only; the first epoch will be kept"
        print(f"warning: {select_by} is undefined: {what}", file=sys.stderr, flush=True)
    progress.end_epoch(value if value is not None and math.isfinite(value) else 0.0)  # an undefined score never wins
