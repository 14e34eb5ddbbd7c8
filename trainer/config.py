"""Options of `python -m trainer` and their validation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import MISSING

from etl.runtime.errors import InputError
from etl.runtime.options import group, option, read_options
from trainer.option_groups import AutoOptions, ModelOptions, TrainOptions

ENCODERS = {
    "gru4rec": "trainer.models.gru4rec.GRUEncoder",
    "srgnn": "trainer.models.srgnn.SRGNNEncoder",
    "sasrec": "trainer.models.sasrec.SASRecEncoder",
    "nextitnet": "trainer.models.nextitnet.NextItNetEncoder",
}
"""Registry of session encoders: to add one, name its class here (`docs/extending.md`). Classes are imported when a
model is built, so that this module does not import torch."""
RANK_HEADS = {
    "rank_single": "single",
    "rank_shared_bottom": "shared_bottom",
    "rank_mmoe": "mmoe",
    "rank_esmm": "single",
    "rank_ple": "ple",
}
"""Ranking models, and the multi-task heads that they share with the hybrid."""
MODELS = (*ENCODERS, "hybrid", *RANK_HEADS)
HEADS = ("mmoe", "shared_bottom", "ple", "single")
LOSSES = ("softmax", "sampled_softmax", "gbce", "bpr", "top1", "bpr_max", "embedding")
RECIPES = ("auto", "small", "small_softmax", "small_dropout", "medium", "medium_dropout", "large")
"""Recipes are named by catalogue size, with a suffix where a size has more than one."""
FEEDBACK_TASKS = ("click", "like", "share", "follow")
TASKS = ("next", *FEEDBACK_TASKS)
ALL_TASKS = (*TASKS, "passive")
VALID_CUTOFFS = [10, 20]


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
    model: str = option(MISSING, "model; rank_esmm counts an action only if the row was clicked", choices=MODELS)
    seed: int = option(0, "random seed", at_least=0, below=2**63)
    encoder: Any = option("gru4rec", f"session encoder of the hybrid, or a list of them: {', '.join(ENCODERS)}")
    head: str = option("mmoe", "multi-task head of the hybrid", choices=HEADS)
    tasks: list[str] = option(
        list(TASKS),
        "task heads to train (hybrid; ranking models without next); further passive = clicked without another action",
    )
    loss: str = option("sampled_softmax", "loss of the next item (recipe=small, medium: bpr_max)", choices=LOSSES)
    recipe: str = option(
        "auto",
        "tested defaults by catalogue size: small up to 100,000 items, medium up to 300,000, large; where a size has "
        "several, auto tries them on valid (auto.targets)",
        choices=RECIPES,
    )
    auto: AutoOptions = group(AutoOptions)
    network: ModelOptions = group(ModelOptions)
    train: TrainOptions = group(TrainOptions)
    ray: RayOptions = group(RayOptions)
    resume: str = option(
        "auto", "auto = continue an unfinished run; never = start only in a fresh folder", choices=("auto", "never")
    )

    @property
    def is_ranking_model(self) -> bool:
        """Whether this is a ranking model: it scores feedback rows and has no session encoder."""
        return self.model in RANK_HEADS

    @property
    def encoders(self) -> list[str]:
        """The session encoders."""
        if self.model == "hybrid":
            return [self.encoder] if isinstance(self.encoder, str) else list(self.encoder)
        return [] if self.is_ranking_model else [self.model]

    @property
    def recipe_model(self) -> str:
        """The model's name in recipe files."""
        return "rank" if self.is_ranking_model else self.model

    @property
    def select_by(self) -> str:
        """The validation metric that selects the best epoch."""
        return self.train.select_by or ("auc" if self.is_ranking_model else "ndcg@20")

    @property
    def negative_popularity_exponent(self) -> float:
        """Exponent of item popularity in negative sampling; gBCE's calibration assumes uniform negatives."""
        if self.train.negative_popularity_exponent is not None:
            return self.train.negative_popularity_exponent
        return 0.0 if self.loss == "gbce" else 0.5

    @property
    def feedback_tasks(self) -> list[str]:
        """The tasks other than the next click."""
        return [task for task in self.tasks if task != "next"]

    @property
    def has_feedback_towers(self) -> bool:
        """Whether the model is a hybrid with feedback tasks."""
        return self.model == "hybrid" and bool(self.feedback_tasks)

    @property
    def task_embedding_dim(self) -> int:
        """Dimension of a hybrid's task-specific item embeddings; 0 = none."""
        return self.network.task_embedding_dim if self.has_feedback_towers else 0

    @property
    def feedback_feature_dim(self) -> int:
        """Dimension of the feature and past-action embeddings read by the feedback towers; 0 = none."""
        read = self.feedback_features or self.network.feedback_actions
        return self.network.feedback_feature_dim if read and self.has_feedback_towers else 0

    @property
    def feedback_features(self) -> list[str]:
        """Feature columns of the feedback towers: `network.feedback_features`, else `network.item_features`."""
        named = self.network.feedback_features
        return self.network.item_features if named is None else named

    @property
    def reads_actions(self) -> bool:
        """Whether the encoder or the feedback towers read the actions on past clicks."""
        return self.network.past_actions or bool(self.network.feedback_actions and self.feedback_feature_dim)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return asdict(self)


def load(options: Sequence[str]) -> TrainerConfig:
    """Parse and validate a command line, without applying a recipe.

    Raises:
        InputError: an option is unknown, missing, ill-typed or out of its range.
    """
    config = read_options(TrainerConfig, "trainer.conf", options)
    check(config)
    return config


def from_dict(values: dict[str, Any]) -> TrainerConfig:
    """The inverse of `to_dict()`."""
    nested = {"auto": AutoOptions, "network": ModelOptions, "train": TrainOptions, "ray": RayOptions}
    return TrainerConfig(**{name: nested[name](**v) if name in nested else v for name, v in values.items()})


def check(config: TrainerConfig) -> None:
    """Raise `InputError` where a value is out of its range."""
    known = [name for name in RECIPES if name != "auto"]
    if set(config.auto.candidates) - set(known):
        raise InputError(f"auto.candidates of {', '.join(known)}", config.auto.candidates, "name recipes")
    _check_tasks(config)
    if config.model == "hybrid":
        encoders = config.encoders if isinstance(config.encoder, str | list) else [config.encoder]
        if not encoders or len(set(encoders)) != len(encoders) or set(encoders) - set(ENCODERS):
            raise InputError(f"encoder of {', '.join(ENCODERS)}", config.encoder, "for example encoder=[gru4rec,srgnn]")
    if "sasrec" in config.encoders and config.network.hidden_size % config.network.attention_heads:
        heads = config.network.attention_heads
        raise InputError("network.attention_heads that divides network.hidden_size", heads, "1 is always valid")
    if not config.network.dilations or min(config.network.dilations) < 1:
        raise InputError("network.dilations of at least 1", config.network.dilations, "write network.dilations=[1,4]")
    _check_inputs(config)
    _check_scores(config)
    _check_table(config)
    _check_machine(config)


def _check_inputs(config: TrainerConfig) -> None:
    """Raise `InputError` for a repeated feature column, or an input that the model does not support."""
    for name in ("item_features", "feedback_features"):
        columns = getattr(config.network, name) or []
        if len(set(columns)) != len(columns):
            raise InputError(f"network.{name}, each once", columns, f"write network.{name}=[category]")
    if config.is_ranking_model and config.network.past_actions:
        raise InputError("network.past_actions=false for ranking models", True, "they have no session encoder")
    if config.is_ranking_model and config.network.transitions:
        raise InputError("network.transitions=false for ranking models", True, "they rank rows of feedback")
    if config.model != "hybrid" and config.network.task_embedding_dim:
        got = config.network.task_embedding_dim
        raise InputError("network.task_embedding_dim=0 but for the hybrid", got, "its feedback towers read them")


def _check_scores(config: TrainerConfig) -> None:
    """Raise `InputError` for a next-item scoring option that has no effect."""
    if config.network.cosine_temperature is not None and (config.is_ranking_model or config.loss == "embedding"):
        got = config.model if config.is_ranking_model else "loss=embedding, whose score is a cosine already"
        raise InputError("a session model with another loss for network.cosine_temperature", got, "leave it out")
    if config.is_ranking_model and config.network.popularity_weight:
        weight = config.network.popularity_weight
        raise InputError("network.popularity_weight=0 for ranking models", weight, "they rank rows of feedback")
    if config.loss == "embedding" and not config.is_ranking_model and not config.network.tie_embeddings:
        hint = "the vectors that are searched get no gradient from it; leave one of them out"
        raise InputError("network.tie_embeddings=true for loss=embedding", False, hint)
    if config.is_ranking_model and config.train.ppmi_start:
        raise InputError("train.ppmi_start=0 for ranking models", config.train.ppmi_start, "session models read it")
    if config.train.hard_negatives and (config.is_ranking_model or config.loss in ("softmax", "embedding")):
        got = config.model if config.is_ranking_model else f"loss={config.loss}"
        hint = "for example loss=sampled_softmax"
        raise InputError("a loss with sampled negatives for train.hard_negatives", got, hint)


def _check_table(config: TrainerConfig) -> None:
    """Raise `InputError` if `train.table=sharded` meets an option that reads the complete table on one worker."""
    if config.train.table != "sharded":
        return
    replicated = "or keep train.table=replicated"
    if config.is_ranking_model:
        got, hint = f"train.table=sharded with model={config.model}", "ranking models have a replicated one"
        raise InputError("train.table=replicated for ranking models", got, hint)
    if config.loss == "softmax":
        hint = f"it scores all items in each step; write loss=sampled_softmax, {replicated}"
        raise InputError("a loss with sampled negatives for train.table=sharded", "loss=softmax", hint)
    if config.network.transitions:
        hint = f"its weights are fitted on all scores; leave it out, {replicated}"
        raise InputError("network.transitions=false for train.table=sharded", True, hint)
    if config.train.ppmi_start:
        hint = f"recipe=small sets it, and one worker counts it for all items; write train.ppmi_start=0, {replicated}"
        raise InputError("train.ppmi_start=0 for train.table=sharded", config.train.ppmi_start, hint)
    if "://" in config.output:
        hint = f"workers write their rows to a folder that they share; name a path, {replicated}"
        raise InputError("an output on a shared file system for train.table=sharded", config.output, hint)


def _check_machine(config: TrainerConfig) -> None:
    workers = 0 if config.ray.workers == "auto" else config.ray.workers
    ends = workers if isinstance(workers, list) else [workers]
    n_expected = 2 if isinstance(workers, list) else 1
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in ends) or len(ends) != n_expected:
        raise InputError(
            "ray.workers=auto, ray.workers=N or ray.workers=[min,max]", workers, "for example ray.workers=2"
        )
    if ends[0] < 0 or ends[-1] < ends[0] or (isinstance(workers, list) and ends[0] < 1):
        raise InputError("ray.workers of 0 or more, or [min,max] from 1 on", workers, "for example ray.workers=[1,2]")
    cores = os.cpu_count() or 1
    if not config.ray.use_gpu and "RAY_ADDRESS" not in os.environ and ends[-1] * config.ray.cores > cores:
        got = f"{ends[-1]} workers of {config.ray.cores}"
        raise InputError(f"ray.workers up to the {cores} CPUs here", got, "use fewer, or a Ray cluster")
    if config.train.precision == "bfloat16" and not (config.ray.use_gpu or (workers == 0 and _has_gpu())):
        raise InputError("train.precision=float32 on a CPU", "bfloat16", "or give each worker a GPU: ray.use_gpu=true")


def _has_gpu() -> bool:
    import torch  # slow import, so only when needed

    return torch.cuda.is_available()


def _check_tasks(config: TrainerConfig) -> None:
    if config.train.best_epoch_by_task and config.train.refit:
        hint = "a refit has one number of epochs for all tasks"
        raise InputError("train.refit=false for train.best_epoch_by_task", True, hint)
    tasks, feedback = config.tasks, config.feedback_tasks
    ranks_rows, metrics = config.is_ranking_model, list[str]()
    if ranks_rows or config.model == "hybrid":
        metrics += ["auc", *(f"auc/{task}" for task in feedback)]
    if not ranks_rows:
        metrics += [f"{name}@{k}" for name in ("ndcg", "hr", "mrr") for k in VALID_CUTOFFS]
    if config.select_by not in metrics:
        raise InputError(f"train.select_by of {', '.join(metrics)}", config.select_by, "name a metric of the model")
    if set(tasks) - set(ALL_TASKS) or len(set(tasks)) != len(tasks):
        raise InputError(f"tasks of {', '.join(ALL_TASKS)}, each once", tasks, "write tasks=[next,click]")
    if not ranks_rows and "next" not in tasks:
        raise InputError("next among the tasks of a session model", tasks, "write tasks=[next,click]")
    if ranks_rows and not feedback:
        raise InputError(f"tasks of {', '.join(FEEDBACK_TASKS)} for a ranking model", tasks, "write tasks=[click]")
    if config.model == "rank_esmm" and "click" not in feedback:
        raise InputError("click among the tasks of rank_esmm", tasks, "its other tasks follow a click")
    _check_by_task(config)


def _check_by_task(config: TrainerConfig) -> None:
    train = config.train
    for name, by_task in (("train.task_weights", train.task_weights), ("train.positive_rates", train.positive_rates)):
        for task, value in by_task.items():
            if task not in ALL_TASKS:
                raise InputError(f"{name} of {', '.join(ALL_TASKS)}", task, "name a task")
            if not 0 <= value < float("inf"):
                raise InputError(f"{name}.{task} of at least 0", value, "0 is the minimum")
            if name == "train.positive_rates" and value > 1:
                raise InputError(f"{name}.{task} of at most 1", value, "a rate is a share of rows")
