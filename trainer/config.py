"""Options of `python -m trainer`, checked once at the start."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import MISSING

from etl.runtime.errors import InputError
from etl.runtime.options import group, option, read_options

ENCODERS = ("gru4rec", "srgnn", "sasrec")
RANK_HEADS = {
    "rank_single": "single",
    "rank_shared_bottom": "shared_bottom",
    "rank_mmoe": "mmoe",
    "rank_esmm": "single",
    "rank_ple": "ple",
}
"""Ranking models and the heads that they share with the hybrid."""
MODELS = (*ENCODERS, "hybrid", *RANK_HEADS)
HEADS = ("mmoe", "shared_bottom", "ple", "single")
LOSSES = ("softmax", "sampled_softmax", "gbce", "bpr", "top1", "bpr_max", "embedding")
OPTIMIZERS = ("adagrad", "adamw")
TABLE_OPTIMIZERS = ("rowwise_adagrad", "adagrad")
SCHEDULES = ("constant", "cosine")
BALANCES = ("fixed", "uncertainty")
PRECISIONS = ("float32", "bfloat16")
FEEDBACK_TASKS = ("click", "like", "share", "follow")
TASKS = ("next", *FEEDBACK_TASKS)
VALID_CUTOFFS = [10, 20]
SMALL_CATALOGUE = 200_000
"""`recipe=auto` takes `small` up to so many items."""


@dataclass
class ModelOptions:
    """Sizes of the networks."""

    embedding_dim: int = option(64, "length of item vectors and of expert outputs")
    hidden_size: int = option(64, "units of an encoder's state")
    layers: int = option(1, "layers of gru4rec and sasrec")
    attention_heads: int = option(1, "heads of sasrec, a divisor of hidden")
    positions: int = option(0, "clicks of the longest session, for sasrec; 0 takes the dataset's")
    gnn_steps: int = option(1, "gated steps over srgnn's graph")
    experts: int = option(8, "experts of the MMoE head, shared out evenly among several encoders")
    shared_experts: int = option(4, "PLE: shared experts of a level")
    task_experts: int = option(1, "PLE: each task's own experts of a level")
    levels: int = option(2, "PLE: levels")
    tower: int = option(64, "units of the hidden layer of each task")
    residual: bool = option(True, "experts and the next click's tower add to their input instead of replacing it")
    embedding_dropout: float = option(0.2, "of gru4rec and srgnn whole clicks (item dropout), of sasrec single values")
    state_dropout: float = option(0.2, "dropout on the encoder's state")
    tie_embeddings: bool = option(True, "the vectors that encoders read are those that are searched")
    popularity_bias: bool = option(False, "softmax losses: item biases begin at the log of train clicks")
    profile: bool = option(False, "gender and age join the state")
    detach_items: bool = option(False, "feedback tasks do not train the item vectors")


@dataclass
class TrainOptions:
    """How the parameters are found."""

    epochs: int = option(10, "passes over the train clicks at most")
    batch_tokens: int = option(512, "target clicks of a step, over all workers")
    learning_rate: float = option(0.05, "of item vectors, and of networks where these have no own")
    network_learning_rate: float | None = option(None, "of the networks")
    optimizer: str = option("adagrad", "of the networks: adagrad, adamw")
    table_optimizer: str = option("rowwise_adagrad", "of item and user vectors: rowwise_adagrad, adagrad")
    weight_decay: float = option(0.0, "of the networks; decoupled with adamw, else added to the gradient")
    table_decay: float = option(0.0, "of the vectors that a step touches, added to their gradient")
    schedule: str = option("constant", "learning rates after the warm-up: constant, cosine (to 0 at the last epoch)")
    warmup_steps: int = option(0, "steps over which learning rates rise from 0")
    max_grad_norm: float = option(0.0, "limit of the norm of all gradients together; 0 sets none")
    negatives: int = option(2048, "sampled negatives of a step, shared by its targets (all losses but softmax)")
    negative_popularity_exponent: float | None = option(
        None, "negatives are drawn from train clicks to this power (0.5; gbce: 0) …"
    )
    negative_uniform_share: float = option(0.1, "… or, this share of them, from all items alike")
    batch_positives: bool = option(False, "the step's targets join its negatives")
    skipped_negatives: int = option(0, "shown but not clicked items that join a target's negatives, at most")
    bpr_max_regularisation: float = option(1.0, "weight of bpr_max's score regulariser")
    gbce_t: float = option(0.75, "calibration of gbce: 0 = plain binary cross-entropy, 1 = that of all items")
    balance: str = option("fixed", "weights of the tasks: fixed, or learned uncertainty")
    task_weights: dict[str, float] = option({}, "fixed weights of the tasks' losses, 1 or the recipe's where not named")
    positive_rates: dict[str, float] = option(
        {}, "share of positives by feedback task; counted in train where not named"
    )
    positive_power: float = option(0.0, "positives of a feedback task weigh (negatives / positives) to this power")
    prefixes: int = option(0, "target clicks of a session and epoch at most, sampled anew; 0 takes all")
    exposures: bool = option(True, "feedback tasks learn from what was shown, not from the clicks alone")
    exposures_per_session: int = option(60, "feedback rows of a session and step at most, sampled anew each epoch")
    valid_sessions: int = option(10_000, "sessions of the fixed validation sample")
    validate_steps: int = option(0, "validate after so many steps inside an epoch too, for the curve; 0 does not")
    select_by: str | None = option(None, "valid metric of the best epoch; ndcg@20, of ranking models auc (the mean)")
    early_stopping_patience: int = option(3, "epochs without a better validation before training ends")
    gradient_accumulation_steps: int = option(
        1, "parts that a worker's share of a step goes through the networks in, to save memory"
    )
    precision: str = option("float32", "float32 (on a GPU its matrix products are TF32), or bfloat16 on a GPU")
    profile: bool = option(False, "write RUN/profile: a trace and a table of where steps go")
    refit: bool = option(False, "train once more with the valid clicks for the selected number of epochs")
    shuffle_buffer_sessions: int = option(16_384, "sessions shuffled together in memory")
    checkpoint_steps: int = option(2_000, "steps between checkpoints inside an epoch")
    keep_checkpoints: int = option(2, "latest checkpoints kept beside the best")


@dataclass
class RayOptions:
    """How many workers, and of what."""

    workers: Any = option(
        "auto",
        "Ray Train workers; [min,max] scales down; 0 trains in this process without Ray; auto takes one for each 2,048 "
        "targets of a step and core, and 0 where that is one, or where epochs × clicks are under 5 million",
    )
    use_gpu: bool = option(False, "one GPU for each worker")
    cores: int = option(1, "CPU cores of each worker")
    spread: bool = option(True, "workers over as many hosts as there are; false fills one host after the other")


@dataclass
class TrainerConfig:
    """Options of `python -m trainer`."""

    data: str = option(MISSING, "dataset folder")
    output: str = option(MISSING, "run folder to make, or to resume")
    model: str = option(MISSING, f"{', '.join(MODELS)} (rank_esmm trains actions of clicked rows only)")
    seed: int = option(0, "of parameters, order and sampling")
    encoder: Any = option("gru4rec", f"session encoder of the hybrid, or several: {', '.join(ENCODERS)}")
    head: str = option("mmoe", ", ".join(HEADS))
    tasks: list[str] = option(list(TASKS), "tasks of the hybrid, and but for next of ranking models")
    loss: str = option("sampled_softmax", f"of the next item (recipe=small: bpr_max): {', '.join(LOSSES)}")
    recipe: str = option("auto", "auto (by size of the catalogue), small or large: tested defaults")
    network: ModelOptions = group(ModelOptions)
    train: TrainOptions = group(TrainOptions)
    ray: RayOptions = group(RayOptions)
    resume: str = option("auto", "auto continues an unfinished run; never starts anew only in a fresh folder")

    @property
    def ranks(self) -> bool:
        """Whether the model ranks given rows and has no session state."""
        return self.model in RANK_HEADS

    @property
    def encoders(self) -> list[str]:
        """The session encoders."""
        if self.model == "hybrid":
            return [self.encoder] if isinstance(self.encoder, str) else list(self.encoder)
        return [] if self.ranks else [self.model]

    @property
    def select_by(self) -> str:
        """The valid metric that decides which epoch is best."""
        return self.train.select_by or ("auc" if self.ranks else "ndcg@20")

    @property
    def negatives_alpha(self) -> float:
        """Power of the train clicks that negatives are drawn with; gbce's calibration wants uniform ones."""
        if self.train.negative_popularity_exponent is not None:
            return self.train.negative_popularity_exponent
        return 0.0 if self.loss == "gbce" else 0.5

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


def with_recipe(options: Sequence[str], n_items: int, asked: TrainerConfig | None = None) -> TrainerConfig:
    """The configuration with its recipe's values; options given on the command line win.

    Args:
        options: the command line.
        n_items: size of the catalogue, which `recipe=auto` goes by.
        asked: what `load(options)` returned, if it has been called: composing it again takes a tenth of a second.
    """
    config = asked or load(options)
    size = config.recipe
    if size == "auto":
        size = "small" if n_items <= SMALL_CATALOGUE else "large"
    family = "rank" if config.ranks else config.model
    config = read_options(TrainerConfig, "trainer.conf", options, [f"+recipes@_global_={size}_{family}"])
    config.recipe = size
    if config.ranks:
        config.tasks = config.feedback_tasks
    elif config.model != "hybrid":
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
        "resume": ("auto", "never"),
        "train.optimizer": OPTIMIZERS,
        "train.table_optimizer": TABLE_OPTIMIZERS,
        "train.schedule": SCHEDULES,
        "train.balance": BALANCES,
        "train.precision": PRECISIONS,
    }
    for name, allowed in choices.items():
        if _value(config, name) not in allowed:
            raise InputError(f"{name} one of {', '.join(allowed)}", _value(config, name), f"choose {name}={allowed[0]}")
    _check_tasks(config)
    if config.model == "hybrid":
        given = config.encoders if isinstance(config.encoder, str | list) else [config.encoder]
        if not given or len(set(given)) != len(given) or set(given) - set(ENCODERS):
            raise InputError(f"encoder of {', '.join(ENCODERS)}", config.encoder, "write encoder=[gru4rec,srgnn], say")
    _check_numbers(config)
    if "sasrec" in config.encoders and config.network.hidden_size % config.network.attention_heads:
        heads = config.network.attention_heads
        raise InputError("network.attention_heads that divides network.hidden_size", heads, "try 1")
    _check_machine(config)


def _check_machine(config: TrainerConfig) -> None:
    given = 0 if config.ray.workers == "auto" else config.ray.workers
    ends = given if isinstance(given, list) else [given]
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in ends) or len(ends) not in (1, 2):
        raise InputError("ray.workers=auto, ray.workers=N or ray.workers=[min,max]", given, "write ray.workers=2, say")
    if ends[0] < 0 or ends[-1] < ends[0] or (isinstance(given, list) and ends[0] < 1):
        raise InputError("ray.workers of 0 or more, or [min,max] from 1 on", given, "write ray.workers=[1,2], say")
    if config.ray.cores < 1:
        raise InputError("ray.cores of at least 1", config.ray.cores, "1 is the default")
    cores = os.cpu_count() or 1
    if not config.ray.use_gpu and "RAY_ADDRESS" not in os.environ and ends[-1] * config.ray.cores > cores:
        got = f"{ends[-1]} workers of {config.ray.cores}"
        raise InputError(f"ray.workers up to the {cores} CPUs here", got, "use fewer, or a Ray cluster")
    if config.train.precision == "bfloat16" and not (config.ray.use_gpu or (given == 0 and _has_gpu())):
        raise InputError("train.precision=float32 on a CPU", "bfloat16", "or give each worker a GPU: ray.use_gpu=true")


def _has_gpu() -> bool:
    import torch  # takes seconds, so only where the answer depends on it

    return torch.cuda.is_available()


def _check_tasks(config: TrainerConfig) -> None:
    tasks, feedback = config.tasks, config.feedback_tasks
    metrics = ["auc", *(f"auc/{task}" for task in feedback)] if config.ranks or config.model == "hybrid" else []
    metrics += [] if config.ranks else [f"{name}@{k}" for name in ("ndcg", "hr", "mrr") for k in VALID_CUTOFFS]
    if config.select_by not in metrics:
        raise InputError(f"train.select_by of {', '.join(metrics)}", config.select_by, "name a metric of the model")
    if set(tasks) - set(TASKS) or len(set(tasks)) != len(tasks):
        raise InputError(f"tasks of {', '.join(TASKS)}, each once", tasks, "write tasks=[next,click]")
    if not config.ranks and "next" not in tasks:
        raise InputError("next among the tasks of a session model", tasks, "write tasks=[next,click]")
    if config.ranks and not feedback:
        raise InputError(f"tasks of {', '.join(FEEDBACK_TASKS)} for a ranking model", tasks, "write tasks=[click]")
    if config.model == "rank_esmm" and "click" not in feedback:
        raise InputError("click among the tasks of rank_esmm", tasks, "its other tasks follow a click")
    _check_by_task(config)


def _check_by_task(config: TrainerConfig) -> None:
    for name in ("train.task_weights", "train.positive_rates"):
        for task, value in _value(config, name).items():
            if task not in TASKS:
                raise InputError(f"{name} of {', '.join(TASKS)}", task, "name a task")
            if not 0 <= value < float("inf"):
                raise InputError(f"{name}.{task} of at least 0", value, "give a larger number")
            if name == "train.positive_rates" and value > 1:
                raise InputError(f"{name}.{task} of at most 1", value, "a rate is a share of rows")


LEAST = {
    "network": (
        "embedding_dim",
        "hidden_size",
        "layers",
        "attention_heads",
        "gnn_steps",
        "experts",
        "shared_experts",
        "task_experts",
        "levels",
        "tower",
    ),
    "train": (
        "epochs",
        "batch_tokens",
        "negatives",
        "exposures_per_session",
        "valid_sessions",
        "early_stopping_patience",
        "shuffle_buffer_sessions",
        "checkpoint_steps",
        "keep_checkpoints",
        "gradient_accumulation_steps",
    ),
}
"""Options of at least 1."""
NOT_NEGATIVE = {
    "network": ("positions",),
    "train": (
        "weight_decay",
        "table_decay",
        "warmup_steps",
        "max_grad_norm",
        "skipped_negatives",
        "bpr_max_regularisation",
        "positive_power",
        "prefixes",
        "validate_steps",
    ),
    "": ("seed",),
}
"""Options of at least 0."""


BELOW: dict[str, float] = {"seed": 2**63}
"""Options with an upper bound: generators take seeds of 64 bits, and some are drawn from this one."""


def _check_numbers(config: TrainerConfig) -> None:
    for low, groups in ((1, LEAST), (0, NOT_NEGATIVE)):
        for section, names in groups.items():
            for name in (f"{section}.{name}".lstrip(".") for name in names):
                high = BELOW.get(name, float("inf"))
                if not low <= _value(config, name) < high:
                    bounds = f"at least {low}" + (f" and below {high}" if name in BELOW else "")
                    raise InputError(f"{name} of {bounds}", _value(config, name), f"{low} is the least")
    _check_shares(config)
    for name in ("train.learning_rate", "train.network_learning_rate"):
        if _value(config, name) is not None and not 0 < _value(config, name) < float("inf"):
            raise InputError(f"a positive {name}", _value(config, name), "try 0.05")


def _check_shares(config: TrainerConfig) -> None:
    for name in ("network.embedding_dropout", "network.state_dropout", "train.negative_uniform_share"):
        if not 0 <= _value(config, name) < 1:
            raise InputError(f"{name} in [0, 1)", _value(config, name), "give a share")
    for name, high, hint in (
        ("train.gbce_t", 1, "try 0.75"),
        ("train.negative_popularity_exponent", 10, "0 draws all items alike"),
    ):
        if _value(config, name) is not None and not 0 <= _value(config, name) <= high:
            raise InputError(f"{name} in [0, {high}]", _value(config, name), hint)


def _value(config: TrainerConfig, name: str) -> Any:
    section, _, key = name.rpartition(".")
    return getattr(getattr(config, section) if section else config, key)
