"""SASRec's session encoder (Kang and McAuley 2018): causal self-attention."""

from __future__ import annotations

import torch
from torch import nn

from trainer.option_groups import ModelOptions


class Block(nn.Module):
    """Self-attention to the clicks so far, then a position-wise network, each normalised before and added."""

    def __init__(self, size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, dropout
        self.before_attention, self.before_network = nn.LayerNorm(size), nn.LayerNorm(size)
        # Without biases, as in the paper: that of the keys shifts all logits alike and would follow rounding alone.
        self.project, self.join = nn.Linear(size, 3 * size, bias=False), nn.Linear(size, size)
        self.network = nn.Sequential(
            nn.Linear(size, size), nn.ReLU(), nn.Dropout(dropout), nn.Linear(size, size), nn.Dropout(dropout)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, state_BTH: torch.Tensor) -> torch.Tensor:
        """The next layer's states `[B, T, H]`."""
        b, t, h = state_BTH.shape
        parts = self.project(self.before_attention(state_BTH)).view(b, t, 3, self.heads, h // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=self.attention_dropout if self.training else 0.0, is_causal=True
        )
        state_BTH = state_BTH + self.dropout(self.join(mixed.transpose(1, 2).reshape(b, t, h)))
        return state_BTH + self.network(self.before_network(state_BTH))


class SASRecEncoder(nn.Module):
    """Blocks of causal self-attention over click vectors plus learned positions.

    Sessions are padded on the right and attention looks back only, so padding never enters a state that
    is used.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        size = options.hidden_size
        self.enter = nn.Linear(options.embedding_dim, size) if options.embedding_dim != size else nn.Identity()
        self.position = nn.Embedding(options.positions, size)
        nn.init.normal_(self.position.weight, std=0.02)
        self.dropout = nn.Dropout(options.embedding_dropout)
        self.blocks = nn.ModuleList(
            Block(size, options.attention_heads, options.state_dropout) for _ in range(options.layers)
        )
        self.last = nn.LayerNorm(size)

    def forward(self, items_BT: torch.Tensor, click_BTD: torch.Tensor, needed_N: torch.Tensor) -> torch.Tensor:
        """States `[N, H]` after the clicks at places `needed_N` of the flattened `[B * T]`."""
        place = torch.arange(items_BT.shape[1], device=items_BT.device)
        # Item vectors are drawn small: scaled as in the paper's code, they do not drown in the positions.
        scaled = self.enter(click_BTD) * self.position.embedding_dim**0.5
        state_BTH = self.dropout(scaled + self.position(place))
        for block in self.blocks:
            state_BTH = block(state_BTH)
        return self.last(state_BTH.flatten(0, 1)[needed_N])

    def flops(self, clicks: int) -> int:
        """Multiply-adds × 2 of one state's forward pass, looking back at `clicks` clicks in each layer."""
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        enter = sum(p.numel() for p in self.enter.parameters() if p.dim() == 2)
        return 2 * (enter + matrices + len(self.blocks) * 2 * clicks * self.position.embedding_dim)
