"""Options of a command line that the chosen model does not read: they are reported, not refused.

One command line often serves several models, as in the study.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from trainer.config import RANK_HEADS, TrainerConfig

Reads = Callable[[TrainerConfig], bool]


def _encoder(name: str) -> Reads:
    return lambda config: name in config.encoders


def _head(name: str) -> Reads:
    return lambda config: name == (config.head if config.model == "hybrid" else RANK_HEADS.get(config.model))


def _hybrid(config: TrainerConfig) -> bool:
    return config.model == "hybrid"


def _gated(config: TrainerConfig) -> bool:
    return _head("mmoe")(config) or _head("ple")(config)


def _sessions(config: TrainerConfig) -> bool:
    return not config.is_ranking_model


def _several_tasks(config: TrainerConfig) -> bool:
    return config.is_ranking_model or config.model == "hybrid"


def _feedback(config: TrainerConfig) -> bool:
    return config.is_ranking_model or config.has_feedback_towers


def _feedback_towers(config: TrainerConfig) -> bool:
    return config.has_feedback_towers


def _sampled(config: TrainerConfig) -> bool:
    return not config.is_ranking_model and config.loss not in ("softmax", "embedding")


def _loss(*names: str) -> Reads:
    return lambda config: not config.is_ranking_model and config.loss in names


LOSS_READ_BY: dict[str, Reads] = {
    **dict.fromkeys(("train.negatives", "train.negative_popularity_exponent"), _sampled),
    **dict.fromkeys(("train.negative_uniform_share", "train.batch_positives"), _sampled),
    "train.skipped_negatives": lambda config: not config.is_ranking_model and config.loss != "embedding",
    "train.bpr_max_regularisation": _loss("bpr_max"),
    "train.gbce_t": _loss("gbce"),
    "train.logq": _loss("sampled_softmax"),
    "network.popularity_bias": _loss("softmax", "sampled_softmax"),
}
"""Options that depend on the loss, which is then named beside them."""
READ_BY: dict[str, Reads] = {
    **dict.fromkeys(("encoder", "head", "train.head_learning_rate"), _hybrid),
    **dict.fromkeys(("train.feedback_learning_rate", "network.detach_items"), _feedback_towers),
    **dict.fromkeys(("network.feedback_feature_dim", "network.feedback_actions"), _feedback_towers),
    **dict.fromkeys(("train.best_epoch_by_task", "train.exposures_per_session", "train.positive_power"), _feedback),
    **dict.fromkeys(("network.residual", "network.expert_norm"), _several_tasks),
    "network.gate_preference": _gated,
    **dict.fromkeys(("network.hidden_size", "network.positions", "network.tie_embeddings"), _sessions),
    **dict.fromkeys(("network.embedding_dropout", "network.profile", "train.prefixes", "loss"), _sessions),
    "network.layers": lambda config: not config.is_ranking_model and set(config.encoders) != {"srgnn"},
    "train.feature_rate": lambda config: bool(config.network.item_features),
    **dict.fromkeys(("tasks", "network.tower", "train.task_weights", "train.positive_rates"), _several_tasks),
    **dict.fromkeys(("train.balance", "train.exposures"), _several_tasks),
    "network.experts": _head("mmoe"),
    **dict.fromkeys(("network.shared_experts", "network.task_experts", "network.levels"), _head("ple")),
    **dict.fromkeys(
        ("network.attention_heads", "network.attention_block", "network.relative_positions"), _encoder("sasrec")
    ),
    "network.dilations": _encoder("nextitnet"),
    "network.gnn_steps": _encoder("srgnn"),
    **LOSS_READ_BY,
    "ray.use_gpu": lambda config: config.ray.workers != 0,  # this process takes a GPU if there is one
}
"""Whether a model reads an option; options that are not named here are read by all, or refused elsewhere."""


def unread_options(options: Sequence[str], config: TrainerConfig) -> list[str]:
    """Names of the options that a configuration, resolved from them, does not read.

    >>> from trainer.config import load
    >>> line = ["data=d", "output=o", "model=gru4rec", "head=ple", "tasks=[next]", "loss=gbce"]
    >>> unread_options(line, load(line))
    ['head']
    """
    values = _values(options)
    if values.get("tasks", "").replace(" ", "") == "[next]":  # what a session model predicts anyway
        del values["tasks"]
    names = {name if name in READ_BY else name.rpartition(".")[0] for name in values}  # train.task_weights.like
    return sorted(name for name in names & READ_BY.keys() if not READ_BY[name](config))


def warn_about_unread(options: Sequence[str], config: TrainerConfig) -> None:
    """Print a warning to stderr if there are any."""
    if names := unread_options(options, config):
        which = f"model={config.model}" + f" with loss={config.loss}" * any(n in LOSS_READ_BY for n in names)
        which += " with ray.workers=0" * ("ray.use_gpu" in names)
        print(f"warning: {which} does not read {', '.join(names)}", file=sys.stderr, flush=True)
    recipe = _values(options).get("recipe", "auto")
    if recipe not in ("auto", config.recipe):
        which = f"model={config.model} has no recipe {recipe}: {config.recipe} is used"
        print(f"warning: {which}", file=sys.stderr, flush=True)


def _values(options: Sequence[str]) -> dict[str, str]:
    return dict(option.split("=", 1) for option in options if "=" in option)
