"""The interface of a model task, shared by session and ranking models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from etl.dataset import Dataset
from etl.runtime.arrays import IntArray
from trainer.config import TrainerConfig
from trainer.data.item_features import feature_codes
from trainer.data.reader import Reader
from trainer.distributed.world import World
from trainer.inference.scorer import RankScorer, SessionScorer
from trainer.inference.validation import Validation
from trainer.models.embedding_table import FULL_TABLE, Shard, SparseTable
from trainer.models.item_features import ItemFeatures
from trainer.training.step import TrainStep


class Collate(Protocol):
    """Builds batches from a window's samples."""

    def __call__(self, window: Any, mine: IntArray, step: IntArray, /) -> Any:
        """Build a batch from rows `mine`, this worker's share; `step` are the rows of the global batch."""


class ModelTask(Protocol):
    """What the training loop needs of a kind of model; `unit` is the unit of its progress, clicks or rows."""

    unit: str

    def total(self, reader: Any) -> int:
        """Number of target clicks of an epoch, or of samples that its rows come from."""

    def reader(self, holdout: int) -> Reader[Any]:
        """Reader of the training samples."""

    def train_step(self, total_steps: int) -> TrainStep:
        """Newly initialised parameters, the same on every worker, determined by the seed."""

    def init_from_counts(self, train_step: TrainStep, holdout: int) -> None:
        """Initialise parameters from counts over all clicks but the last `holdout` of each session."""

    def collate(self, holdout: int, salt: int) -> Collate:
        """The collate function of an epoch."""

    def sample(self) -> Any:
        """This worker's share of the validation sample."""

    def validate(self, train_step: TrainStep, sample: Any) -> Validation:
        """Metrics on the sample, over all workers."""

    def fit_score_weights(self, train_step: TrainStep, sample: Any, run: Path) -> None:
        """Fit on valid what a trained model's scores add at inference, and save it in the run."""

    def load_score_weights(self, run: Path, holdout: int) -> None:
        """Load what a run fitted; counts are over all but the held-out clicks."""

    @property
    def name(self) -> str:
        """Display name of the model for reports."""

    def scorer(self, train_step: TrainStep) -> SessionScorer | RankScorer:
        """The trained model for inference."""


def make_item_features(config: TrainerConfig, dataset: Dataset, tables: list[str]) -> ItemFeatures:
    """Item feature embeddings of `network.item_features` for these tables."""
    if not config.network.item_features:
        return ItemFeatures.none()
    codes, _ = feature_codes(dataset, config.network.item_features)
    train_clicks = dataset.items(["train_clicks"])["train_clicks"].to_numpy()
    return ItemFeatures(codes, train_clicks, tables)


def feature_tables(
    config: TrainerConfig, features: ItemFeatures, item_tables: Mapping[str, SparseTable], world: World
) -> dict[str, SparseTable]:
    """Feature embedding tables by name, of the item tables' dimensions; initialised to zero."""
    tables = {}
    for of, name in features.table_of.items():
        size = item_tables[of].dimension
        tables[name] = make_table(config, features.n_values, world, number=0, bias=False, dimension=size)
        tables[name].vector.zero_()
        tables[name].learning_rate_factor = config.train.feature_rate
    return tables


def make_table(
    config: TrainerConfig, n: int, world: World, *, number: int, bias: bool, dimension: int | None = None
) -> SparseTable:
    """Create a table of `n` rows, or this worker's shard; `number` distinguishes its seed from other tables'."""
    generator = torch.Generator().manual_seed(config.seed + number * 1_000_003)
    return SparseTable(
        n,
        dimension or config.network.embedding_dim,
        generator=generator,
        device=world.device,
        bias=bias,
        rowwise=config.train.table_optimizer == "rowwise_adagrad",
        shard=shard_of(config, world),
    )


def shard_of(config: TrainerConfig, world: World) -> Shard:
    """The shard of each table that this worker holds."""
    return Shard(world.global_rank, world.size) if config.train.table == "sharded" else FULL_TABLE
