"""Embeddings of feedback on past clicks, added to the clicks' vectors."""

from __future__ import annotations

import torch
from torch import nn

from trainer.data.batch import ACTION_BITS, ENTERED_MOST

ACTION_CODES = (ENTERED_MOST + 1) << ACTION_BITS


class PastActions(nn.Module):
    """A vector for each action of a click (like, share, follow, read, favorite) and for how often it was entered.

    The vectors begin at zero; a click without actions adds nothing. An action is an outcome of its click: only states
    after that click may read it, and those predict later rows alone.
    """

    signs: torch.Tensor

    def __init__(self, dimension: int) -> None:
        super().__init__()
        code = torch.arange(ACTION_CODES)[:, None]
        bits = (code >> torch.arange(ACTION_BITS)) & 1
        entered = (code >> ACTION_BITS) == torch.arange(1, ENTERED_MOST + 1)
        signs = torch.cat([bits.bool(), entered], dim=1).to(torch.get_default_dtype())
        self.register_buffer("signs", signs, persistent=False)
        self.weight = nn.Parameter(torch.zeros(ACTION_BITS + ENTERED_MOST, dimension))

    def forward(self, actions_BT: torch.Tensor) -> torch.Tensor:
        """Vectors `[B, T, D]` of codes (`action_codes`); those of padding, 0, are zero."""
        return nn.functional.embedding(actions_BT, self.signs @ self.weight)
