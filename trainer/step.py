"""One training step: unique rows → loss → gradients of all workers → update."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from etl.contract import PADDING
from trainer.config import TrainerConfig
from trainer.data.batch import Batch
from trainer.losses import feedback_sum, softmax_sum
from trainer.models.recommender import Recommender
from trainer.negatives import NegativeSampler
from trainer.sparse.exchange import sum_rows
from trainer.sparse.table import ItemTable, Rows
from trainer.world import World


class NotFiniteError(ArithmeticError):
    """A loss or gradient is NaN or infinite; nothing was updated."""


@dataclass(frozen=True)
class Candidates:
    """What targets compete with in a step, the same on every worker.

    Attributes:
        ids: int64 `[K]`.
        correction: float32 `[K]`, added to the scores (−log(K q) of sampled ones, else 0).
    """

    ids: torch.Tensor
    correction: torch.Tensor


class StepLoss(nn.Module):
    """The loss sums of a batch by task, in one forward call as DDP wants it."""

    def __init__(self, model: Recommender, tasks: list[str]) -> None:
        super().__init__()
        self.model, self.tasks = model, tasks

    def forward(self, batch: Batch, rows: Rows, candidates: Candidates) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of the losses `[tasks]` and counts of their examples `[tasks]`.

        Every parameter takes part whatever the batch holds, as DDP requires.
        """
        model = self.model
        place = torch.searchsorted(rows.ids, torch.cat([batch.items.flatten(), batch.row_item]))
        click, shown = place[: batch.items.numel()], place[batch.items.numel() :]
        click_BTD = nn.functional.embedding(click.view_as(batch.items), rows.vector)
        state = model.states(click_BTD, batch.profile).flatten(0, 1)
        used = batch.targets.flatten() != PADDING
        mixes = model.mixes(state[used])
        target = batch.targets.flatten()[used]
        positive, candidate = (torch.searchsorted(rows.ids, ids) for ids in (target, candidates.ids))
        sums = [
            softmax_sum(
                model.query(mixes["next"]),
                nn.functional.embedding(positive, rows.vector),
                rows.bias[positive],
                nn.functional.embedding(candidate, rows.vector),
                rows.bias[candidate] + candidates.correction,
                target,
                candidates.ids,
            )
        ]
        counts = [len(target)]
        compact = torch.cumsum(used, 0) - 1
        row_state = compact[batch.row_state]
        item_FD = nn.functional.embedding(shown, rows.vector)
        for column, task in enumerate(model.feedback_tasks):
            logit = model.feedback_logits(task, mixes[task][row_state], item_FD)
            sums.append(feedback_sum(logit, batch.row_label[:, column]))
            counts.append(len(logit))
        return torch.stack(sums), torch.tensor(counts, dtype=torch.float32, device=state.device)


class Stepper:
    """Holds what a step changes: the networks, the item table and the dense optimiser."""

    def __init__(
        self, config: TrainerConfig, model: Recommender, table: ItemTable, train_clicks: np.ndarray, world: World
    ) -> None:
        self.config, self.model, self.table, self.world = config, model, table, world
        self.tasks = ["next", *model.feedback_tasks]
        loss = StepLoss(model, self.tasks)
        self.loss: nn.Module = DistributedDataParallel(loss) if world.size > 1 else loss
        self.optimizer = torch.optim.Adagrad(model.parameters(), lr=config.train.learning_rate, eps=1e-6)
        weights = [config.train.task_weights.get(task, 1.0) for task in self.tasks]
        self.weights = torch.tensor(weights, device=world.device)
        self.n_items = len(train_clicks)
        self.sampler = NegativeSampler(train_clicks, alpha=config.train.alpha, uniform=config.train.uniform)

    def candidates(self, step: int) -> Candidates:
        """All items, or this step's negatives."""
        device = self.world.device
        if self.config.loss == "softmax":
            return Candidates(
                torch.arange(1, self.n_items + 1, device=device), torch.zeros(self.n_items, device=device)
            )
        drawn = self.sampler.draw(self.config.train.negatives, seed=self.config.seed, step=step)
        correction = -self.sampler.log_q(drawn) - np.float32(np.log(len(drawn)))
        return Candidates(torch.from_numpy(drawn).to(device), torch.from_numpy(correction).to(device))

    def step(self, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Update all parameters with a global batch of which this worker holds a share.

        Returns:
            Loss sums and counts over all workers, `[tasks]` each.

        Raises:
            NotFiniteError: on all workers alike, before anything is updated.
        """
        # Dropout follows from (seed, step, worker) alone: a resumed run needs no generator's state.
        torch.manual_seed(hash((self.config.seed, step, self.world.global_rank)) & 0x7FFF_FFFF_FFFF_FFFF)
        batch = batch.to(self.world.device)
        candidates = self.candidates(step)
        wanted = (batch.items.flatten(), batch.targets.flatten(), batch.row_item, candidates.ids)
        rows = self.table.rows(torch.unique(torch.cat(wanted)))
        self.optimizer.zero_grad(set_to_none=True)
        sums, counts = self.loss(batch, rows, candidates)
        totals = self.world.sum(torch.stack([sums.detach(), counts]))
        total_counts = totals[1].clamp(min=1.0)
        # DDP averages dense gradients over workers: × size makes them the sum that one worker would have.
        (sums * self.weights / total_counts).sum().mul(self.world.size).backward()
        ids, gradient = sum_rows(rows.ids, rows.gradient() / self.world.size, self.world)
        self._check_finite(totals[0], gradient, step, batch)
        self.optimizer.step()
        self.table.update(ids, gradient, self.config.train.learning_rate)
        return totals[0], totals[1]

    def _check_finite(self, sums: torch.Tensor, gradient: torch.Tensor, step: int, batch: Batch) -> None:
        # Sums over workers are NaN on all of them if they are on one, so all stop together.
        dense = [p.grad for p in self.model.parameters() if p.grad is not None]
        total = sums.sum() + gradient.sum() + sum(g.sum() for g in dense)
        if not bool(torch.isfinite(total)):
            raise NotFiniteError(
                f"loss or gradient is not finite at step {step} (losses {sums.tolist()}, "
                f"{len(batch.items)} sessions here, items {batch.items[0].tolist()[:8]} …); "
                "try a lower train.learning_rate"
            )
