"""Options of small models, and their weights in NumPy."""

from __future__ import annotations

import numpy as np
import torch

from trainer.config import TrainerConfig
from trainer.option_groups import ModelOptions

TASKS = ["next", "click", "like"]


def options(**changes) -> ModelOptions:
    small = {"embedding_dim": 6, "hidden_size": 5, "experts": 3, "tower": 4, "positions": 12}
    return ModelOptions(**small | {"embedding_dropout": 0.0, "state_dropout": 0.0} | changes)


def config(network=None, **changes) -> TrainerConfig:
    arguments = {"model": "hybrid", "tasks": list(TASKS), "network": network or options()}
    return TrainerConfig(data="", output="", **arguments | changes)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def weights(module) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


def every_place(items: torch.Tensor) -> torch.Tensor:
    return torch.arange(items.numel())
