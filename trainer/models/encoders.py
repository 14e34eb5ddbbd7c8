"""Builds session encoders by name; `docs/extending.md` shows how to add an encoder."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import torch
from torch import nn

from trainer.config import ENCODERS
from trainer.option_groups import ModelOptions


class Encoder(Protocol):
    """The interface of a session encoder, a module built from `ModelOptions`."""

    def __call__(self, items_BT: torch.Tensor, click_BTD: torch.Tensor, needed_N: torch.Tensor) -> torch.Tensor:
        """States `[N, H]` after the clicks at positions `needed_N` of the flattened `[B * T]`.

        Args:
            items_BT: int64, clicks padded with 0 on the right.
            click_BTD: their vectors.
            needed_N: int64.
        """

    def flops(self, clicks: int) -> int:
        """FLOPs (multiply-adds × 2) of the state after `clicks` clicks."""


def build_encoder(name: str, options: ModelOptions) -> Encoder:
    """Build and initialise an encoder by name."""
    module, _, class_name = ENCODERS[name].rpartition(".")
    return cast(Encoder, getattr(importlib.import_module(module), class_name)(options))


def matrix_flops(module: nn.Module | None) -> int:
    """FLOPs (multiply-adds × 2) of a network that uses each matrix once per example."""
    return 0 if module is None else 2 * sum(p.numel() for p in module.parameters() if p.dim() == 2)
