"""SASRec's session encoder (Kang and McAuley 2018): causal self-attention."""

from __future__ import annotations

import torch
from torch import nn

from trainer.option_groups import ModelOptions

LENGTH_STEP = 16
"""At inference, sessions are padded to a multiple of this length.

The summation order of PyTorch's CPU attention depends on the length. A session's state must be bit-identical alone and
in a batch with longer ones, so that the server reproduces the evaluation.
"""


class Attention(nn.Module):
    """Causal self-attention over the clicks.

    Args:
        size: dimension of a state.
        heads: number of attention heads.
        dropout: dropout of the attention weights.
        distances: maximum session length, for a learned bias per relative distance; 0 = none.
    """

    def __init__(self, size: int, heads: int, dropout: float, distances: int) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        # Without biases, as in the paper: the keys' bias shifts all logits alike, its gradient is only rounding.
        self.project, self.join = nn.Linear(size, 3 * size, bias=False), nn.Linear(size, size)
        self.bias_by_distance = nn.Parameter(torch.zeros(heads, distances)) if distances else None

    def forward(self, state_BTH: torch.Tensor) -> torch.Tensor:
        """Attention output of each position over itself and earlier ones, `[B, T, H]`."""
        b, t, h = state_BTH.shape
        projected = self.project(state_BTH).view(b, t, 3, self.heads, h // self.heads)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        mask = None if self.bias_by_distance is None else causal_bias(self.bias_by_distance, t)
        mixed_BATH = nn.functional.scaled_dot_product_attention(
            query, key, value, mask, self.dropout if self.training else 0.0, is_causal=mask is None
        )
        joined: torch.Tensor = self.join(mixed_BATH.transpose(1, 2).reshape(b, t, h))
        return joined


def causal_bias(bias_AD: torch.Tensor, t: int) -> torch.Tensor:
    """Additive attention mask `[A, t, t]`: a relative position bias (Raffel et al. 2020), -inf for later positions.

    Args:
        bias_AD: bias of A heads by distance in clicks.
        t: number of positions.
    """
    position = torch.arange(t, device=bias_AD.device)
    distance = position[:, None] - position
    return bias_AD[:, distance.clamp(0, bias_AD.shape[1] - 1)].masked_fill(distance < 0, -torch.inf)


class Block(nn.Module):
    """Causal self-attention, then a position-wise network, each with pre-norm and residual connection."""

    def __init__(self, options: ModelOptions, distances: int) -> None:
        super().__init__()
        size, dropout = options.hidden_size, options.state_dropout
        self.before_attention, self.before_network = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = Attention(size, options.attention_heads, dropout, distances)
        self.network = nn.Sequential(
            nn.Linear(size, size), nn.ReLU(), nn.Dropout(dropout), nn.Linear(size, size), nn.Dropout(dropout)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, state_BTH: torch.Tensor) -> torch.Tensor:
        """Output states `[B, T, H]`."""
        state_BTH = state_BTH + self.dropout(self.attention(self.before_attention(state_BTH)))
        return state_BTH + self.network(self.before_network(state_BTH))


class GatedBlock(nn.Module):
    """The block of eSASRec (Tikhonovich et al. 2025), after LiGR (Borisyuk et al. 2025).

    Attention and a SwiGLU network, each with pre-norm and a gated residual: x + σ(W x) ⊙ f(norm(x)).
    """

    def __init__(self, options: ModelOptions, distances: int) -> None:
        super().__init__()
        size, dropout = options.hidden_size, options.state_dropout
        self.before_attention, self.before_network = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = Attention(size, options.attention_heads, dropout, distances)
        self.attention_gate, self.network_gate = nn.Linear(size, size), nn.Linear(size, size)
        self.enter, self.leave = nn.Linear(size, 2 * size, bias=False), nn.Linear(size, size, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, state_BTH: torch.Tensor) -> torch.Tensor:
        """Output states `[B, T, H]`."""
        gathered = self.dropout(self.attention(self.before_attention(state_BTH)))
        state_BTH = state_BTH + torch.sigmoid(self.attention_gate(state_BTH)) * gathered
        swished, linear = self.enter(self.before_network(state_BTH)).chunk(2, dim=-1)
        changed = self.dropout(self.leave(self.dropout(nn.functional.silu(swished) * linear)))
        return state_BTH + torch.sigmoid(self.network_gate(state_BTH)) * changed


class SASRecEncoder(nn.Module):
    """Blocks of causal self-attention over click vectors, with learned positions or a relative position bias.

    Sessions are right-padded and attention is causal, so padding never affects a state that is used.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        size = options.hidden_size
        self.scale = size**0.5
        self.enter = nn.Linear(options.embedding_dim, size) if options.embedding_dim != size else nn.Identity()
        self.position: nn.Embedding | None = None
        if not options.relative_positions:
            self.position = nn.Embedding(options.positions, size)
            nn.init.normal_(self.position.weight, std=0.02)
        self.dropout = nn.Dropout(options.embedding_dropout)
        block = GatedBlock if options.attention_block == "ligr" else Block
        distances = options.positions if options.relative_positions else 0
        self.blocks = nn.ModuleList(block(options, distances) for _ in range(options.layers))
        self.last = nn.LayerNorm(size)

    def forward(self, items_BT: torch.Tensor, click_BTD: torch.Tensor, needed_N: torch.Tensor) -> torch.Tensor:
        """States `[N, H]` after the clicks at positions `needed_N` of the flattened `[B * T]`."""
        # Item vectors are initialised small: scaled as in the paper's code, to match the positions.
        state_BTH = self.enter(click_BTD) * self.scale
        if self.position is not None:
            state_BTH = state_BTH + self.position(torch.arange(items_BT.shape[1], device=items_BT.device))
        state_BTH = self.dropout(state_BTH)
        t = state_BTH.shape[1]
        if not self.training:
            state_BTH = nn.functional.pad(state_BTH, (0, 0, 0, -t % LENGTH_STEP))
        for block in self.blocks:
            state_BTH = block(state_BTH)
        return self.last(state_BTH[:, :t].flatten(0, 1)[needed_N])

    def flops(self, clicks: int) -> int:
        """FLOPs (multiply-adds × 2) of one state's forward pass, attending to `clicks` clicks in each layer."""
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 2 * (matrices + len(self.blocks) * 2 * clicks * self.last.normalized_shape[0])
