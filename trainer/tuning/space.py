"""Search spaces: options, their distributions, and the settings to try first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from etl.runtime.errors import InputError
from trainer.config import RANK_HEADS, TrainerConfig

DIGITS = 4
"""Significant digits of sampled numbers, for readability."""
Setting = dict[str, Any]
"""Option values of `python -m trainer` by name."""


@dataclass(frozen=True)
class Choice:
    """One of several values, equally likely."""

    values: Sequence[Any]

    def sample(self, random: np.random.Generator) -> Any:
        """Sample a value."""
        return self.values[int(random.integers(len(self.values)))]


@dataclass(frozen=True)
class Uniform:
    """A number between two bounds, uniform or log-uniform."""

    low: float
    high: float
    log: bool = False

    def sample(self, random: np.random.Generator) -> float:
        """Sample a value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = float(random.uniform(low, high))
        return float(f"{math.exp(value) if self.log else value:.{DIGITS}g}")


Dimension = Choice | Uniform
Space = Mapping[str, Dimension]

FACTOR = 4.0
"""A learning rate is sampled between the recipe's divided and multiplied by this."""
RATES = ("learning_rate", "network_learning_rate", "head_learning_rate", "feedback_learning_rate")
"""Learning rates among the options of `train`; null is not searched."""
BY_MODEL: Mapping[str, dict[str, Dimension]] = {
    "nextitnet": {"network.layers": Choice([1, 2])},
    "sasrec": {"network.layers": Choice([1, 2]), "network.attention_heads": Choice([1, 2])},
    "hybrid": {"network.experts": Choice([4, 8, 12]), "network.gate_preference": Choice([0.0, 1.0, 2.0])},
}
OFFICIAL: Setting = {
    "loss": "sampled_softmax",
    "network.embedding_dim": 100,
    "network.hidden_size": 100,
    "network.embedding_dropout": 0.35,
    "network.state_dropout": 0.2,
    "train.learning_rate": 0.06,
    "train.negative_popularity_exponent": 0.4,
}
"""Close to the settings that GRU4Rec's authors published for cross-entropy (Hidasi and Czapp 2023)."""


def default_space(config: TrainerConfig) -> Space:
    """The space around the recipe that `config` is resolved with."""
    train, network = config.train, config.network
    learning_rates = {name: getattr(train, name) for name in RATES}
    space: dict[str, Dimension] = {
        **{f"train.{n}": Uniform(v / FACTOR, v * FACTOR, log=True) for n, v in learning_rates.items() if v is not None},
        "train.batch_tokens": _scaled(train.batch_tokens, 0.5, 1, 2),
        "network.embedding_dim": _scaled(network.embedding_dim, 0.5, 0.75, 1, 1.5),
        "network.hidden_size": _scaled(network.hidden_size, 0.5, 0.75, 1, 1.5),
        "network.state_dropout": Uniform(0.0, 0.7),
    }
    if config.is_ranking_model or config.model == "hybrid":
        space["network.tower"] = _scaled(network.tower, 0.5, 1, 2)
    if config.is_ranking_model:
        decay = train.weight_decay or 1e-5
        return space | {"train.weight_decay": Uniform(decay / 100, decay * 10, log=True)}
    space |= {
        "loss": Choice(list(dict.fromkeys([config.loss, "bpr_max", "sampled_softmax", "gbce"]))),
        "train.negatives": _scaled(train.negatives, 0.5, 1, 2),
        "train.negative_popularity_exponent": Uniform(0.0, 1.0),
        "network.embedding_dropout": Uniform(0.0, 0.7),
    }
    if train.ppmi_start:  # otherwise the item vectors of this catalogue size start at random
        space["train.ppmi_start"] = Choice([train.ppmi_start / 2, train.ppmi_start, train.ppmi_start * 2])
    return space | BY_MODEL.get(config.model, {})


def _scaled(value: int, *factors: float) -> Choice:
    """The value times each factor, in multiples of 8 (attention divides widths by its heads)."""
    return Choice(list(dict.fromkeys(max(8, round(value * factor / 8) * 8) for factor in factors)))


def first_settings(model: str) -> list[Setting]:
    """Settings tried before sampled ones: the unchanged recipe, and one that was good on other datasets."""
    return [{}] if model in RANK_HEADS or model in ("sasrec", "nextitnet") else [{}, OFFICIAL]


def settings(model: str, space: Space, trials: int, seed: int, *, known: bool) -> list[Setting]:
    """The settings of a search; each depends only on seed and number, so that adding trials keeps the earlier ones.

    Args:
        model: name of the model.
        space: the search space.
        trials: number of settings.
        seed: seed of the sampling.
        known: whether to start with all known settings of the model; else only with the recipe.
    """
    first = first_settings(model) if known else [{}]
    sampled = [
        {name: dimension.sample(np.random.default_rng([seed, number, index])) for index, (name, dimension) in entries}
        for number, entries in ((n, list(enumerate(space.items()))) for n in range(trials))
    ]
    return [first[number] if number < len(first) else sampled[number] for number in range(trials)]


def read_space(path: str) -> Space:
    """The space of a YAML file: `option: {choice: [a, b]}`, `{uniform: [low, high]}` or `{log_uniform: [low, high]}`.

    Raises:
        InputError: the file cannot be read, or is not a search space.
    """
    hint = "for example train.learning_rate: {log_uniform: [0.01, 0.2]}"
    try:
        space = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError("a readable search space", f"{path} ({str(error).splitlines()[0]})", hint) from None
    if not isinstance(space, dict) or not space:
        raise InputError("options with their dimensions", f"something else in {path}", hint)
    return {str(name): _dimension(str(name), spec, hint) for name, spec in space.items()}


def _dimension(name: str, spec: Any, hint: str) -> Dimension:
    kind, given = next(iter(spec.items())) if isinstance(spec, dict) and len(spec) == 1 else ("", None)
    values = given if isinstance(given, list) else []
    if kind == "choice" and values:
        return Choice(values)
    bounds = len(values) == 2 and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    if kind in ("uniform", "log_uniform") and bounds:
        low, high = values
        if low < high and (kind == "uniform" or low > 0):
            return Uniform(low, high, log=kind == "log_uniform")
    raise InputError(f"a choice, uniform or log_uniform for {name}", spec, hint)


def command_line(setting: Setting) -> list[str]:
    """A setting as options of `python -m trainer`.

    >>> command_line({"loss": "gbce", "network.cosine_temperature": None, "train.task_weights": {"like": 0.1}})
    ['loss=gbce', 'network.cosine_temperature=null', 'train.task_weights={like:0.1}']
    """
    return [f"{name}={_text(value)}" for name, value in setting.items()]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{_text(each)}' for name, each in value.items())}}}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
