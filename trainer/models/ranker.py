"""Ranking models over exposed rows: features of user, candidate and history under the multi-task heads.

The multi-task baselines of the Tenrec benchmark: the candidate is an input feature, so they rank given rows
and provide no vectors for retrieval.
"""

from __future__ import annotations

import torch
from torch import nn

from etl.dataset import PADDING
from trainer.config import RANK_HEADS, TrainerConfig
from trainer.models.encoders import matrix_flops
from trainer.models.feedback import init_bias_to_prior
from trainer.models.heads import HEAD_CLASSES, Layout, two_layers
from trainer.models.item_features import ItemFeatures
from trainer.models.recommender import PROFILE_SIZE, Profile

CATEGORY_SIZE = 16


class Ranker(nn.Module):
    """Logits of the feedback tasks for rows.

    A row's features are the embeddings of its user, item and item category, gender and age, and the mean
    embeddings of the last ten clicks and of their categories. With `rank_esmm` the probability of a task
    is that of the click times that of the task given the click (Ma et al. 2018), each from its own tower.

    Args:
        config: the run's configuration.
        categories: int64 `[n_items + 1]`, code of each item's category, 0 = unknown.
        item_features: feature embeddings added to the item vectors.
    """

    categories: torch.Tensor

    def __init__(
        self, config: TrainerConfig, categories: torch.Tensor, item_features: ItemFeatures | None = None
    ) -> None:
        super().__init__()
        options = config.network
        self.item_features = item_features or ItemFeatures.none()
        self.register_buffer("categories", categories, persistent=False)
        self.category = nn.Embedding(int(categories.max()) + 1, CATEGORY_SIZE)
        self.profile = Profile()
        layout = Layout((3 * options.embedding_dim + 2 * CATEGORY_SIZE + 2 * PROFILE_SIZE,))
        self.feedback_tasks = config.feedback_tasks
        self.head = HEAD_CLASSES[RANK_HEADS[config.model]](layout, options, self.feedback_tasks)
        self.dropout = nn.Dropout(options.state_dropout)
        self.towers = nn.ModuleDict(
            {task: two_layers(options.embedding_dim, options.tower, 1) for task in self.feedback_tasks}
        )
        self.entire_space = config.model == "rank_esmm" and "click" in self.feedback_tasks
        rates = config.train.positive_rates
        for task, tower in self.towers.items():
            assert isinstance(tower, nn.Sequential)
            given_click = self.entire_space and task != "click"
            of_rows = max(rates.get("click", 1.0), 1e-6) if given_click else 1.0
            init_bias_to_prior(tower, rates.get(task, 0.5) / of_rows)

    def features(
        self,
        user_FD: torch.Tensor,
        item_FD: torch.Tensor,
        history_FLD: torch.Tensor,
        item_F: torch.Tensor,
        history_FL: torch.Tensor,
        profile_F2: torch.Tensor,
    ) -> torch.Tensor:
        """Input features of the head, `[F, S]`; padding (0) is excluded from the history's mean."""
        known = (history_FL != PADDING).unsqueeze(2).to(history_FLD.dtype)
        share = known / known.sum(1, keepdim=True).clamp(min=1.0)
        history = (history_FLD * share).sum(1)
        watched = (self.category(self.categories[history_FL]) * share).sum(1)
        category = self.category(self.categories[item_F])
        features = torch.cat([user_FD, item_FD, history, category, watched, self.profile(profile_F2)], dim=1)
        return self.dropout(features)

    def logits(self, feature_FS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits `[F]` by task."""
        task_representations = self.head(feature_FS)
        own = {task: tower(task_representations[task]).squeeze(1) for task, tower in self.towers.items()}
        if not self.entire_space:
            return own
        click = own["click"]
        return {task: click if task == "click" else product_logit(click, logit) for task, logit in own.items()}

    def gate_weights(self, feature_FS: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gate weights by task `[F, E]`; empty for heads without gates."""
        return self.head.gate_weights(feature_FS)

    def flops(self) -> dict[str, int]:
        """FLOPs (multiply-adds × 2) of one row's forward pass, by part."""
        return {"head": self.head.flops(), "feedback towers": matrix_flops(self.towers)}

    def part_parameters(self) -> dict[str, int]:
        """Parameter counts by part, without the item and user tables."""
        parts = {"category": self.category, "profile": self.profile, "head": self.head, "feedback towers": self.towers}
        return {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()}


def product_logit(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Logit of the product of two probabilities given as logits."""
    log_product = nn.functional.logsigmoid(first) + nn.functional.logsigmoid(second)
    log_product = log_product.clamp(max=-1e-7)  # the product may round to 1
    return log_product - torch.log(-torch.expm1(log_product))
