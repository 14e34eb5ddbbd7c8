"""What differs between session models and ranking models: what they read, collate, validate and export."""

from __future__ import annotations

from etl.dataset import Dataset
from trainer.config import TrainerConfig
from trainer.distributed.world import World
from trainer.task.base import Family
from trainer.task.ranking import RankFamily
from trainer.task.sessions import SessionFamily


def family_of(config: TrainerConfig, dataset: Dataset, world: World) -> Family:
    """The family of a configuration's model."""
    return RankFamily(config, dataset, world) if config.ranks else SessionFamily(config, dataset, world)
