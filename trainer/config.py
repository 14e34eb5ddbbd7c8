"""Options of `python -m trainer`, checked once at the start."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import MISSING

from etl.command import group, option, read_options
from etl.folder import InputError

MODELS = ("gru4rec", "hybrid")
ENCODERS = ("gru4rec",)
HEADS = ("mmoe", "shared_bottom", "single")
LOSSES = ("softmax", "sampled_softmax")
FEEDBACK_TASKS = ("click", "like", "share", "follow")
TASKS = ("next", *FEEDBACK_TASKS)
SMALL_CATALOGUE = 200_000
"""`recipe=auto` takes `small` up to so many items."""


@dataclass
class ModelOptions:
    """Sizes of the networks."""

    dimension: int = option(64, "length of item vectors and of expert outputs")
    hidden: int = option(64, "units of the encoder's state")
    layers: int = option(1, "layers of the encoder")
    experts: int = option(8, "experts of the MMoE head")
    tower: int = option(64, "units of the hidden layer of each task")
    embedding_dropout: float = option(0.2, "dropout on the clicks' item vectors, whole vectors at once")
    state_dropout: float = option(0.2, "dropout on the encoder's state")
    profile: bool = option(False, "gender and age join the state")
    detach_items: bool = option(False, "feedback tasks do not train the item vectors")


@dataclass
class TrainOptions:
    """How the parameters are found."""

    epochs: int = option(10, "passes over the train clicks at most")
    batch_tokens: int = option(512, "target clicks of a step, over all workers")
    learning_rate: float = option(0.05, "of item vectors and networks")
    negatives: int = option(2048, "sampled negatives of a step (sampled_softmax)")
    alpha: float = option(0.5, "negatives are drawn from train clicks to this power …")
    uniform: float = option(0.1, "… or, this share of them, from all items alike")
    task_weights: dict[str, float] = option({}, "weights of the tasks' losses, 1 where not named")
    exposures_per_session: int = option(60, "feedback rows of a session and step at most, sampled anew each epoch")
    valid_sessions: int = option(10_000, "sessions of the fixed validation sample")
    patience: int = option(3, "epochs without a better valid NDCG@20 before training ends")
    refit: bool = option(False, "train once more with the valid clicks for the selected number of epochs")
    buffer_sessions: int = option(16_384, "sessions shuffled together in memory")
    checkpoint_steps: int = option(2_000, "steps between checkpoints inside an epoch")
    keep_checkpoints: int = option(2, "latest checkpoints kept beside the best")


@dataclass
class RayOptions:
    """How many workers, and of what."""

    workers: int = option(2, "Ray Train workers; 0 trains in this process without Ray")
    use_gpu: bool = option(False, "one GPU for each worker")


@dataclass
class TrainerConfig:
    """Options of `python -m trainer`."""

    data: str = option(MISSING, "dataset folder")
    output: str = option(MISSING, "run folder to make, or to resume")
    model: str = option(MISSING, ", ".join(MODELS))
    seed: int = option(0, "of parameters, order and sampling")
    encoder: Any = option("gru4rec", "session encoder of the hybrid")
    head: str = option("mmoe", ", ".join(HEADS))
    tasks: list[str] = option(list(TASKS), "tasks of the hybrid")
    loss: str = option("sampled_softmax", ", ".join(LOSSES))
    recipe: str = option("auto", "auto (by size of the catalogue), small or large: tested defaults")
    network: ModelOptions = group(ModelOptions)
    train: TrainOptions = group(TrainOptions)
    ray: RayOptions = group(RayOptions)
    resume: str = option("auto", "auto continues an unfinished run; never starts anew only in a fresh folder")

    @property
    def feedback_tasks(self) -> list[str]:
        """The tasks beside the next click."""
        return [task for task in self.tasks if task != "next"]

    def plain(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return asdict(self)


def load(options: Sequence[str]) -> TrainerConfig:
    """The checked configuration of a command line, before its recipe is chosen.

    Raises:
        InputError: an option is unknown, missing, ill-typed or out of its range.
    """
    config = read_options(TrainerConfig, "trainer.conf", options)
    check(config)
    return config


def from_plain(values: dict[str, Any]) -> TrainerConfig:
    """The configuration whose `plain()` these values are."""
    nested = {"network": ModelOptions, "train": TrainOptions, "ray": RayOptions}
    return TrainerConfig(**{name: nested[name](**v) if name in nested else v for name, v in values.items()})


def with_recipe(options: Sequence[str], n_items: int) -> TrainerConfig:
    """The configuration with its recipe's values; options given on the command line win."""
    config = load(options)
    size = config.recipe
    if size == "auto":
        size = "small" if n_items <= SMALL_CATALOGUE else "large"
    config = read_options(TrainerConfig, "trainer.conf", [f"+recipe@_global_={size}_{config.model}", *options])
    config.recipe = size
    if config.model != "hybrid":
        config.tasks = ["next"]
    check(config)
    return config


def check(config: TrainerConfig) -> None:
    """Raise `InputError` where a value is out of its range."""
    choices = {
        "model": MODELS,
        "head": HEADS,
        "loss": LOSSES,
        "recipe": ("auto", "small", "large"),
        "encoder": ENCODERS,
        "resume": ("auto", "never"),
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise InputError(
                f"{name} one of {', '.join(allowed)}", getattr(config, name), f"choose {name}={allowed[0]}"
            )
    unknown = [task for task in config.tasks if task not in TASKS]
    if unknown or "next" not in config.tasks or len(set(config.tasks)) != len(config.tasks):
        raise InputError(f"tasks of {', '.join(TASKS)}, next among them", config.tasks, "write tasks=[next,click]")
    for name in config.train.task_weights:
        if name not in TASKS:
            raise InputError(f"train.task_weights of {', '.join(TASKS)}", name, "name a task")
    _check_numbers(config)
    cores = os.cpu_count() or 1
    if not config.ray.use_gpu and "RAY_ADDRESS" not in os.environ and config.ray.workers > cores:
        raise InputError(f"ray.workers up to the {cores} CPUs here", config.ray.workers, "use fewer, or a Ray cluster")


def _check_numbers(config: TrainerConfig) -> None:
    least = {
        "network.dimension": 1,
        "network.hidden": 1,
        "network.layers": 1,
        "network.experts": 1,
        "network.tower": 1,
        "train.epochs": 1,
        "train.batch_tokens": 1,
        "train.negatives": 1,
        "train.exposures_per_session": 1,
        "train.valid_sessions": 1,
        "train.patience": 1,
        "train.buffer_sessions": 1,
        "train.checkpoint_steps": 1,
        "train.keep_checkpoints": 1,
        "ray.workers": 0,
        "seed": 0,
    }
    for name, low in least.items():
        if _value(config, name) < low:
            raise InputError(f"{name} of at least {low}", _value(config, name), "give a larger number")
    for name in ("network.embedding_dropout", "network.state_dropout", "train.uniform"):
        if not 0 <= _value(config, name) < 1:
            raise InputError(f"{name} in [0, 1)", _value(config, name), "give a share")
    for name in ("train.learning_rate",):
        if not 0 < _value(config, name) < float("inf"):
            raise InputError(f"a positive {name}", _value(config, name), "try 0.05")


def _value(config: TrainerConfig, name: str) -> Any:
    section, _, key = name.rpartition(".")
    return getattr(getattr(config, section) if section else config, key)
