"""Feedback towers (click, like, share, follow, …) of a hybrid, and the features that only they read."""

from __future__ import annotations

import math

import torch
from torch import nn

from trainer.models.heads import two_layers
from trainer.models.past_actions import PastActions


class FeedbackInputs(nn.Module):
    """Embeddings read only by the feedback towers: of item features, and of past actions.

    Item vectors are trained mainly for the next click, and single items have few actions to learn a task from. Item
    categories have many, and users differ in how often they act on their clicks.

    Args:
        codes_IC: int64 `[n_items + 1, C]`, code of each feature's value, 0 = unknown.
        dim: embedding dimension.
        actions: whether past actions are read.
    """

    codes: torch.Tensor

    def __init__(self, codes_IC: torch.Tensor, dim: int, *, actions: bool) -> None:
        super().__init__()
        self.register_buffer("codes", codes_IC, persistent=False)
        self.embedding = nn.Embedding(int(codes_IC.max()) + 1, dim, padding_idx=0) if codes_IC.shape[1] else None
        self.actions = PastActions(dim, entered=False) if actions else None
        self.dim = dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Sums `[..., F]` of the feature embeddings of items `[...]`; None without features."""
        return None if self.embedding is None else self.embedding(self.codes[ids]).sum(-2)

    def clicked(
        self, items_BT: torch.Tensor, needed_N: torch.Tensor, actions_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Means `[N, F]` over a session's clicks up to the positions `needed_N` of the flattened `[B * T]`.

        Args:
            items_BT: int64, clicks padded with 0 on the right.
            needed_N: int64.
            actions_BT: int64, action codes of the clicks, if they are read.
        """
        of_click: torch.Tensor | None = self(items_BT)
        if self.actions is not None and actions_BT is not None:
            of_action = self.actions(actions_BT)
            of_click = of_action if of_click is None else of_click + of_action
        assert of_click is not None, "features or actions are read"
        so_far = torch.arange(1, items_BT.shape[1] + 1, device=items_BT.device)[:, None]
        return (of_click.cumsum(1) / so_far).flatten(0, 1)[needed_N]


class FeedbackTower(nn.Module):
    """Logit of a feedback task for a candidate c: an MLP of [m_k ; v_c ; m_k ⊙ v_c], m_k the task representation.

    Args:
        embedding_dim: dimension of task representation and item vector.
        units: units of the hidden layer.
        rate: share of positives in train. The output bias is initialised to its log odds, so that a rare
            task does not spend its first epochs on learning the base rate.
        task_embedding_dim: dimension of task-specific item embeddings (STEM, Su et al. 2024); the candidate's and its
            product with a projection of m_k are added to the input.
        features: `FeedbackInputs` to read; those of the candidate and of the clicks, and the products of the
            candidate's with the clicks' and with a projection of m_k are added to the input.
    """

    def __init__(
        self,
        embedding_dim: int,
        units: int,
        rate: float,
        task_embedding_dim: int = 0,
        features: FeedbackInputs | None = None,
    ) -> None:
        super().__init__()
        if task_embedding_dim:
            self.own_mix = nn.Linear(embedding_dim, task_embedding_dim)
            self.own_hidden = nn.Linear(2 * task_embedding_dim, units, bias=False)
        if features is not None:
            of_candidate = features.embedding is not None
            if of_candidate:
                self.feature_mix = nn.Linear(embedding_dim, features.dim)
            self.feature_hidden = nn.Linear((4 if of_candidate else 1) * features.dim, units, bias=False)
        self.network = two_layers(3 * embedding_dim, units, 1)
        init_bias_to_prior(self.network, rate)

    def forward(
        self,
        task_ND: torch.Tensor,
        row_F: torch.Tensor,
        item_FD: torch.Tensor,
        own_FD: torch.Tensor | None = None,
        features: tuple[torch.Tensor | None, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Logits `[F]` of candidates, each from the task representation in row `row_F`.

        `own_FD` are the candidates' task-specific embeddings, `features` the feature embeddings of the candidates (None
        without item features) and of the clicks.

        The first layer is a sum of three products; that of the task representation is computed once per state.
        """
        first = self.network[0]
        assert isinstance(first, nn.Linear)
        by_task, by_item, by_both = first.weight.split(task_ND.shape[1], dim=1)
        of_task = nn.functional.embedding(row_F, nn.functional.linear(task_ND, by_task, first.bias))
        both = nn.functional.embedding(row_F, task_ND) * item_FD
        hidden = of_task + nn.functional.linear(item_FD, by_item) + nn.functional.linear(both, by_both)
        if own_FD is not None:
            task_projection = nn.functional.embedding(row_F, self.own_mix(task_ND))
            hidden = hidden + self.own_hidden(torch.cat([own_FD, task_projection * own_FD], dim=1))
        if features is not None:
            of_item, of_clicks = features
            read = of_clicks
            if of_item is not None:
                feature_projection = nn.functional.embedding(row_F, self.feature_mix(task_ND))
                read = torch.cat([of_item, of_clicks, of_item * of_clicks, of_item * feature_projection], dim=1)
            hidden = hidden + self.feature_hidden(read)
        return self.network[1:](hidden).squeeze(-1)


@torch.no_grad()
def init_bias_to_prior(network: nn.Sequential, rate: float) -> None:
    """Initialise the last layer's bias to the log odds of a rate."""
    rate = min(max(rate, 1e-6), 1.0 - 1e-6)
    last = network[-1]
    assert isinstance(last, nn.Linear)
    last.bias.fill_(math.log(rate / (1.0 - rate)))
