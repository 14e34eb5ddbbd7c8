"""GRU4Rec's session encoder (Hidasi et al. 2016), all positions of a session at once."""

from __future__ import annotations

import torch
from torch import nn

from trainer.models.gru import gru_states
from trainer.option_groups import ModelOptions


class GRUEncoder(nn.Module):
    """A GRU over the vectors of the clicks; the state after click p is a function of clicks 1..p.

    Sessions are right-padded, so padding never affects a state that is used.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.embedding_dropout = options.embedding_dropout
        self.gru = nn.GRU(options.embedding_dim, options.hidden_size, options.layers, batch_first=True)
        self.dropout = nn.Dropout(options.state_dropout)

    def forward(self, items_BT: torch.Tensor, click_BTD: torch.Tensor, needed_N: torch.Tensor) -> torch.Tensor:
        """States `[N, H]` after the clicks at positions `needed_N` of the flattened `[B * T]`."""
        del items_BT
        click_BTD = drop_clicks(click_BTD, self.embedding_dropout, training=self.training)
        if click_BTD.requires_grad and click_BTD.device.type == "cpu":
            state_BTH = gru_states(self.gru, click_BTD)
        else:
            state_BTH, _ = self.gru(click_BTD)
        return self.dropout(state_BTH.flatten(0, 1)[needed_N])

    def flops(self, clicks: int) -> int:
        """FLOPs (multiply-adds × 2) of one state's forward pass: one GRU step, whatever the session length."""
        del clicks
        return 2 * sum(weight.numel() for name, weight in self.gru.named_parameters() if name.startswith("weight"))


def drop_clicks(click_BTD: torch.Tensor, share: float, *, training: bool) -> torch.Tensor:
    """Drop random click vectors in training and scale up the others.

    This is embedding dropout in the official GRU4Rec, item dropout in Tan et al. 2016.
    """
    if not training or not share:
        return click_BTD
    keep = click_BTD.new_empty(*click_BTD.shape[:2], 1).bernoulli_(1.0 - share)
    return click_BTD * keep / (1.0 - share)
