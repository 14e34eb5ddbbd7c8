"""NextItNet's session encoder (Yuan et al. 2019): residual blocks of dilated causal convolutions."""

from __future__ import annotations

import torch
from torch import nn

from trainer.option_groups import ModelOptions

KERNEL = 3
"""Kernel size of the convolutions, including the current click."""


class CausalConvolution(nn.Module):
    """Causal convolution over clicks t, t − `dilation` and t − 2 × `dilation`, zero-padded on the left."""

    def __init__(self, size: int, dilation: int) -> None:
        super().__init__()
        self.before = (KERNEL - 1) * dilation
        self.convolution = nn.Conv1d(size, size, KERNEL, dilation=dilation)

    def forward(self, state_BHT: torch.Tensor) -> torch.Tensor:
        """`[B, H, T]`; position t depends on positions up to t."""
        return self.convolution(nn.functional.pad(state_BHT, (self.before, 0)))


class Block(nn.Module):
    """Residual block of two convolutions, the second with twice the dilation, each followed by norm and ReLU."""

    def __init__(self, size: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(CausalConvolution(size, d) for d in (dilation, 2 * dilation))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, state_BTH: torch.Tensor) -> torch.Tensor:
        """The next block's states `[B, T, H]`."""
        inner = state_BTH
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            # Normalise per position: over positions, a state would depend on later clicks.
            inner = torch.relu(norm(convolution(inner.transpose(1, 2)).transpose(1, 2)))
        return state_BTH + self.dropout(inner)


class NextItNetEncoder(nn.Module):
    """Blocks of `network.dilations`, repeated `network.layers` times, over click vectors.

    Sessions are right-padded and convolutions causal, so padding never affects a state that is used. A block of
    dilation d looks 6 d clicks back: the default dilations 1 and 4 give a receptive field of 31 clicks.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        size = options.hidden_size
        self.enter = nn.Linear(options.embedding_dim, size) if options.embedding_dim != size else nn.Identity()
        self.scale = size**0.5
        self.dropout = nn.Dropout(options.embedding_dropout)
        self.blocks = nn.ModuleList(
            Block(size, dilation, options.state_dropout)
            for _ in range(options.layers)
            for dilation in options.dilations
        )
        self.last = nn.LayerNorm(size)

    def forward(self, items_BT: torch.Tensor, click_BTD: torch.Tensor, needed_N: torch.Tensor) -> torch.Tensor:
        """States `[N, H]` after the clicks at positions `needed_N` of the flattened `[B * T]`."""
        state_BTH = self.dropout(self.enter(click_BTD) * self.scale)  # item vectors are initialised small
        for block in self.blocks:
            state_BTH = block(state_BTH)
        return self.last(state_BTH.flatten(0, 1)[needed_N])

    def flops(self, clicks: int) -> int:
        """FLOPs (multiply-adds × 2) of one state's forward pass; positions are computed once for all later states."""
        return 2 * sum(p.numel() for p in self.parameters() if p.dim() > 1)
