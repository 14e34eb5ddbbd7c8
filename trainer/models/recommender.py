"""The session recommender: an encoder, and for the hybrid a multi-task head with a tower per feedback task.

The score of item i is q · v_i + b_i. Experts and gates never read the candidate, so next-item retrieval is a
nearest-neighbour search with any head.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import torch
from torch import nn

from trainer.config import TrainerConfig
from trainer.models.encoders import build_encoder, matrix_flops
from trainer.models.feedback import FeedbackInputs, FeedbackTower
from trainer.models.heads import HEAD_CLASSES, Head, Layout, Residual, two_layers
from trainer.models.item_features import ItemFeatures
from trainer.models.past_actions import PastActions

PROFILE_CODES = 32
"""Embedding rows for gender and age; codes outside 0..30 count as unknown."""
PROFILE_SIZE = 4


class Profile(nn.Module):
    """Embeddings of the user's gender and age."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(PROFILE_CODES, PROFILE_SIZE) for _ in range(2))

    def forward(self, profile_N2: torch.Tensor) -> torch.Tensor:
        """`[N, 8]` from codes `[N, 2]`, -1 = unknown."""
        unknown = (profile_N2 < 0) | (profile_N2 >= PROFILE_CODES - 1)
        code = torch.where(unknown, 0, profile_N2 + 1)
        return torch.cat([table(code[:, i]) for i, table in enumerate(self.embeddings)], dim=-1)


class Recommender(nn.Module):
    """A session model (encoder only) or `hybrid` (encoders under a multi-task head).

    Args:
        config: the run's configuration; `tasks` are those with training data.
        item_features: feature embeddings added to the item vectors.
        feedback_codes: int64 `[n_items + 1, C]`, codes of the features that feedback towers read, if any.
    """

    def __init__(
        self,
        config: TrainerConfig,
        item_features: ItemFeatures | None = None,
        feedback_codes: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        options = config.network
        self.item_features = item_features or ItemFeatures.none()
        self.past_actions = PastActions(options.embedding_dim) if options.past_actions else None
        encoders = {name: build_encoder(name, options) for name in config.encoders}
        self.encoders = nn.ModuleDict(cast(dict[str, nn.Module], encoders))
        self._encoder_flops = {f"encoder {name}": encoder.flops for name, encoder in encoders.items()}
        self.profile = Profile() if options.profile else None
        shared = 2 * PROFILE_SIZE if options.profile else 0
        self.layout = layout = Layout((options.hidden_size,) * len(self.encoders), shared)
        self.feedback_tasks = config.feedback_tasks if config.model == "hybrid" else []
        self.detach_items = options.detach_items
        self.temperature = options.cosine_temperature
        self.head: Head | None = None
        if config.model == "hybrid":
            self.head = HEAD_CLASSES[config.head](layout, options, config.tasks)
            widths = options.embedding_dim, options.tower, options.embedding_dim
            self.next_tower = nn.Sequential(Residual(*widths)) if options.residual else two_layers(*widths)
        elif layout.size != options.embedding_dim:
            self.next_tower = nn.Sequential(nn.Linear(layout.size, options.embedding_dim))
        else:
            self.next_tower = nn.Sequential()
        rates = config.train.positive_rates
        self.task_embedding_dim, self.reads_actions = config.task_embedding_dim, config.reads_actions
        self.feedback_features: FeedbackInputs | None = None
        if config.feedback_feature_dim:
            assert feedback_codes is not None, "a model whose feedback towers read features needs their codes"
            self.feedback_features = FeedbackInputs(
                feedback_codes, config.feedback_feature_dim, actions=options.feedback_actions
            )
        self.towers = nn.ModuleDict()
        for task in self.feedback_tasks:
            rate = rates.get(task, 0.5)
            sizes = options.embedding_dim, options.tower
            self.towers[task] = FeedbackTower(*sizes, rate, self.task_embedding_dim, self.feedback_features)

    def states(
        self,
        items_BT: torch.Tensor,
        click_BTD: torch.Tensor,
        profile_B2: torch.Tensor,
        needed_N: torch.Tensor,
        actions_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """States `[N, S]` after some clicks; with feedback features `[N, S + F]`, the clicks' mean features appended.

        Args:
            items_BT: int64, clicks padded with 0 on the right.
            click_BTD: their vectors.
            profile_B2: codes of gender and age.
            needed_N: int64, positions in the flattened `[B * T]` whose states are needed.
            actions_BT: int64, action codes of the clicks, for models that read them.
        """
        if self.past_actions is not None and actions_BT is not None:
            click_BTD = click_BTD + self.past_actions(actions_BT)
        states = [encoder(items_BT, click_BTD, needed_N) for encoder in self.encoders.values()]
        if self.profile is not None:
            states.append(self.profile(profile_B2)[needed_N // items_BT.shape[1]])
        if self.feedback_features is not None:
            states.append(self.feedback_features.clicked(items_BT, needed_N, actions_BT))
        return torch.cat(states, dim=1) if len(states) > 1 else states[0]

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Parameters that produce the state: encoders, past actions and profile."""
        parts = (self.encoders, self.past_actions, self.profile)
        return [parameter for part in parts if part is not None for parameter in part.parameters()]

    def feedback_parameters(self) -> list[nn.Parameter]:
        """Parameters used only by the feedback tasks: their towers and features."""
        own = [] if self.feedback_features is None else list(self.feedback_features.parameters())
        return own + list(self.towers.parameters())

    def task_representations(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Representations by task, `[N, D]` each; without a head, the state itself for `next`."""
        return {"next": state_NS} if self.head is None else self.head(self._head_input(state_NS))

    def _head_input(self, state_NS: torch.Tensor) -> torch.Tensor:
        """The part of the states that experts and gates read."""
        return state_NS[:, : self.layout.size]

    def query(self, task_ND: torch.Tensor) -> torch.Tensor:
        """Queries `[N, D]`; the score is the inner product with the `scoring_vectors` of items, plus their bias."""
        query_ND: torch.Tensor = self.next_tower(task_ND)
        if self.temperature is None:
            return query_ND
        return nn.functional.normalize(query_ND, dim=1) / self.temperature

    def scoring_vectors(self, vector_CD: torch.Tensor) -> torch.Tensor:
        """Item vectors `[C, D]` for scoring: L2-normalised if the score is a cosine."""
        return vector_CD if self.temperature is None else nn.functional.normalize(vector_CD, dim=1)

    def feedback_logits(
        self,
        state_NS: torch.Tensor,
        task_representations: dict[str, torch.Tensor],
        row_F: torch.Tensor,
        item_F: torch.Tensor,
        item_FD: torch.Tensor,
        own_FD: torch.Tensor | None = None,
        only: Collection[str] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Logits `[F]` of candidates by feedback task.

        Args:
            state_NS: states.
            task_representations: representations of these states by task.
            row_F: int64, row of the state that scores each candidate.
            item_F: int64, the candidates.
            item_FD: their vectors.
            own_FD: their task-specific embeddings, concatenated over the feedback tasks, if any.
            only: the tasks to score; None = all.
        """
        if self.detach_items:
            item_FD = item_FD.detach()
        features = None
        if self.feedback_features is not None:
            of_clicks = nn.functional.embedding(row_F, state_NS[:, self.layout.size :])
            features = self.feedback_features(item_F), of_clicks
        logits = {}
        for number, task in enumerate(self.feedback_tasks):
            if only is not None and task not in only:
                continue
            begin, end = number * self.task_embedding_dim, (number + 1) * self.task_embedding_dim
            own = None if own_FD is None else own_FD[:, begin:end]
            logits[task] = self.towers[task](task_representations[task], row_F, item_FD, own, features)
        return logits

    def gate_weights(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gate weights by task `[N, E]`; empty for heads without gates."""
        return {} if self.head is None else self.head.gate_weights(self._head_input(state_NS))

    def flops(self, *, candidates: int, embedding_dim: int, clicks: int) -> dict[str, int]:
        """FLOPs (multiply-adds × 2) of one target click's forward pass with one feedback row, by part.

        Args:
            candidates: number of items that each target competes with.
            embedding_dim: dimension of the item vectors.
            clicks: number of clicks before the target, for encoders whose cost depends on it.
        """
        by_module = {name: flops(clicks) for name, flops in self._encoder_flops.items()}
        by_module["head"] = self.head.flops() if self.head is not None else 0
        by_module["next tower"] = matrix_flops(self.next_tower)
        by_module["feedback towers"] = matrix_flops(self.towers)
        by_module["next scores"] = 2 * candidates * embedding_dim
        return by_module

    def part_parameters(self) -> dict[str, int]:
        """Parameter counts by part, without the item table."""
        by_module: dict[str, nn.Module | None] = {f"encoder {name}": e for name, e in self.encoders.items()}
        by_module |= {
            "past actions": self.past_actions,
            "profile": self.profile,
            "head": self.head,
            "next tower": self.next_tower,
            "feedback features": self.feedback_features,
        }
        by_module["feedback towers"] = self.towers
        return {n: sum(p.numel() for p in m.parameters()) if m is not None else 0 for n, m in by_module.items()}
