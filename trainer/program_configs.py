"""Options of the other programs of this package, read by the program and by the modules that do its work."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from etl.runtime.options import option
from trainer.config import MODELS, TrainerConfig

SCHEDULERS = ("asha", "none")


@dataclass
class ShowConfig:
    """Options of `python -m trainer.show`."""

    run: str = option(MISSING, "finished run folder")
    data: str | None = option(None, "its dataset, if that has moved")
    item: int = option(1, "dense id of the item whose neighbours are shown; 1 has most train clicks")
    user: int | None = option(None, "raw id of the user whose session is shown; the dataset's first")
    k: int = option(10, "neighbours and recommendations", at_least=1)


@dataclass
class PlanConfig(TrainerConfig):
    """Options of `python -m trainer.plan`: all of `python -m trainer`, and its own."""

    output: str = option("plan", "not written")
    workers: int = option(8, "workers to plan for", at_least=1)
    items: int = option(0, "items to plan the memory of tables for; 0 = the dataset's", at_least=0)
    network_gbit: float = option(10.0, "speed of the network between them, in Gbit/s", above=0)
    latency_us: float = option(50.0, "time of a small message between two workers, in microseconds", above=0)
    cores: int = option(1, "cores of a worker", at_least=1)
    measured_steps: int = option(20, "steps that are measured", at_least=1)


@dataclass
class ApplyConfig:
    """Options of `python -m trainer.apply`."""

    run: str = option(MISSING, "finished run folder")
    data: str = option(MISSING, "dataset to score, made with items_from=the run's dataset")
    output: str = option(MISSING, "bundle folder to make")
    trained_on: str | None = option(None, "the run's dataset, if that has moved")
    overwrite: bool = option(False, "replace an existing bundle")


@dataclass
class ExportConfig:
    """Options of `python -m trainer.export`."""

    run: str = option(MISSING, "finished run folder of a session model")
    output: str = option(MISSING, "folder to make")
    data: str | None = option(None, "the run's dataset, if that has moved")
    overwrite: bool = option(False, "replace an existing export")


@dataclass
class ServeConfig:
    """Options of `python -m trainer.serve`."""

    run: str = option(MISSING, "finished run folder of a session model")
    result: str = option(MISSING, "result folder of the run's bundle")
    data: str | None = option(None, "the run's dataset, if that has moved")
    port: int = option(8000, "port on the loopback interface; 0 = any free port", at_least=0, at_most=65_535)
    titles: str | None = option(None, "file with the columns item_id, title; default: that of the evaluation")
    threads: int = option(0, "threads of encoder and search; 0 = one for each core", at_least=0)


@dataclass
class TuneConfig:
    """Options of `python -m trainer.tune`."""

    data: str = option(MISSING, "dataset folder")
    output: str = option(MISSING, "folder of the search to make, or to resume; on storage that all machines share")
    model: str = option(MISSING, "model", choices=MODELS)
    trials: int = option(50, "number of trials; the first ones are the recipe and other known settings", at_least=1)
    hours: float | None = option(None, "time budget of this call in hours; null = none", above=0)
    epochs: int = option(10, "maximum number of epochs of a trial", at_least=1)
    scheduler: str = option(
        "asha", "asha = successive halving stops the worse trials early; none = all trials run", choices=SCHEDULERS
    )
    grace_epochs: int = option(2, "epochs before asha may stop a trial", at_least=1)
    reduction: int = option(3, "asha continues one in N trials at each rung", at_least=2)
    space: str | None = option(None, "YAML file with the search space; null = that of the model")
    options: str = option("", "options of python -m trainer that all trials share, with spaces between")
    seed: int = option(0, "random seed of the sampled settings", at_least=0, below=2**63)
    cores: int = option(1, "CPU cores of a trial; as many trials run at a time as cores allow", at_least=1)
