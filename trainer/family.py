"""What differs between session models and ranking models: what they read, collate, validate and export."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from etl.contract import Dataset
from retrieval.repeats import count_repeats
from trainer.config import TrainerConfig
from trainer.data.batch import Batch, BatchOptions, feedback_rows, sampled, targets_of, train_batch
from trainer.data.order import Int
from trainer.data.rank import FlatRows, RankBatch, RowReader, all_users, block_rows, rank_batch
from trainer.data.reader import Reader, SessionReader, Sessions
from trainer.models.ranker import Ranker
from trainer.models.recommender import Recommender
from trainer.objective import INPUT, ITEM, USER, RankObjective, SessionObjective
from trainer.scoring import RankScorer, SessionScorer
from trainer.sparse.table import SparseTable
from trainer.step import Stepper
from trainer.validation import Validation, valid_rows, valid_sessions, validate_rows, validate_sessions
from trainer.world import World

TRAIN_HOLDOUT = 2
"""Clicks at the end of a session that selection does not train on; a refit holds out one."""


class Collate(Protocol):
    """Makes batches of a window's samples."""

    def __call__(self, window: Any, mine: Int, step: Int, /) -> Any:
        """A batch from the rows of this worker's share; those of the whole step are given beside them."""


class Family(Protocol):
    """What the loop asks of a kind of model; `unit` is what its progress counts, clicks or rows."""

    unit: str

    def total(self, reader: Any) -> int:
        """Target clicks of an epoch, or the samples that its rows come from."""

    def reader(self, holdout: int) -> Reader[Any]:
        """Samples to train on."""

    def stepper(self, total_steps: int) -> Stepper:
        """Freshly drawn parameters: the same on every worker, from the seed alone."""

    def collate(self, holdout: int, salt: int) -> Collate:
        """The maker of an epoch's batches."""

    def sample(self) -> Any:
        """This worker's share of what is validated on."""

    def validate(self, stepper: Stepper, sample: Any) -> Validation:
        """Metrics on the sample, over all workers."""

    @property
    def name(self) -> str:
        """Of the model, for whoever reads a report."""

    def scorer(self, stepper: Stepper) -> SessionScorer | RankScorer:
        """The model applied."""


def family_of(config: TrainerConfig, dataset: Dataset, world: World) -> Family:
    """The family of a configuration's model."""
    return RankFamily(config, dataset, world) if config.ranks else SessionFamily(config, dataset, world)


def make_table(config: TrainerConfig, n: int, world: World, *, number: int, bias: bool) -> SparseTable:
    """A table of `n` rows; `number` sets it apart from the run's other tables."""
    generator = torch.Generator().manual_seed(config.seed + number * 1_000_003)
    return SparseTable(
        n,
        config.network.dimension,
        generator=generator,
        device=world.device,
        bias=bias,
        rowwise=config.train.table_optimizer == "rowwise_adagrad",
    )


class SessionFamily:
    """Session models: an encoder alone, or the hybrid."""

    unit = "clicks"

    def total(self, reader: Reader[Any]) -> int:
        """Target clicks of an epoch."""
        return reader.total_targets()

    def __init__(self, config: TrainerConfig, dataset: Dataset, world: World) -> None:
        self.config, self.dataset, self.world = config, dataset, world
        self.shown = dataset.shows_exposures
        self.trains_on_shown = self.shown and config.train.exposures

    def reader(self, holdout: int) -> SessionReader:
        """Sessions to train on, or with `TRAIN_HOLDOUT` to validate on."""
        config = self.config
        exposures = self.shown and bool(config.feedback_tasks or config.train.skipped_negatives)
        return SessionReader(self.dataset, exposures=exposures, holdout=holdout, prefixes=config.train.prefixes)

    def stepper(self, total_steps: int) -> Stepper:
        """Freshly drawn parameters."""
        config, n_items = self.config, self.dataset.manifest.n_items
        torch.manual_seed(config.seed)
        model = Recommender(config)
        tables = {ITEM: make_table(config, n_items, self.world, number=0, bias=True)}
        train_clicks = self.dataset.items(["train_clicks"])["train_clicks"].to_numpy()
        tables[ITEM].bias[1:] = first_biases(config, train_clicks)
        if not config.network.tied:
            tables[INPUT] = make_table(config, n_items, self.world, number=1, bias=False)
        return Stepper(config, SessionObjective(config, model, train_clicks), tables, total_steps, self.world)

    def collate(self, holdout: int, salt: int) -> Collate:
        """The maker of an epoch's batches."""
        train = self.config.train
        options = BatchOptions(
            holdout=holdout,
            tasks=self.config.feedback_tasks,
            exposures=self.trains_on_shown,
            rows_per_session=train.exposures_per_session,
            salt=salt,
            prefixes=train.prefixes,
            skipped=train.skipped_negatives if self.shown else 0,
        )

        def collate(window: Sessions, mine: Int, step: Int, /) -> Batch:
            positives = targets_of(window.take(step), holdout) if train.batch_positives else None
            return train_batch(window.take(mine), options, positives)

        return collate

    def sample(self) -> Sessions:
        """This worker's share of the sessions that are validated on."""
        return valid_sessions(self.reader(TRAIN_HOLDOUT), self.config.train.valid_sessions, self.world)

    def scorer(self, stepper: Stepper) -> SessionScorer:
        """The model applied."""
        assert isinstance(stepper.model, Recommender)
        by_cosine = self.config.loss == "embedding"
        return SessionScorer(stepper.model, stepper.tables, self.world.device, by_cosine)

    def validate(self, stepper: Stepper, sample: Sessions) -> Validation:
        """Full ranking of the valid targets, and feedback of the valid blocks."""
        clicks = self.dataset.items(["clicks"])["clicks"].to_numpy()
        candidates = np.flatnonzero(clicks > 0) + 1
        return validate_sessions(
            self.scorer(stepper), sample, candidates, self.world, exposures=self.shown, mask_seen=self.mask_seen
        )

    @cached_property
    def mask_seen(self) -> bool:
        """Whether seen items are no candidates: decided as `mask_seen=auto` of the evaluation."""
        return count_repeats(self.dataset).mask_seen

    @property
    def name(self) -> str:
        """Of the model; of a hybrid with its encoders and head."""
        config = self.config
        return f"hybrid ({'+'.join(config.encoders)}, {config.head})" if config.model == "hybrid" else config.model


class RankFamily:
    """Ranking models, over the blocks of sessions or over the rows of scenario `ctr`."""

    unit = "rows"

    def total(self, reader: Reader[Any]) -> int:
        """Sessions, or rows, that an epoch trains on."""
        return sum(int(np.count_nonzero(reader.targets(group))) for group in range(len(reader.groups)))

    def __init__(self, config: TrainerConfig, dataset: Dataset, world: World) -> None:
        self.config, self.dataset, self.world = config, dataset, world
        self.shown = dataset.shows_exposures
        self.trains_on_shown = self.shown and config.train.exposures
        self.users = all_users(dataset, self.reader(TRAIN_HOLDOUT))

    def reader(self, holdout: int) -> SessionReader | RowReader:
        """Sessions or rows to train on."""
        if self.dataset.session_files:
            return SessionReader(self.dataset, exposures=self.shown, holdout=holdout)
        return RowReader(self.dataset, ("train",) if holdout == TRAIN_HOLDOUT else ("train", "valid"))

    def stepper(self, total_steps: int) -> Stepper:
        """Freshly drawn parameters."""
        config = self.config
        torch.manual_seed(config.seed)
        model = Ranker(config, torch.from_numpy(self.dataset.category_codes()))
        tables = {
            ITEM: make_table(config, self.dataset.manifest.n_items, self.world, number=0, bias=False),
            USER: make_table(config, len(self.users), self.world, number=2, bias=False),
        }
        return Stepper(config, RankObjective(config, model), tables, total_steps, self.world)

    def collate(self, holdout: int, salt: int) -> Collate:
        """The maker of an epoch's batches."""
        tasks, limit = self.config.tasks, self.config.train.exposures_per_session

        def collate(window: Sessions | FlatRows, mine: Int, step: Int, /) -> RankBatch:
            del step
            if isinstance(window, FlatRows):
                return rank_batch(window.take(mine), self.users, tasks)
            sessions = window.take(mine)
            rows = feedback_rows(sessions, exposures=self.trains_on_shown)
            rows = rows.select(rows.position < sessions.items.lengths[rows.session] - holdout)
            kept = sampled(sessions.user_id[rows.session], rows.session, rows.place, limit, salt)
            return rank_batch(block_rows(sessions, rows.select(kept)), self.users, tasks)

        return collate

    def sample(self) -> FlatRows:
        """This worker's share of the rows that are validated on."""
        reader, n = self.reader(TRAIN_HOLDOUT), self.config.train.valid_sessions
        if isinstance(reader, RowReader):
            return valid_rows(reader, n, self.world)
        sessions = valid_sessions(reader, n, self.world)
        rows = feedback_rows(sessions, exposures=self.shown)
        last = sessions.items.lengths[rows.session] - TRAIN_HOLDOUT
        return block_rows(sessions, rows.select(rows.position == last))

    def scorer(self, stepper: Stepper) -> RankScorer:
        """The model applied."""
        assert isinstance(stepper.model, Ranker)
        return RankScorer(stepper.model, stepper.tables, self.users, self.world.device)

    def validate(self, stepper: Stepper, sample: FlatRows) -> Validation:
        """AUCs of the valid rows."""
        return validate_rows(self.scorer(stepper), sample, self.world)

    @property
    def name(self) -> str:
        """Of the model."""
        return self.config.model


def first_biases(config: TrainerConfig, train_clicks: Int) -> torch.Tensor:
    """Item biases that a run begins with, float32 `[n_items]`.

    No epoch should go by in learning how often items are clicked. To a softmax that is the log of their clicks, whose
    spread is more than an epoch's updates could cover; to gBCE, which judges each item alone, the odds of one in all.
    """
    if config.loss == "gbce":
        return torch.full((len(train_clicks),), -math.log(len(train_clicks)))
    if config.network.popularity_bias and config.loss in ("softmax", "sampled_softmax"):
        log_clicks = torch.from_numpy(np.log1p(train_clicks.astype(np.float64)))
        return (log_clicks - log_clicks.mean()).float()
    return torch.zeros(len(train_clicks))
