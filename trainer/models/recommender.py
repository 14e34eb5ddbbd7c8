"""The recommender: an encoder, and for the hybrid a head with a tower for each task.

The score of item i is q · v_i + b_i. No candidate enters an expert or a gate, so the next item stays a
nearest-neighbour problem whatever the head.
"""

from __future__ import annotations

import torch
from torch import nn

from trainer.config import TrainerConfig
from trainer.models.gru4rec import GRUEncoder
from trainer.models.mmoe import HEADS, MMoE

PROFILE_CODES = 32
"""Gender and age are small codes; anything outside 0..30 counts as unknown."""
PROFILE_SIZE = 4


class Profile(nn.Module):
    """Gender and age of the user, embedded."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(PROFILE_CODES, PROFILE_SIZE) for _ in range(2))

    def forward(self, profile_N2: torch.Tensor) -> torch.Tensor:
        """`[N, 8]` from codes `[N, 2]`, -1 = unknown."""
        unknown = (profile_N2 < 0) | (profile_N2 >= PROFILE_CODES - 1)
        code = torch.where(unknown, 0, profile_N2 + 1)
        return torch.cat([table(code[:, i]) for i, table in enumerate(self.embeddings)], dim=-1)


class FeedbackTower(nn.Module):
    """Logit of a feedback task for a candidate c: an MLP of [m_k ; v_c ; m_k ⊙ v_c]."""

    def __init__(self, dimension: int, units: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3 * dimension, units), nn.ReLU(), nn.Linear(units, 1))

    def forward(self, mix_FD: torch.Tensor, item_FD: torch.Tensor) -> torch.Tensor:
        """Logits `[F]`."""
        return self.network(torch.cat([mix_FD, item_FD, mix_FD * item_FD], dim=-1)).squeeze(-1)


class Recommender(nn.Module):
    """`gru4rec` (an encoder alone) or `hybrid` (an encoder under a multi-task head).

    Args:
        config: the run's configuration; `tasks` are those that the data can train.
    """

    def __init__(self, config: TrainerConfig) -> None:
        super().__init__()
        options = config.network
        self.encoder = GRUEncoder(options)
        self.profile = Profile() if options.profile else None
        state_size = options.hidden + (2 * PROFILE_SIZE if options.profile else 0)
        self.feedback_tasks = config.feedback_tasks if config.model == "hybrid" else []
        self.detach_items = options.detach_items
        self.head: nn.Module | None = None
        if config.model == "hybrid":
            self.head = HEADS[config.head](state_size, options.dimension, options.experts, config.tasks)
            self.next_tower = nn.Sequential(
                nn.Linear(options.dimension, options.tower), nn.ReLU(), nn.Linear(options.tower, options.dimension)
            )
        elif state_size != options.dimension:
            self.next_tower = nn.Sequential(nn.Linear(state_size, options.dimension))
        else:
            self.next_tower = nn.Sequential()
        self.towers = nn.ModuleDict(
            {task: FeedbackTower(options.dimension, options.tower) for task in self.feedback_tasks}
        )

    def states(self, click_BTD: torch.Tensor, profile_B2: torch.Tensor) -> torch.Tensor:
        """States after each click `[B, T, S]`, with the profile beside them where it is used."""
        state = self.encoder(click_BTD)
        if self.profile is None:
            return state
        profile = self.profile(profile_B2)[:, None].expand(-1, state.shape[1], -1)
        return torch.cat([state, profile], dim=-1)

    def mixes(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """What each task sees of states, `[N, D]` each; an encoder alone hands its state to `next`."""
        return {"next": state_NS} if self.head is None else self.head(state_NS)

    def query(self, mix_ND: torch.Tensor) -> torch.Tensor:
        """Queries `[N, D]` whose inner product with item vectors, plus bias, is the score."""
        return self.next_tower(mix_ND)

    def feedback_logits(self, task: str, mix_FD: torch.Tensor, item_FD: torch.Tensor) -> torch.Tensor:
        """Logits `[F]` of a feedback task for candidates, before the row is seen."""
        return self.towers[task](mix_FD, item_FD.detach() if self.detach_items else item_FD)

    def gate_weights(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Shares of the experts by task `[N, E]`; empty for heads without gates."""
        return self.head.gate_weights(state_NS) if isinstance(self.head, MMoE) else {}

    def flops(self, candidates: int, dimension: int) -> dict[str, int]:
        """Multiply-adds × 2 of one target click's forward pass, by part.

        Args:
            candidates: items that each target competes with.
            dimension: length of the item vectors.
        """
        parts = self.encoder.flops()
        dense = {"head": self.head, "next tower": self.next_tower, "feedback towers": self.towers}
        for name, module in dense.items():
            weights = sum(p.numel() for p in module.parameters() if p.dim() == 2) if module is not None else 0
            parts[name] = 2 * weights
        parts["softmax"] = 2 * candidates * dimension
        return parts
