"""Ranking models: feedback tasks over shown rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from etl.dataset import TRAIN_HOLDOUT, Dataset
from etl.runtime.arrays import IntArray
from trainer.config import TrainerConfig
from trainer.data.batch import feedback_rows
from trainer.data.hashing import sample_per_group
from trainer.data.ranking_rows import FlatRows, RankBatch, RowReader, all_users, block_rows, rank_batch
from trainer.data.reader import Reader, SessionReader, Sessions
from trainer.distributed.world import World
from trainer.inference.scorer import RankScorer
from trainer.inference.validation import Validation, valid_rows, valid_sessions, validate_rows
from trainer.models.ranker import Ranker
from trainer.task.base import Collate, feature_tables, make_item_features, make_table
from trainer.training.objective import ITEM, USER, RankObjective
from trainer.training.step import TrainStep


class RankingTask:
    """Ranking models, on the exposures of sessions or the rows of scenario `ctr`."""

    unit = "rows"

    def total(self, reader: Reader[Any]) -> int:
        """Number of sessions or rows of an epoch."""
        return sum(int(np.count_nonzero(reader.targets(group))) for group in range(len(reader.groups)))

    def __init__(self, config: TrainerConfig, dataset: Dataset, world: World) -> None:
        self.config, self.dataset, self.world = config, dataset, world
        self.shown = dataset.shows_exposures
        self.trains_on_shown = self.shown and config.train.exposures
        self.users = all_users(dataset, self.reader(TRAIN_HOLDOUT))

    def reader(self, holdout: int) -> SessionReader | RowReader:
        """Reader of training sessions or rows."""
        if self.dataset.session_files:
            return SessionReader(self.dataset, exposures=self.shown, holdout=holdout)
        return RowReader(self.dataset, ("train",) if holdout == TRAIN_HOLDOUT else ("train", "valid"))

    def train_step(self, total_steps: int) -> TrainStep:
        """Newly initialised parameters."""
        config = self.config
        torch.manual_seed(config.seed)
        features = make_item_features(config, self.dataset, [ITEM])
        model = Ranker(config, torch.from_numpy(self.dataset.category_codes()), features)
        tables = {
            ITEM: make_table(config, self.dataset.manifest.n_items, self.world, number=0, bias=False),
            USER: make_table(config, len(self.users), self.world, number=2, bias=False),
        }
        tables |= feature_tables(config, features, tables, self.world)
        return TrainStep(config, RankObjective(config, model), tables, total_steps, self.world)

    def init_from_counts(self, train_step: TrainStep, holdout: int) -> None:
        """Ranking models have no initialisation from counts."""

    def collate(self, holdout: int, salt: int) -> Collate:
        """The collate function of an epoch."""
        tasks, limit = self.config.tasks, self.config.train.exposures_per_session

        def collate(window: Sessions | FlatRows, mine: IntArray, step: IntArray, /) -> RankBatch:
            del step
            if isinstance(window, FlatRows):
                return rank_batch(window.take(mine), self.users, tasks)
            sessions = window.take(mine)
            rows = feedback_rows(sessions, exposures=self.trains_on_shown)
            rows = rows.select(rows.position < sessions.items.lengths[rows.session] - holdout)
            sampled = sample_per_group(sessions.user_id[rows.session], rows.session, rows.index_in_session, limit, salt)
            return rank_batch(block_rows(sessions, rows.select(sampled)), self.users, tasks)

        return collate

    def sample(self) -> FlatRows:
        """This worker's share of the validation rows."""
        reader, n = self.reader(TRAIN_HOLDOUT), self.config.train.valid_sessions
        if isinstance(reader, RowReader):
            return valid_rows(reader, n, self.world)
        sessions = valid_sessions(reader, n, self.world)
        rows = feedback_rows(sessions, exposures=self.shown)
        last = sessions.items.lengths[rows.session] - TRAIN_HOLDOUT
        return block_rows(sessions, rows.select(rows.position == last))

    def scorer(self, train_step: TrainStep) -> RankScorer:
        """The trained model for inference."""
        assert isinstance(train_step.model, Ranker)
        return RankScorer(train_step.model, train_step.tables, self.users, self.world.device)

    def fit_score_weights(self, train_step: TrainStep, sample: FlatRows, run: Path) -> None:
        """Nothing is added to the scores of ranking models."""

    def load_score_weights(self, run: Path, holdout: int) -> None:
        """Nothing is added to the scores of ranking models."""

    def validate(self, train_step: TrainStep, sample: FlatRows) -> Validation:
        """AUCs of the valid rows."""
        return validate_rows(self.scorer(train_step), sample, self.world)

    @property
    def name(self) -> str:
        """Display name of the model."""
        return self.config.model
