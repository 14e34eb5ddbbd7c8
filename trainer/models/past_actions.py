"""Embeddings of the actions on past clicks."""

from __future__ import annotations

import torch
from torch import nn

from trainer.data.batch import ACTION_BITS, MAX_ENTERED

ACTION_CODES = (MAX_ENTERED + 1) << ACTION_BITS


class PastActions(nn.Module):
    """Embeddings of a click's actions (like, share, follow, read, favorite) and of its visit count.

    The visit count includes later visits: `entered=False` leaves it out.

    The embeddings are initialised to zero; a click without actions adds nothing. An action is an outcome of its click:
    only states after that click may read it, and these predict only later rows.
    """

    signs: torch.Tensor

    def __init__(self, dimension: int, *, entered: bool = True) -> None:
        super().__init__()
        code = torch.arange(ACTION_CODES)[:, None]
        bits = (code >> torch.arange(ACTION_BITS)) & 1
        times = (code >> ACTION_BITS) == torch.arange(1, (MAX_ENTERED if entered else 0) + 1)
        signs = torch.cat([bits.bool(), times], dim=1).to(torch.get_default_dtype())
        self.register_buffer("signs", signs, persistent=False)
        self.weight = nn.Parameter(torch.zeros(signs.shape[1], dimension))

    def forward(self, actions_BT: torch.Tensor) -> torch.Tensor:
        """Embeddings `[B, T, D]` of codes (`action_codes`); zero for padding (0)."""
        return nn.functional.embedding(actions_BT, self.signs @ self.weight)
