"""Training objectives of session and ranking models: loss sums by task."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from etl.dataset import PADDING
from trainer.config import TrainerConfig
from trainer.data.batch import Batch
from trainer.data.ranking_rows import RankBatch
from trainer.models.embedding_table import GatheredRows
from trainer.models.ranker import Ranker
from trainer.models.recommender import Recommender
from trainer.training import losses
from trainer.training.negatives import NegativeSampler

ITEM, INPUT, USER, TASK_ITEM_TABLE = "item", "input", "user", "tasks"
"""Table names: output item vectors, encoder input vectors if not tied, users, task-specific item vectors."""


@dataclass(frozen=True)
class LossSums:
    """Result of a forward pass.

    Attributes:
        loss: loss sums by task, `[K]`.
        log_variance: learned log variance by task `[K]`; zeros with fixed weights.
    """

    loss: torch.Tensor
    log_variance: torch.Tensor


class Balance(nn.Module):
    """Task weights: fixed, or learned by uncertainty (Kendall et al. 2018).

    With uncertainty s_k = log σ_k² a task's mean loss L_k enters as exp(−s_k) L_k + s_k / 2.
    """

    def __init__(self, config: TrainerConfig, tasks: list[str]) -> None:
        super().__init__()
        fixed = torch.tensor([float(config.train.task_weights.get(task, 1.0)) for task in tasks])
        self.register_buffer("fixed", fixed, persistent=False)
        learned = config.train.balance == "uncertainty"
        self.log_variance = nn.Parameter(torch.zeros(len(tasks))) if learned else None

    def variances(self) -> torch.Tensor:
        """Log variances `[K]`."""
        return torch.zeros_like(self.get_buffer("fixed")) if self.log_variance is None else self.log_variance

    def total(self, loss_sums: LossSums, weights_K: torch.Tensor, n_micro_batches: int) -> torch.Tensor:
        """The loss of one of `n_micro_batches` micro-batches, given the example weights of the complete step."""
        share = self.get_buffer("fixed") * loss_sums.loss / weights_K
        if self.log_variance is None:
            return share.sum()
        return (torch.exp(-loss_sums.log_variance) * share + loss_sums.log_variance / (2.0 * n_micro_batches)).sum()


def positive_weights(config: TrainerConfig, tasks: list[str]) -> dict[str, float]:
    """Weight of a positive row by feedback task: (negatives / positives in train) to `positive_power`."""
    rates = {task: min(max(config.train.positive_rates.get(task, 0.5), 1e-6), 1 - 1e-6) for task in tasks}
    return {task: ((1 - rate) / rate) ** config.train.positive_power for task, rate in rates.items()}


@dataclass(frozen=True)
class Candidates:
    """The candidates (negatives) of a step, the same on every worker.

    Attributes:
        ids: int64 `[K]`.
        correction: float32 `[K]`, added to the scores (sampled softmax: log of drawn copies − log of expected
            copies; else 0).
        log_copies: float32 `[K]`, log multiplicity of the candidate among the drawn negatives.
    """

    ids: torch.Tensor
    correction: torch.Tensor
    log_copies: torch.Tensor


class SessionObjective(nn.Module):
    """Next-item and feedback losses of sessions, in one forward call as DDP requires.

    Args:
        config: of the run.
        model: the networks.
        train_clicks: int64 `[n_items]`, for negative sampling.
    """

    def __init__(self, config: TrainerConfig, model: Recommender, train_clicks: np.ndarray) -> None:
        super().__init__()
        self.model, self.config, self.tasks = model, config, ["next", *model.feedback_tasks]
        self.balance = Balance(config, self.tasks)
        self.positive_weight = positive_weights(config, model.feedback_tasks)
        self.n_items = len(train_clicks)
        self.sampler = NegativeSampler(
            train_clicks,
            popularity_exponent=config.negative_popularity_exponent,
            uniform_share=config.train.negative_uniform_share,
            clicked_only=bool(config.network.item_features),
        )

    def candidates(self, batch: Batch, step: int) -> Candidates:
        """All items, or the negatives sampled for this step."""
        device, loss = batch.items.device, self.config.loss
        if loss in ("embedding", "softmax"):
            scored = torch.from_numpy(self.sampler.items if loss == "softmax" else np.zeros(0, np.int64)).to(device)
            zeros = torch.zeros(len(scored), device=device)
            return Candidates(scored, zeros, zeros)
        drawn = self.sampler.draw(self.config.train.negatives, seed=self.config.seed, step=step)
        positives = batch.positives.cpu().numpy()
        ids = np.concatenate([drawn, positives])
        copies = np.ones(len(ids), np.int64)
        if loss in ("sampled_softmax", "bpr_max") and not self.config.train.skipped_negatives:
            # In small catalogues many items are drawn repeatedly: score each once, weighted by its copies.
            ids, copies = np.unique(ids, return_counts=True)
        log_copies = np.log(copies).astype(np.float32)
        correction = np.zeros(len(ids), np.float32)
        if loss == "sampled_softmax":
            expected = self.sampler.log_expected(ids, drawn=len(drawn), positives=len(positives))
            correction = log_copies - np.float32(self.config.train.logq) * expected
        return Candidates(*(torch.from_numpy(values).to(device) for values in (ids, correction, log_copies)))

    def lookup_ids(self, batch: Batch, candidates: Candidates) -> dict[str, torch.Tensor]:
        """Ids whose vectors the forward pass reads, by table."""
        scored = [batch.targets.flatten(), batch.row_item, batch.skipped_item, candidates.ids]
        clicks, own = batch.items.flatten(), {TASK_ITEM_TABLE: batch.row_item} if self.model.task_embedding_dim else {}
        if self.config.network.tie_embeddings:
            return self.model.item_features.with_values({ITEM: torch.cat([clicks, *scored]), **own})
        return self.model.item_features.with_values({ITEM: torch.cat(scored), INPUT: clicks, **own})

    def shared(self, candidates: Candidates) -> dict[str, torch.Tensor]:
        """Ids by table that every worker reads: those of the candidates."""
        none, others = candidates.ids[:0], [] if self.config.network.tie_embeddings else [INPUT]
        others += [TASK_ITEM_TABLE] if self.model.task_embedding_dim else []
        return self.model.item_features.with_values({ITEM: candidates.ids} | dict.fromkeys(others, none))

    def weights(self, batch: Batch) -> torch.Tensor:
        """Total example weight of a batch by task, float64 `[K]`: the number of examples, if unweighted."""
        weights = [torch.count_nonzero(batch.targets).double()]
        for column, task in enumerate(self.model.feedback_tasks):
            weights.append(row_weight(batch.row_label[:, column], self.positive_weight[task]))
        return torch.stack(weights)

    def forward(self, batch: Batch, rows: dict[str, GatheredRows], candidates: Candidates) -> LossSums:
        """Loss sums over this worker's examples. Uses every parameter, whatever the batch contains (for DDP)."""
        model = self.model
        rows = model.item_features.join(rows)
        item = rows[ITEM]
        click_BTD = rows.get(INPUT, item).vectors(batch.items)
        used = batch.targets.flatten() != PADDING
        needed = torch.nonzero(used).squeeze(1)
        state = model.states(batch.items, click_BTD, batch.profile, needed, batch.actions)
        task_representations = model.task_representations(state)
        compact = torch.cumsum(used, 0) - 1  # index in the flattened sessions → row of `state`
        target = batch.targets.flatten()[used]
        loss_sums = [self._next(model.query(task_representations["next"]), target, item, candidates, batch, compact)]
        row_state, item_FD = compact[batch.row_state], item.vectors(batch.row_item)
        own_FD = rows[TASK_ITEM_TABLE].vectors(batch.row_item) if model.task_embedding_dim else None
        logits = model.feedback_logits(state, task_representations, row_state, batch.row_item, item_FD, own_FD)
        for column, task in enumerate(model.feedback_tasks):
            label = batch.row_label[:, column]
            loss_sums.append(losses.feedback_sum(logits[task], label, self.positive_weight[task]))
        return LossSums(torch.stack(loss_sums), self.balance.variances())

    def _next(
        self,
        query_ND: torch.Tensor,
        target_N: torch.Tensor,
        item: GatheredRows,
        candidates: Candidates,
        batch: Batch,
        compact: torch.Tensor,
    ) -> torch.Tensor:
        positive, index = item.local_index(target_N), item.local_index(candidates.ids)
        positive_ND = self.model.scoring_vectors(nn.functional.embedding(positive, item.vector))
        positive_bias_N = item.bias[positive]
        if self.config.loss == "embedding":
            return losses.embedding_sum(query_ND, positive_ND)
        candidate_KD = self.model.scoring_vectors(nn.functional.embedding(index, item.vector))
        bias_K = item.bias[index] + candidates.correction
        if not self.config.train.skipped_negatives:
            return losses.fused_sum(
                self._kernel(candidates),
                query_ND,
                positive_ND,
                positive_bias_N,
                candidate_KD,
                bias_K,
                target_N,
                candidates.ids,
            )
        own = (query_ND * positive_ND).sum(1) + positive_bias_N
        score = losses.candidate_scores(query_ND, candidate_KD, bias_K, target_N, candidates.ids)
        score = losses.hardest(score, self.config.train.hard_negatives)
        return self._loss_of_scores(
            own, torch.cat([score, self._skipped(query_ND, target_N, item, batch, compact)], dim=1)
        )

    def _kernel(self, candidates: Candidates) -> losses.Kernel:
        if self.config.loss in ("softmax", "sampled_softmax"):
            kernel: losses.Kernel = losses.softmax_kernel
        elif self.config.loss == "bpr_max":
            kernel = losses.bpr_max_kernel(self.config.train.bpr_max_regularisation, candidates.log_copies)
        else:
            kernel = losses.kernel_of(self._loss_of_scores)
        return losses.hard_kernel(kernel, self.config.train.hard_negatives)

    def _skipped(
        self, query_ND: torch.Tensor, target_N: torch.Tensor, item: GatheredRows, batch: Batch, compact: torch.Tensor
    ) -> torch.Tensor:
        """Scores `[N, H]` of the items shown with each target but not clicked."""
        row, index = compact[batch.skipped_state], item.local_index(batch.skipped_item)
        vector_SD = self.model.scoring_vectors(nn.functional.embedding(index, item.vector))
        score = (query_ND[row] * vector_SD).sum(1) + item.bias[index]
        score = score.masked_fill(batch.skipped_item == target_N[row], losses.MASKED_SCORE)
        empty = query_ND.new_full((len(query_ND), self.config.train.skipped_negatives), losses.MASKED_SCORE)
        return empty.index_put((row, batch.skipped_slot), score)

    def _loss_of_scores(self, own_N: torch.Tensor, score_NK: torch.Tensor) -> torch.Tensor:
        options = self.config.train
        match self.config.loss:
            case "bpr":
                return losses.bpr_sum(own_N, score_NK)
            case "top1":
                return losses.top1_sum(own_N, score_NK)
            case "bpr_max":
                return losses.bpr_max_sum(own_N, score_NK, options.bpr_max_regularisation)
            case "gbce":
                rate = min(1.0, options.negatives / max(self.n_items - 1, 1))
                return losses.gbce_sum(own_N, score_NK, sampling_rate=rate, t=options.gbce_t)
            case _:
                return losses.softmax_of_scores(own_N, score_NK)


class RankObjective(nn.Module):
    """Feedback loss of rows."""

    def __init__(self, config: TrainerConfig, model: Ranker) -> None:
        super().__init__()
        self.model, self.tasks = model, list(model.feedback_tasks)
        self.balance = Balance(config, self.tasks)
        self.positive_weight = positive_weights(config, self.tasks)

    def candidates(self, batch: RankBatch, step: int) -> None:
        """Ranking models have no candidates."""

    def lookup_ids(self, batch: RankBatch, candidates: None) -> dict[str, torch.Tensor]:
        """Ids whose vectors the forward pass reads, by table."""
        lookup_ids = {ITEM: torch.cat([batch.item, batch.history.flatten()]), USER: batch.user}
        return self.model.item_features.with_values(lookup_ids)

    def shared(self, candidates: None) -> dict[str, torch.Tensor]:
        """Ids by table that every worker reads: none."""
        return {}

    def labels(self, batch: RankBatch, column: int) -> torch.Tensor:
        """Labels of a task, `[F]`; with rank_esmm multiplied by the click label."""
        label = batch.label[:, column]
        return label * batch.label[:, self.tasks.index("click")] if self.model.entire_space else label

    def weights(self, batch: RankBatch) -> torch.Tensor:
        """Total row weight of a batch by task, float64 `[K]`."""
        pairs = enumerate(self.tasks)
        return torch.stack([row_weight(self.labels(batch, c), self.positive_weight[task]) for c, task in pairs])

    def forward(self, batch: RankBatch, rows: dict[str, GatheredRows], candidates: None) -> LossSums:
        """Loss sums over this worker's rows."""
        rows = self.model.item_features.join(rows)
        item = rows[ITEM]
        feature = self.model.features(
            rows[USER].vectors(batch.user),
            item.vectors(batch.item),
            item.vectors(batch.history),
            batch.item,
            batch.history,
            batch.profile,
        )
        logits = self.model.logits(feature)
        loss_sums = [
            losses.feedback_sum(logits[task], self.labels(batch, column), self.positive_weight[task])
            for column, task in enumerate(self.tasks)
        ]
        return LossSums(torch.stack(loss_sums), self.balance.variances())


def row_weight(label_F: torch.Tensor, positive_weight: float) -> torch.Tensor:
    """Total weight of the rows, float64."""
    return len(label_F) + (positive_weight - 1.0) * label_F.sum(dtype=torch.float64)
