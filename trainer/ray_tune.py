"""Ray Tune: parallel trials of a search, with early stopping."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from etl.runtime.errors import InputError
from trainer.program_configs import TuneConfig
from trainer.ray_train import ray_session
from trainer.tuning.trial import STOPPED, Trial

NUMBER, EPOCH = "number", "epoch"
METRIC = "objective"
"""Name of the validation metric for the scheduler."""
ERROR = "error"
"""Reported by a trial instead of metrics: an error of the system, which ends the search. Ray Tune's own record of it
may not fit on a full disk."""


class Halving(ASHAScheduler):
    """Asynchronous successive halving (ASHA) that records in each trial that it was stopped."""

    def __init__(self, trials: Sequence[Trial], config: TuneConfig) -> None:
        super().__init__(
            time_attr=EPOCH,
            metric=METRIC,
            mode="max",
            max_t=config.epochs + 1,  # the last epoch ends by itself
            grace_period=min(config.grace_epochs, config.epochs),
            reduction_factor=config.reduction,
        )
        self.trials = list(trials)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Ray Tune's decision on a trial after an epoch."""
        decision = str(super().on_trial_result(tune_controller, trial, result))
        mine = self.trials[trial.config[NUMBER]]
        if decision == self.STOP and not mine.ended():
            mine.end(STOPPED, epoch=result[EPOCH])
        return decision


class Progress(tune.Callback):
    """Reports the progress of a search. `on_progress` is a class variable, since Ray Tune pickles callbacks."""

    on_progress: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        """Called after each epoch of a trial."""
        Progress.on_progress()

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Called at the end of a trial."""
        Progress.on_progress()


class EndOnError(tune.Stopper):
    """Ends all trials once one reports an error of the system; `error` is that one."""

    def __init__(self) -> None:
        self.error: InputError | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether to end this trial."""
        if ERROR in result:
            self.error = self.error or InputError(**result[ERROR])
        return ERROR in result

    def stop_all(self) -> bool:
        """Whether to end the other trials."""
        return self.error is not None


def run_trials(
    trials: Sequence[Trial], config: TuneConfig, metric: str, hours: float | None, on_progress: Callable[[], None]
) -> None:
    """Run trials in parallel on the cluster at RAY_ADDRESS, else on the local cores.

    Trials that have already ended report their last metrics again, for the scheduler to compare with.

    Args:
        trials: all trials of the search.
        config: options of the search.
        metric: validation metric to compare, larger is better.
        hours: time budget; None = unlimited.
        on_progress: called after each reported epoch.

    Raises:
        InputError: a full disk, or another error of the system. Unfinished trials can be continued.
    """
    # Suppress Ray Tune's own tables, log files and advice.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="ray.tune")

    def work(setting: dict[str, Any]) -> None:
        try:
            trials[setting[NUMBER]].run(
                lambda metrics: tune.report({EPOCH: metrics["epoch"], METRIC: metrics.get(metric, 0.0)})
            )
        except InputError as error:
            tune.report({EPOCH: 0, METRIC: 0.0, ERROR: {name: str(value) for name, value in vars(error).items()}})

    Progress.on_progress = staticmethod(on_progress)
    end_on_error = EndOnError()
    storage = Path(config.output).absolute() / ".ray"  # shared by all machines of a cluster
    try:
        with ray_session(config.cores):
            tune.Tuner(
                tune.with_resources(work, {"cpu": config.cores}),
                param_space={NUMBER: tune.grid_search([trial.number for trial in trials])},
                tune_config=tune.TuneConfig(
                    scheduler=Halving(trials, config) if config.scheduler == "asha" else FIFOScheduler(),
                    time_budget_s=None if hours is None else hours * 3600.0,
                    reuse_actors=True,  # a process's start takes longer than a trial of a small log
                ),
                run_config=tune.RunConfig(
                    storage_path=str(storage), name="search", verbose=0, stop=end_on_error, callbacks=[Progress()]
                ),
            ).fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    if end_on_error.error:
        raise end_on_error.error
