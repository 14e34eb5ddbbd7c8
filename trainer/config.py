"""Options of `python -m trainer`, checked once at the start."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import MISSING

from etl.runtime.errors import InputError
from etl.runtime.option_checks import check_values
from etl.runtime.options import group, option, read_options

ENCODERS = ("gru4rec", "srgnn", "sasrec", "nextitnet")
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
RECIPES = ("auto", "small", "medium", "large")
FEEDBACK_TASKS = ("click", "like", "share", "follow")
TASKS = ("next", *FEEDBACK_TASKS)
VALID_CUTOFFS = [10, 20]
SMALL_CATALOGUE, MEDIUM_CATALOGUE = 100_000, 300_000
"""`recipe=auto` takes `small` and `medium` up to so many items."""

WIDE, WIDE_WARMUP_STEPS = 256, 100
"""Units from which a session model begins with a warm-up, unless `train.warmup_steps` is given, and its steps."""


@dataclass
class ModelOptions:
    """Sizes of the networks."""

    embedding_dim: int = option(64, "dimension of item embeddings and of expert outputs", at_least=1)
    hidden_size: int = option(64, "units of an encoder's state", at_least=1)
    layers: int = option(
        1, "layers of gru4rec and sasrec; repetitions of nextitnet's blocks of network.dilations", at_least=1
    )
    dilations: list[int] = option([1, 4], "nextitnet: dilation of each residual block; one of d looks 6 d clicks back")
    attention_heads: int = option(1, "attention heads of sasrec, a divisor of network.hidden_size", at_least=1)
    positions: int = option(0, "clicks of the longest session, for sasrec; 0 = the dataset's", at_least=0)
    gnn_steps: int = option(1, "gated steps over srgnn's session graph", at_least=1)
    experts: int = option(8, "experts of the MMoE head, divided evenly among several encoders", at_least=1)
    shared_experts: int = option(4, "PLE: shared experts of a level", at_least=1)
    task_experts: int = option(1, "PLE: experts of each task on a level", at_least=1)
    levels: int = option(2, "PLE: levels", at_least=1)
    expert_norm: bool = option(False, "layer norm and swish on the output of each expert (as HoME)")
    gate_preference: float = option(
        0.0, "initial lead, in logits, of a task's own share of the experts in its gate (mmoe, ple)", at_least=0
    )
    task_embedding_dim: int = option(
        0, "dimension of item embeddings that each feedback task of the hybrid has to itself (as STEM)", at_least=0
    )
    tower: int = option(64, "units of the hidden layer of each task's tower", at_least=1)
    residual: bool = option(True, "experts and the next click's tower add to their input instead of replacing it")
    embedding_dropout: float = option(
        0.2, "dropout of whole clicks (gru4rec, srgnn) or of embedding values (sasrec, nextitnet)", at_least=0, below=1
    )
    state_dropout: float = option(0.2, "dropout of the encoder's state", at_least=0, below=1)
    tie_embeddings: bool = option(True, "use the same item embeddings for the encoder's input and for retrieval")
    popularity_bias: bool = option(False, "initialise item biases to the log of train clicks (softmax losses)")
    profile: bool = option(False, "append gender and age to the encoder's state")
    item_features: list[str] = option(
        [], "text columns of items.parquet whose values have vectors that are added to an item's own, as [category]"
    )
    past_actions: bool = option(
        False,
        "the encoder sees what was done with past clicks (like, share, …, how often entered); session models only",
    )
    transitions: bool = option(
        False,
        "add what was counted between an item and the last clicks in train to its score (sequential rules, cosine of "
        "co-occurrence), by weights found on valid",
    )
    detach_items: bool = option(False, "stop gradients of the feedback tasks at the item embeddings")


@dataclass
class TrainOptions:
    """Optimisation, losses and validation."""

    epochs: int = option(10, "maximum number of passes over the train clicks", at_least=1)
    batch_tokens: int = option(512, "target clicks of a global step, over all workers", at_least=1)
    learning_rate: float = option(
        0.05, "learning rate of the embedding tables; of the networks too unless network_learning_rate is set", above=0
    )
    feature_rate: float = option(
        0.2,
        "learning rate of the vectors of item features, relative to that of the items' own; 1 finds more items that "
        "were never clicked (loss=softmax needs it), 0.2 ranks the others better",
        above=0,
    )
    network_learning_rate: float | None = option(None, "learning rate of the networks; null = learning_rate", above=0)
    optimizer: str = option("adagrad", "optimizer of the networks", choices=OPTIMIZERS)
    table_optimizer: str = option("rowwise_adagrad", "optimizer of the embedding tables", choices=TABLE_OPTIMIZERS)
    weight_decay: float = option(
        0.0, "weight decay of the networks, decoupled with adamw, else added to the gradient", at_least=0
    )
    table_decay: float = option(0.0, "weight decay of the embeddings that a step touches", at_least=0)
    schedule: str = option("constant", "learning rate schedule after the warm-up", choices=SCHEDULES)
    warmup_steps: int = option(
        0, "steps over which the learning rates rise linearly from 0; from 256 units on 100 by default", at_least=0
    )
    max_grad_norm: float = option(0.0, "maximum global norm for gradient clipping; 0 = off", at_least=0)
    negatives: int = option(
        2048, "sampled negatives of a step, shared by its targets (all losses but softmax)", at_least=1
    )
    negative_popularity_exponent: float | None = option(
        None,
        "exponent of train clicks in the sampling of negatives: 0 = uniform, 1 = by popularity; null = 0.5 (gbce: 0)",
        at_least=0,
        at_most=10,
    )
    negative_uniform_share: float = option(
        0.1, "share of negatives that are sampled uniformly from all items", at_least=0, below=1
    )
    batch_positives: bool = option(False, "add the step's targets to its negatives")
    skipped_negatives: int = option(
        0, "maximum number of shown but not clicked items added to a target's negatives", at_least=0
    )
    bpr_max_regularisation: float = option(1.0, "weight of the score regularisation of bpr_max", at_least=0)
    gbce_t: float = option(
        0.75, "calibration of gbce: 0 = plain binary cross-entropy, 1 = that of all items", at_least=0, at_most=1
    )
    balance: str = option("fixed", "weighting of the tasks' losses", choices=BALANCES)
    task_weights: dict[str, float] = option({}, "fixed loss weight by task; default 1 or the recipe's")
    positive_rates: dict[str, float] = option({}, "share of positives by feedback task; default: counted in train")
    positive_power: float = option(
        0.0, "positives of a feedback task are weighted by (negatives / positives) to this power", at_least=0
    )
    prefixes: int = option(
        0, "maximum number of target clicks of a session in an epoch, resampled each epoch; 0 = all", at_least=0
    )
    exposures: bool = option(True, "train feedback tasks on all exposures, not on clicks alone")
    exposures_per_session: int = option(
        60, "maximum number of feedback rows of a session in a step, resampled each epoch", at_least=1
    )
    valid_sessions: int = option(10_000, "sessions in the fixed validation sample", at_least=1)
    validate_steps: int = option(0, "validate every N steps inside an epoch; 0 = only at its end", at_least=0)
    select_by: str | None = option(
        None, "validation metric that selects the best epoch; null = ndcg@20, for ranking models auc (mean over tasks)"
    )
    early_stopping_patience: int = option(3, "epochs without improvement before training stops", at_least=1)
    gradient_accumulation_steps: int = option(
        1, "micro-batches that a worker's share of a step is split into, to save memory", at_least=1
    )
    precision: str = option(
        "float32", "precision of matrix products (float32 on a GPU is TF32); bfloat16 needs a GPU", choices=PRECISIONS
    )
    profile: bool = option(False, "write a trace and a table of the time by operation to RUN/profile")
    refit: bool = option(False, "train again with the valid clicks for the selected number of epochs")
    shuffle_buffer_sessions: int = option(16_384, "sessions shuffled together in memory", at_least=1)
    checkpoint_steps: int = option(2_000, "steps between checkpoints inside an epoch", at_least=1)
    keep_checkpoints: int = option(2, "latest checkpoints retained in addition to the best", at_least=1)


@dataclass
class RayOptions:
    """Ray Train workers and their resources."""

    workers: Any = option(
        "auto",
        "Ray Train workers: N, [min,max] (elastic), 0 (this process, without Ray) or auto (one for each 2,048 targets "
        "of a step and core; 0 where that is one, or where epochs × clicks are under 5 million)",
    )
    use_gpu: bool = option(False, "reserve one GPU for each worker")
    cores: int = option(1, "CPU cores of each worker", at_least=1)
    spread: bool = option(True, "place workers on as many hosts as possible; false = fill one host after the other")


@dataclass
class TrainerConfig:
    """Options of `python -m trainer`."""

    data: str = option(MISSING, "dataset folder")
    output: str = option(MISSING, "run folder to make, or to resume")
    model: str = option(MISSING, "model; rank_esmm trains actions of clicked rows only", choices=MODELS)
    seed: int = option(0, "random seed", at_least=0, below=2**63)
    encoder: Any = option("gru4rec", f"session encoder of the hybrid, or a list of them: {', '.join(ENCODERS)}")
    head: str = option("mmoe", "multi-task head of the hybrid", choices=HEADS)
    tasks: list[str] = option(list(TASKS), "task heads to train (hybrid; ranking models without next)")
    loss: str = option("sampled_softmax", "loss of the next item (recipe=small, medium: bpr_max)", choices=LOSSES)
    recipe: str = option(
        "auto",
        "tested defaults by catalogue size: small up to 100,000 items, medium up to 300,000, large",
        choices=RECIPES,
    )
    network: ModelOptions = group(ModelOptions)
    train: TrainOptions = group(TrainOptions)
    ray: RayOptions = group(RayOptions)
    resume: str = option(
        "auto", "auto = continue an unfinished run; never = start only in a fresh folder", choices=("auto", "never")
    )

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

    Wide session models get a warm-up: at the recipes' rates 256 units and more diverge in their first steps.

    Args:
        options: the command line.
        n_items: size of the catalogue, which `recipe=auto` goes by.
        asked: what `load(options)` returned, if it has been called: composing it again takes a tenth of a second.
    """
    config = asked or load(options)
    size = config.recipe
    if size == "auto":
        size = "small" if n_items <= SMALL_CATALOGUE else "medium" if n_items <= MEDIUM_CATALOGUE else "large"
    family = "rank" if config.ranks else config.model
    config = read_options(TrainerConfig, "trainer.conf", options, [f"+recipes@_global_={size}_{family}"])
    config.recipe = size
    wide = max(config.network.embedding_dim, config.network.hidden_size) >= WIDE
    if wide and not config.ranks and not any(option.startswith("train.warmup_steps=") for option in options):
        config.train.warmup_steps = max(config.train.warmup_steps, WIDE_WARMUP_STEPS)
    if config.ranks:
        config.tasks = config.feedback_tasks
    elif config.model != "hybrid":
        config.tasks = ["next"]
    check(config)
    return config


def check(config: TrainerConfig) -> None:
    """Raise `InputError` where a value is out of its range."""
    check_values(config)
    _check_tasks(config)
    if config.model == "hybrid":
        options = config.encoders if isinstance(config.encoder, str | list) else [config.encoder]
        if not options or len(set(options)) != len(options) or set(options) - set(ENCODERS):
            raise InputError(f"encoder of {', '.join(ENCODERS)}", config.encoder, "write encoder=[gru4rec,srgnn], say")
    if "sasrec" in config.encoders and config.network.hidden_size % config.network.attention_heads:
        heads = config.network.attention_heads
        raise InputError("network.attention_heads that divides network.hidden_size", heads, "1 always does")
    if not config.network.dilations or min(config.network.dilations) < 1:
        raise InputError("network.dilations of at least 1", config.network.dilations, "write network.dilations=[1,4]")
    features = config.network.item_features
    if len(set(features)) != len(features):
        raise InputError("network.item_features, each once", features, "write network.item_features=[category]")
    if config.ranks and config.network.past_actions:
        raise InputError("network.past_actions=false for ranking models", True, "they have no session encoder")
    if config.ranks and config.network.transitions:
        raise InputError("network.transitions=false for ranking models", True, "they rank given rows")
    if config.model != "hybrid" and config.network.task_embedding_dim:
        got = config.network.task_embedding_dim
        raise InputError("network.task_embedding_dim=0 but for the hybrid", got, "its feedback towers read them")
    _check_machine(config)


def _check_machine(config: TrainerConfig) -> None:
    options = 0 if config.ray.workers == "auto" else config.ray.workers
    ends = options if isinstance(options, list) else [options]
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in ends) or len(ends) not in (1, 2):
        raise InputError(
            "ray.workers=auto, ray.workers=N or ray.workers=[min,max]", options, "write ray.workers=2, say"
        )
    if ends[0] < 0 or ends[-1] < ends[0] or (isinstance(options, list) and ends[0] < 1):
        raise InputError("ray.workers of 0 or more, or [min,max] from 1 on", options, "write ray.workers=[1,2], say")
    if config.ray.cores < 1:
        raise InputError("ray.cores of at least 1", config.ray.cores, "1 is the default")
    cores = os.cpu_count() or 1
    if not config.ray.use_gpu and "RAY_ADDRESS" not in os.environ and ends[-1] * config.ray.cores > cores:
        got = f"{ends[-1]} workers of {config.ray.cores}"
        raise InputError(f"ray.workers up to the {cores} CPUs here", got, "use fewer, or a Ray cluster")
    if config.train.precision == "bfloat16" and not (config.ray.use_gpu or (options == 0 and _has_gpu())):
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
                raise InputError(f"{name}.{task} of at least 0", value, "0 is the least")
            if name == "train.positive_rates" and value > 1:
                raise InputError(f"{name}.{task} of at most 1", value, "a rate is a share of rows")


def _value(config: TrainerConfig, name: str) -> Any:
    section, _, key = name.rpartition(".")
    return getattr(getattr(config, section) if section else config, key)
