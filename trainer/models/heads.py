"""Heads: how the tasks share the session state.

Every head maps a state `[N, S]` to one mix `m_k` `[N, D]` for each task k.
"""

from __future__ import annotations

import torch
from torch import nn


def expert(state_size: int, dimension: int) -> nn.Sequential:
    """One expert: a linear layer and ReLU, as in the paper's synthetic experiments."""
    return nn.Sequential(nn.Linear(state_size, dimension), nn.ReLU())


class MMoE(nn.Module):
    """Multi-gate mixture of experts (Ma et al. 2018): m_k = Σ_e g_ke f_e(h), g_k = softmax(W_k h)."""

    def __init__(self, state_size: int, dimension: int, experts: int, tasks: list[str]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(expert(state_size, dimension) for _ in range(experts))
        self.gates = nn.ModuleDict({task: nn.Linear(state_size, experts, bias=False) for task in tasks})

    def gate_weights(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """The share of each expert in each task's mix, `[N, E]`, rows summing to 1."""
        return {task: torch.softmax(gate(state_NS), dim=-1) for task, gate in self.gates.items()}

    def forward(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mixes of all tasks, `[N, D]` each."""
        output_NED = torch.stack([expert(state_NS) for expert in self.experts], dim=1)
        return {
            task: torch.bmm(weight_NE.unsqueeze(1), output_NED).squeeze(1)
            for task, weight_NE in self.gate_weights(state_NS).items()
        }


class SharedBottom(nn.Module):
    """One expert that all tasks share (Caruana 1997)."""

    def __init__(self, state_size: int, dimension: int, experts: int, tasks: list[str]) -> None:
        super().__init__()
        del experts
        self.bottom, self.tasks = expert(state_size, dimension), tasks

    def forward(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same mix for every task."""
        output = self.bottom(state_NS)
        return dict.fromkeys(self.tasks, output)


class Single(nn.Module):
    """An expert for each task: only the encoder and the items are shared."""

    def __init__(self, state_size: int, dimension: int, experts: int, tasks: list[str]) -> None:
        super().__init__()
        del experts
        self.own = nn.ModuleDict({task: expert(state_size, dimension) for task in tasks})

    def forward(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each task's own mix."""
        return {task: network(state_NS) for task, network in self.own.items()}


HEADS: dict[str, type[MMoE] | type[SharedBottom] | type[Single]] = {
    "mmoe": MMoE,
    "shared_bottom": SharedBottom,
    "single": Single,
}
