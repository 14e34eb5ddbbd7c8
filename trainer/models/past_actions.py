"""Embeddings of what was done with past clicks."""

from __future__ import annotations

import torch
from torch import nn

from trainer.data.batch import ACTION_BITS, ENTERED_MOST

ACTION_CODES = (ENTERED_MOST + 1) << ACTION_BITS


class PastActions(nn.Module):
    """A vector for each action of a click (like, share, follow, read, favorite) and for how often it was entered.

    How often counts all visits, also later ones: with `entered=False` it is left out.

    The vectors begin at zero; a click without actions adds nothing. An action is an outcome of its click: only states
    after that click may read it, and those predict later rows alone.
    """

    signs: torch.Tensor

    def __init__(self, dimension: int, *, entered: bool = True) -> None:
        super().__init__()
        code = torch.arange(ACTION_CODES)[:, None]
        bits = (code >> torch.arange(ACTION_BITS)) & 1
        times = (code >> ACTION_BITS) == torch.arange(1, (ENTERED_MOST if entered else 0) + 1)
        signs = torch.cat([bits.bool(), times], dim=1).to(torch.get_default_dtype())
        self.register_buffer("signs", signs, persistent=False)
        self.weight = nn.Parameter(torch.zeros(signs.shape[1], dimension))

    def forward(self, actions_BT: torch.Tensor) -> torch.Tensor:
        """Vectors `[B, T, D]` of codes (`action_codes`); those of padding, 0, are zero."""
        return nn.functional.embedding(actions_BT, self.signs @ self.weight)
