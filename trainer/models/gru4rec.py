"""GRU4Rec's session encoder (Hidasi et al. 2016), all positions of a session at once."""

from __future__ import annotations

import torch
from torch import nn

from trainer.config import ModelOptions


class GRUEncoder(nn.Module):
    """A GRU over the vectors of the clicks; the state after click p is a function of clicks 1..p.

    Sessions are padded on the right, so padding never enters a state that is used.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.embedding_dropout = options.embedding_dropout
        self.gru = nn.GRU(options.dimension, options.hidden, options.layers, batch_first=True)
        self.dropout = nn.Dropout(options.state_dropout)

    def forward(self, click_BTD: torch.Tensor) -> torch.Tensor:
        """States `[B, T, H]` from click vectors `[B, T, D]`."""
        if self.training and self.embedding_dropout:
            # A whole click is dropped or kept, as in the official GRU4Rec and in Tan et al. 2016.
            keep = click_BTD.new_empty(*click_BTD.shape[:2], 1).bernoulli_(1.0 - self.embedding_dropout)
            click_BTD = click_BTD * keep / (1.0 - self.embedding_dropout)
        state_BTH, _ = self.gru(click_BTD)
        return self.dropout(state_BTH)

    def flops(self) -> dict[str, int]:
        """Multiply-adds × 2 of one click's forward pass, by part."""
        gru = sum(weight.numel() for name, weight in self.gru.named_parameters() if name.startswith("weight"))
        return {"encoder": 2 * gru}
