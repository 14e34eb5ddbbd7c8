"""Maps a model to its task: session or ranking."""

from __future__ import annotations

from etl.dataset import Dataset
from trainer.config import TrainerConfig
from trainer.distributed.world import World
from trainer.task.base import ModelTask
from trainer.task.ranking import RankingTask
from trainer.task.sessions import SessionTask


def model_task_of(config: TrainerConfig, dataset: Dataset, world: World) -> ModelTask:
    """The session or ranking task of a configuration's model."""
    return RankingTask(config, dataset, world) if config.is_ranking_model else SessionTask(config, dataset, world)
