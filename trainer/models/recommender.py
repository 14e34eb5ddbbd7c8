"""The session recommender: an encoder, and for the hybrid a head with a tower for each task.

The score of item i is q · v_i + b_i. No candidate enters an expert or a gate, so the next item stays a
nearest-neighbour problem whatever the head.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn

from trainer.config import TrainerConfig
from trainer.models.encoders import build_encoder, matrix_flops
from trainer.models.heads import HEADS, Head, Layout, Residual, two_layers
from trainer.models.item_features import ItemFeatures
from trainer.models.past_actions import PastActions

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
    """Logit of a feedback task for a candidate c: an MLP of [m_k ; v_c ; m_k ⊙ v_c].

    Args:
        embedding_dim: length of mix and item vector.
        units: of the hidden layer.
        rate: share of positives in train. The logit begins at its log odds, so that a rare task does
            not spend its first epochs on learning how rare it is.
        own_dim: length of the embeddings that the task has to itself (STEM, Su et al. 2024); the candidate's and their
            product with a projection of m_k join the input.
    """

    def __init__(self, embedding_dim: int, units: int, rate: float, own_dim: int = 0) -> None:
        super().__init__()
        if own_dim:
            self.own_mix = nn.Linear(embedding_dim, own_dim)
            self.own_hidden = nn.Linear(2 * own_dim, units, bias=False)
        self.network = two_layers(3 * embedding_dim, units, 1)
        init_bias_to_prior(self.network, rate)

    def forward(
        self, mix_ND: torch.Tensor, row_F: torch.Tensor, item_FD: torch.Tensor, own_FD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits `[F]` of candidates, each by the mix in row `row_F`; `own_FD` are the task's own embeddings of them.

        The first layer is a sum of three products; that of the mix alone is worked out once a mix, not once a row.
        """
        first = self.network[0]
        assert isinstance(first, nn.Linear)
        by_mix, by_item, by_both = first.weight.split(mix_ND.shape[1], dim=1)
        of_mix = nn.functional.embedding(row_F, nn.functional.linear(mix_ND, by_mix, first.bias))
        both = nn.functional.embedding(row_F, mix_ND) * item_FD
        hidden = of_mix + nn.functional.linear(item_FD, by_item) + nn.functional.linear(both, by_both)
        if own_FD is not None:
            own_mix = nn.functional.embedding(row_F, self.own_mix(mix_ND))
            hidden = hidden + self.own_hidden(torch.cat([own_FD, own_mix * own_FD], dim=1))
        return self.network[1:](hidden).squeeze(-1)


@torch.no_grad()
def init_bias_to_prior(network: nn.Sequential, rate: float) -> None:
    """Set the last layer's bias to the log odds of a rate."""
    rate = min(max(rate, 1e-6), 1.0 - 1e-6)
    last = network[-1]
    assert isinstance(last, nn.Linear)
    last.bias.fill_(math.log(rate / (1.0 - rate)))


class Recommender(nn.Module):
    """A session model (an encoder alone) or `hybrid` (encoders under a multi-task head).

    Args:
        config: the run's configuration; `tasks` are those that the data can train.
        item_features: what the items' features add to their vectors.
    """

    def __init__(self, config: TrainerConfig, item_features: ItemFeatures | None = None) -> None:
        super().__init__()
        options = config.network
        self.item_features = item_features or ItemFeatures.none()
        self.past_actions = PastActions(options.embedding_dim) if options.past_actions else None
        encoders = {name: build_encoder(name, options) for name in config.encoders}
        self.encoders = nn.ModuleDict(cast(dict[str, nn.Module], encoders))
        self._encoder_flops = {f"encoder {name}": encoder.flops for name, encoder in encoders.items()}
        self.profile = Profile() if options.profile else None
        shared = 2 * PROFILE_SIZE if options.profile else 0
        layout = Layout((options.hidden_size,) * len(self.encoders), shared)
        self.feedback_tasks = config.feedback_tasks if config.model == "hybrid" else []
        self.detach_items = options.detach_items
        self.temperature = options.cosine_temperature
        self.head: Head | None = None
        if config.model == "hybrid":
            self.head = HEADS[config.head](layout, options, config.tasks)
            sizes = options.embedding_dim, options.tower, options.embedding_dim
            self.next_tower = nn.Sequential(Residual(*sizes)) if options.residual else two_layers(*sizes)
        elif layout.size != options.embedding_dim:
            self.next_tower = nn.Sequential(nn.Linear(layout.size, options.embedding_dim))
        else:
            self.next_tower = nn.Sequential()
        rates = config.train.positive_rates
        self.own_dim = options.task_embedding_dim if self.feedback_tasks else 0
        self.towers = nn.ModuleDict(
            {
                task: FeedbackTower(options.embedding_dim, options.tower, rates.get(task, 0.5), self.own_dim)
                for task in self.feedback_tasks
            }
        )

    def states(
        self,
        items_BT: torch.Tensor,
        click_BTD: torch.Tensor,
        profile_B2: torch.Tensor,
        needed_N: torch.Tensor,
        actions_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """States `[N, S]` after some clicks.

        Args:
            items_BT: int64, clicks padded with 0 on the right.
            click_BTD: their vectors.
            profile_B2: codes of gender and age.
            needed_N: int64, places in the flattened `[B * T]` of the clicks after which a state is needed.
            actions_BT: int64, codes of what was done with the clicks, for models that read it.
        """
        if self.past_actions is not None and actions_BT is not None:
            click_BTD = click_BTD + self.past_actions(actions_BT)
        states = [encoder(items_BT, click_BTD, needed_N) for encoder in self.encoders.values()]
        if self.profile is not None:
            states.append(self.profile(profile_B2)[needed_N // items_BT.shape[1]])
        return torch.cat(states, dim=1) if len(states) > 1 else states[0]

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Parameters of what makes a state of a session: encoders, past actions and profile."""
        parts = (self.encoders, self.past_actions, self.profile)
        return [parameter for part in parts if part is not None for parameter in part.parameters()]

    def task_representations(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """What each task sees of states, `[N, D]` each; an encoder alone hands its state to `next`."""
        return {"next": state_NS} if self.head is None else self.head(state_NS)

    def query(self, mix_ND: torch.Tensor) -> torch.Tensor:
        """Queries `[N, D]` whose inner product with `searched` item vectors, plus bias, is the score."""
        query_ND: torch.Tensor = self.next_tower(mix_ND)
        if self.temperature is None:
            return query_ND
        return nn.functional.normalize(query_ND, dim=1) / self.temperature

    def searched(self, vector_CD: torch.Tensor) -> torch.Tensor:
        """Item vectors `[C, D]` as queries meet them: of length 1 where the score is a cosine."""
        return vector_CD if self.temperature is None else nn.functional.normalize(vector_CD, dim=1)

    def feedback_logits(
        self,
        task: str,
        mix_ND: torch.Tensor,
        row_F: torch.Tensor,
        item_FD: torch.Tensor,
        own_FD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits `[F]` of a feedback task for candidates, each from the mix in row `row_F`, before it is seen.

        `own_FD` are the candidates' embeddings of all feedback tasks side by side, where they have such.
        """
        if own_FD is not None:
            begin = self.feedback_tasks.index(task) * self.own_dim
            own_FD = own_FD[:, begin : begin + self.own_dim]
        return self.towers[task](mix_ND, row_F, item_FD.detach() if self.detach_items else item_FD, own_FD)

    def gate_weights(self, state_NS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Shares of the experts by task `[N, E]`; empty for heads without gates."""
        return {} if self.head is None else self.head.gate_weights(state_NS)

    def flops(self, *, candidates: int, embedding_dim: int, clicks: int) -> dict[str, int]:
        """Multiply-adds × 2 of one target click's forward pass with one feedback row, by part.

        Args:
            candidates: items that each target competes with.
            embedding_dim: length of the item vectors.
            clicks: clicks of the session up to there, for encoders whose cost grows with them.
        """
        by_module = {name: flops(clicks) for name, flops in self._encoder_flops.items()}
        by_module["head"] = self.head.flops() if self.head is not None else 0
        by_module["next tower"] = matrix_flops(self.next_tower)
        by_module["feedback towers"] = matrix_flops(self.towers)
        by_module["next scores"] = 2 * candidates * embedding_dim
        return by_module

    def part_parameters(self) -> dict[str, int]:
        """Numbers of parameters by part; the item table is not among them."""
        by_module: dict[str, nn.Module | None] = {f"encoder {name}": e for name, e in self.encoders.items()}
        by_module |= {
            "past actions": self.past_actions,
            "profile": self.profile,
            "head": self.head,
            "next tower": self.next_tower,
        }
        by_module["feedback towers"] = self.towers
        return {n: sum(p.numel() for p in m.parameters()) if m is not None else 0 for n, m in by_module.items()}
