"""One training step: rows of the tables → loss → all-reduced gradients → gradient clipping → update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from etl.runtime.errors import InputError
from trainer.config import TrainerConfig
from trainer.distributed.row_exchange import RowExchange
from trainer.distributed.world import World
from trainer.models.embedding_table import GatheredRows, SparseTable
from trainer.models.recommender import Recommender
from trainer.option_groups import TrainOptions
from trainer.training.objective import RankObjective, SessionObjective
from trainer.training.optimizers import Adagrad, AdamW

Gradient = tuple[torch.Tensor, torch.Tensor]
"""Distinct rows `[U]` and their gradients `[U, C]`."""


class NotFiniteError(ArithmeticError):
    """A loss or gradient is NaN or infinite; nothing was updated."""

    def as_input_error(self) -> InputError:
        """The error as shown to the user."""
        return InputError("finite losses and gradients", str(self), "training stopped before the update")


def learning_rate_factor(options: TrainOptions, step: int, total_steps: int) -> float:
    """Learning rate schedule at a step (from 0): warm-up, then constant or cosine."""
    warmup = min(1.0, (step + 1) / options.warmup_steps) if options.warmup_steps else 1.0
    if options.schedule == "constant":
        return warmup
    done = (step - options.warmup_steps) / max(total_steps - options.warmup_steps, 1)
    return warmup * 0.5 * (1.0 + math.cos(math.pi * min(max(done, 0.0), 1.0)))


def make_optimizer(options: TrainOptions, objective: SessionObjective | RankObjective) -> Adagrad | AdamW:
    """The optimiser of the networks; a hybrid's head and feedback towers may have their own learning rates."""
    rate = options.network_learning_rate or options.learning_rate
    rates, model = dict.fromkeys(objective.parameters(), rate), objective.model
    if isinstance(model, Recommender) and model.head is not None:
        of_head = options.head_learning_rate or rate
        rates = dict.fromkeys(rates, of_head) | dict.fromkeys(model.encoder_parameters(), rate)
        rates |= dict.fromkeys(model.feedback_parameters(), options.feedback_learning_rate or of_head)
    kind = AdamW if options.optimizer == "adamw" else Adagrad
    return kind(rates, weight_decay=options.weight_decay)


def clipping_factor(norm: float, max_norm: float) -> float:
    """Gradient clipping: factor that scales gradients from global norm `norm` to at most `max_norm`; 0 = off.

    >>> clipping_factor(4.0, 1.0), clipping_factor(0.5, 1.0), clipping_factor(4.0, 0.0)
    (0.25, 1.0, 1.0)
    """
    return min(1.0, max_norm / max(norm, 1e-12)) if max_norm else 1.0


class TrainStep:
    """The training state that a step updates: networks, tables and optimiser.

    Args:
        config: of the run.
        objective: computes the losses; its parameters are the networks.
        tables: sparse tables by name, or this worker's shards of them.
        total_steps: steps of the phase, for the learning rate schedule.
        world: the workers.

    Attributes:
        sharded: whether each worker holds only the rows that it owns.
    """

    def __init__(
        self,
        config: TrainerConfig,
        objective: SessionObjective | RankObjective,
        tables: dict[str, SparseTable],
        total_steps: int,
        world: World,
    ) -> None:
        self.config, self.objective, self.tables, self.world = config, objective.to(world.device), tables, world
        self.total_steps = total_steps
        self.sharded = config.train.table == "sharded" and world.size > 1
        self.model, self.tasks = objective.model, objective.tasks
        self.forward: nn.Module = DistributedDataParallel(objective) if world.size > 1 else objective
        self.optimizer = make_optimizer(config.train, objective)
        half = config.train.precision == "bfloat16"
        self.autocast = torch.autocast(world.device.type, torch.bfloat16) if half else nullcontext()

    def step(self, micro_batches: Sequence[Any], step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Update all parameters on a global batch, given this worker's share.

        Args:
            micro_batches: the share as micro-batches for gradient accumulation, which limits memory; the update
                is that of the complete batch. The same number on every worker.
            step: number of the step.

        Returns:
            Loss sums and total example weights over all workers, `[tasks]` each.

        Raises:
            NotFiniteError: on all workers, before anything is updated.
        """
        # Dropout depends only on (seed, step, worker), so checkpoints need no generator state.
        self._seed(hash((self.config.seed, step, self.world.global_rank)) & 0x7FFF_FFFF_FFFF_FFFF)
        micro_batches = [batch.to(self.world.device) for batch in micro_batches]
        objective: Any = self.objective  # batches and candidates match the objective
        weights = torch.stack([objective.weights(batch) for batch in micro_batches]).sum(0)
        candidates = objective.candidates(micro_batches[0], step)
        requested = [objective.lookup_ids(batch, candidates) for batch in micro_batches]
        ids = {name: torch.unique(torch.cat([by_table[name] for by_table in requested])) for name in requested[0]}
        exchange = None
        if self.world.size > 1:
            shared = {name: torch.unique(common) for name, common in objective.shared(candidates).items()}
            exchange = RowExchange(ids, shared, weights, self.world)
            weights = exchange.extra
        rows = self._rows(ids, exchange)
        losses = self._forward_backward(micro_batches, rows, candidates, weights)
        gradients = {name: (ids[name], gathered.gradient()) for name, gathered in rows.items()}
        if exchange is None:
            norm = self._norm([gradient for _, gradient in gradients.values()])
            counts: list[list[int]] = []
        else:
            gradients, losses, norm, counts = self._summed(exchange, gradients, losses)
        # A NaN on one worker makes the all-reduced sums NaN on all, so all stop together.
        if not bool(torch.isfinite(losses.sum() + norm)):
            raise NotFiniteError(
                f"loss or gradient is not finite at step {step} (losses {losses.tolist()}, "
                f"{micro_batches[0].describe()}); try a lower train.learning_rate"
            )
        self._update(gradients, float(norm), step)
        if exchange and not self.sharded:
            self._spread(exchange, counts)
        return losses, weights

    def _forward_backward(
        self, micro_batches: Sequence[Any], rows: dict[str, GatheredRows], candidates: Any, weights: torch.Tensor
    ) -> torch.Tensor:
        """Accumulate gradients over micro-batches; returns this worker's loss sums `[tasks]`.

        Args:
            micro_batches: this worker's share of the step.
            rows: gathered table rows, leaves of the autograd graph.
            candidates: candidates of the step.
            weights: example weights over all workers `[tasks]`.
        """
        self.objective.zero_grad(set_to_none=True)
        losses = torch.zeros_like(weights)
        for number, batch in enumerate(micro_batches, 1):
            with self._no_sync_until_last(number < len(micro_batches)):
                with self.autocast:
                    sums = self.forward(batch, rows, candidates)
                n_shares = self.world.size * len(micro_batches)
                loss = self.objective.balance.total(sums, weights.clamp(min=1e-12), n_shares)
                # DDP averages dense gradients over workers: × size turns the mean into the sum.
                loss.mul(self.world.size).backward()
            losses += sums.loss.detach()
        return losses

    def _rows(self, ids: dict[str, torch.Tensor], exchange: RowExchange | None) -> dict[str, GatheredRows]:
        """Rows that the step reads, by table: from the local copy, or from their owners."""
        if exchange is None or not self.sharded:
            return {name: self.tables[name].rows(rows_read) for name, rows_read in ids.items()}
        values = exchange.from_owners({name: self.tables[name].values(own) for name, own in exchange.owned.items()})
        return {name: self.tables[name].rows_from_owners(rows_read, values[name]) for name, rows_read in ids.items()}

    def _summed(
        self, exchange: RowExchange, gradients: dict[str, Gradient], losses: torch.Tensor
    ) -> tuple[dict[str, Gradient], torch.Tensor, torch.Tensor, list[list[int]]]:
        """Over all workers: gradients of rows owned here, losses, global gradient norm, row counts by owner and table.

        The norm counts each row once, at its owner; dense gradients are the same on all workers.
        """
        size, rank = self.world.size, self.world.global_rank
        # The loss is × size for DDP's mean of dense gradients; row gradients are summed.
        sums = exchange.to_owners({name: gradient / size for name, (_, gradient) in gradients.items()})
        owned = exchange.owned
        square = sum((gradient.double().square().sum() for gradient in sums.values()), losses.new_zeros(()))
        counts = losses.new_zeros(size, len(owned))
        counts[rank] = torch.tensor([len(rows) for rows in owned.values()])
        totals = self.world.sum(torch.cat([losses, square[None], counts.flatten()]))
        losses, square = totals[: len(losses)], totals[len(losses)]
        norm = (self._norm([]).double().square() + square).sqrt()
        by_owner = totals[len(losses) + 1 :].view(size, -1).long().tolist()
        return {name: (owned[name], sums[name]) for name in owned}, losses, norm, by_owner

    def _spread(self, exchange: RowExchange, counts: list[list[int]]) -> None:
        """All-gather the rows updated by their owners."""
        mine = {name: self.tables[name].state_rows(ids) for name, ids in exchange.owned.items()}
        ids, rows = exchange.to_all(mine, counts)
        for name in ids:
            self.tables[name].load_state_rows(ids[name], rows[name])

    def _seed(self, seed: int) -> None:
        # torch.manual_seed stores a stack trace for every uninitialised device type at each call.
        torch.default_generator.manual_seed(seed)
        if self.world.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _no_sync_until_last(self, stay: bool) -> AbstractContextManager[None]:
        """Suspend the all-reduce of dense gradients until the last micro-batch of a step."""
        return self.forward.no_sync() if stay and isinstance(self.forward, DistributedDataParallel) else nullcontext()

    def _norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Global norm of all gradients; NaN or infinite if any gradient is."""
        dense = [p.grad for p in self.objective.parameters() if p.grad is not None]
        return torch.stack([g.norm() for g in (*dense, *gradients)]).norm() if dense or gradients else torch.zeros(())

    def _update(self, gradients: dict[str, Gradient], norm: float, step: int) -> None:
        options = self.config.train
        shrink = clipping_factor(norm, options.max_grad_norm)
        if shrink < 1.0:
            for parameter in self.objective.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(shrink)
        factor = learning_rate_factor(options, step, self.total_steps)
        self.optimizer.step(step + 1, factor)
        for name, (ids, gradient) in gradients.items():
            gradient = gradient if shrink == 1.0 else gradient * shrink
            table = self.tables[name]
            learning_rate = options.learning_rate * factor * table.learning_rate_factor
            table.update(ids, gradient, learning_rate, decay=options.table_decay)
