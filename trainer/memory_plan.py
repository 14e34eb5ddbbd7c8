"""Memory of a worker by component, extrapolated to other catalogue sizes and worker counts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from trainer.config import TrainerConfig
from trainer.models.embedding_table import SparseTable
from trainer.training.step import TrainStep

BytesByName = dict[str, float]
"""Bytes by name."""


@dataclass(frozen=True)
class MemoryPlan:
    """Memory use of one worker that holds the complete tables.

    Attributes:
        n_items: items of the dataset.
        sharded: whether tables are sharded over workers.
        items: bytes of tables with one row per item, with optimiser state.
        others: bytes of all other tables, with optimiser state.
        counts: bytes that each worker needs for all items even with sharded tables: sampling counts of negatives,
            and feature codes.
        networks: bytes of the networks, with gradients and optimiser state.
        rest: all other bytes: prefetched sessions, batches, libraries.
        parameters: number of parameters of the model.
        item_values: number of random initial values per item.
    """

    n_items: int
    sharded: bool
    items: BytesByName
    others: BytesByName
    counts: float
    networks: float
    rest: float
    parameters: int
    item_values: int

    @classmethod
    def of(cls, config: TrainerConfig, train_step: TrainStep, resident: int, n_items: int) -> MemoryPlan:
        """The plan measured on a worker with all rows and `resident` bytes."""
        tables = train_step.tables
        of_items = {name: table for name, table in tables.items() if table.n_rows == n_items + 1}
        others = {name: table for name, table in tables.items() if name not in of_items}
        networks = sum(p.numel() for p in train_step.model.parameters())
        states = 2 if config.train.optimizer == "adagrad" else 3
        plan = cls(
            n_items,
            sharded=config.train.table == "sharded",
            items=table_bytes(of_items),
            others=table_bytes(others),
            counts=count_bytes(train_step),
            networks=4 * networks * (1 + states),
            rest=0.0,
            parameters=sum(table.parameters() for table in tables.values()) + networks,
            item_values=sum(table.dimension for table in of_items.values()),
        )
        return replace(plan, rest=max(0.0, resident - plan.bytes(n_items, 1)))

    def breakdown(self, items: int, workers: int) -> BytesByName:
        """Bytes per worker of each component."""
        rows = (items + 1) / (self.n_items + 1) / (workers if self.sharded else 1)
        return {
            **{name: rows * size for name, size in self.items.items()},
            **{name: size / (workers if self.sharded else 1) for name, size in self.others.items()},
            f"counts of all items ({self.counts / self.n_items:,.1f} bytes each)": items / self.n_items * self.counts,
            "networks with gradients and optimiser": self.networks,
            "sessions read ahead, batches, libraries": self.rest,
        }

    def bytes(self, items: int, workers: int) -> float:
        """Bytes per worker."""
        return sum(self.breakdown(items, workers).values())

    def lines(self, items: int, workers: int, draw_seconds: float) -> list[tuple[str, str]]:
        """Parameters and memory per worker, as printed."""
        breakdown = self.breakdown(items, workers)
        own = sum(size for name, size in breakdown.items() if name in self.items or name in self.others)
        lines = [("parameters", f"{self.parameters:,}")] if items == self.n_items else [("items", f"{items:,}")]
        lines += [(name, f"{size / 2**20:,.1f} MiB") for name, size in breakdown.items()]
        lines.append(("memory of a worker", f"{sum(breakdown.values()) / 2**20:,.0f} MiB"))
        if self.sharded:
            lines.append(("a worker's file of a checkpoint", f"{own / 2**20:,.0f} MiB"))
        else:
            copied = sum(breakdown.values()) + own + self.networks
            lines.append(("… the first one, while it copies a checkpoint", f"{copied / 2**20:,.0f} MiB"))
        drawn = items * self.item_values * draw_seconds
        return [*lines, ("drawing the first vectors, on each worker", f"{drawn:,.0f} s")]


def table_bytes(tables: dict[str, SparseTable]) -> BytesByName:
    """Bytes of tables with optimiser state."""
    by_part: BytesByName = {}
    for name, table in tables.items():
        tensors = table.tensors()
        for what, names in (("table", ("vector", "bias")), ("optimiser state", ("vector_state", "bias_state"))):
            by_part[f"{name} {what}"] = sum(tensors[n].numel() * tensors[n].element_size() for n in names)
    return by_part


def count_bytes(train_step: TrainStep) -> int:
    """Bytes of per-item data other than vectors."""
    sampler = getattr(train_step.objective, "sampler", None)
    arrays = [array for array in vars(sampler).values() if isinstance(array, np.ndarray)] if sampler else []
    features, read_by_towers = train_step.model.item_features, getattr(train_step.model, "feedback_features", None)
    buffers = list(features.buffers()) if features.table_of else []
    buffers += [read_by_towers.codes] if read_by_towers is not None else []
    return sum(array.nbytes for array in arrays) + sum(b.numel() * b.element_size() for b in buffers)
