"""Session models: next item and feedback tasks over sessions."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch

from etl.dataset import Dataset
from retrieval.repeats import count_repeats
from trainer.config import TrainerConfig
from trainer.data.batch import Batch, BatchOptions, targets_of, train_batch
from trainer.data.order import Int
from trainer.data.reader import Reader, SessionReader, Sessions
from trainer.distributed.world import World
from trainer.inference.scorer import SessionScorer
from trainer.inference.validation import Validation, valid_sessions, validate_sessions
from trainer.models.recommender import Recommender
from trainer.task.base import TRAIN_HOLDOUT, Collate, feature_tables, make_item_features, make_table
from trainer.training.objective import INPUT, ITEM, TASKS, SessionObjective
from trainer.training.step import TrainStep


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
        return SessionReader(
            self.dataset,
            exposures=exposures,
            holdout=holdout,
            prefixes=config.train.prefixes,
            actions=config.network.past_actions,
        )

    def train_step(self, total_steps: int) -> TrainStep:
        """Freshly drawn parameters."""
        config, n_items = self.config, self.dataset.manifest.n_items
        torch.manual_seed(config.seed)
        names = [ITEM] if config.network.tie_embeddings else [ITEM, INPUT]
        features = make_item_features(config, self.dataset, names)
        model = Recommender(config, features)
        tables = {ITEM: make_table(config, n_items, self.world, number=0, bias=True)}
        train_clicks = self.dataset.items(["train_clicks"])["train_clicks"].to_numpy()
        tables[ITEM].bias[1:] = first_biases(config, train_clicks)
        if not config.network.tie_embeddings:
            tables[INPUT] = make_table(config, n_items, self.world, number=1, bias=False)
        if model.own_dim:
            size = model.own_dim * len(model.feedback_tasks)
            tables[TASKS] = make_table(config, n_items, self.world, number=3, bias=False, dimension=size)
        tables |= feature_tables(config, features, self.world)
        return TrainStep(config, SessionObjective(config, model, train_clicks), tables, total_steps, self.world)

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
            actions=self.config.network.past_actions,
        )

        def collate(window: Sessions, mine: Int, step: Int, /) -> Batch:
            positives = targets_of(window.take(step), holdout) if train.batch_positives else None
            return train_batch(window.take(mine), options, positives)

        return collate

    def sample(self) -> Sessions:
        """This worker's share of the sessions that are validated on."""
        return valid_sessions(self.reader(TRAIN_HOLDOUT), self.config.train.valid_sessions, self.world)

    def scorer(self, train_step: TrainStep) -> SessionScorer:
        """The model applied."""
        assert isinstance(train_step.model, Recommender)
        by_cosine = self.config.loss == "embedding"
        return SessionScorer(train_step.model, train_step.tables, self.world.device, by_cosine)

    def validate(self, train_step: TrainStep, sample: Sessions) -> Validation:
        """Full ranking of the valid targets, and feedback of the valid blocks."""
        clicks = self.dataset.items(["clicks"])["clicks"].to_numpy()
        candidates = np.flatnonzero(clicks > 0) + 1
        return validate_sessions(
            self.scorer(train_step), sample, candidates, self.world, exposures=self.shown, mask_seen=self.mask_seen
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
