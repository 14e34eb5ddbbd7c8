"""Collective lookup of sharded table rows, outside of training steps."""

from __future__ import annotations

import torch

from trainer.distributed.row_exchange import RowExchange, Tensors
from trainer.distributed.world import World
from trainer.models.embedding_table import SparseTable


class RowLookup:
    """Lookups in rounds; each round is a collective over all tables.

    Workers may look up different ids, and differently often: a worker that is done calls `finish`, which serves the
    others until all have called it. A round waits up to a day for the slowest worker.

    Args:
        tables: this worker's shards by name; the same names in the same order on all workers.
        world: the workers, more than one.
    """

    def __init__(self, tables: dict[str, SparseTable], world: World) -> None:
        self.shards, self.world = tables, world
        self.tables = {name: RemoteTable(self, name) for name in tables}

    def values(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows `[U, D + 1]` (`[U, D]` without bias) of a table for distinct ids, int64 `[U]`, sorted."""
        return self._round({name: ids.cpu()}, asking=True)[0][name].to(ids.device)

    def finish(self) -> None:
        """Serve the other workers until all are finished."""
        while self._round({}, asking=False)[1]:
            pass

    def _round(self, requested: Tensors, *, asking: bool) -> tuple[Tensors, bool]:
        """Rows of the requested ids by table, and whether any worker is still asking."""
        all_ids = {name: requested.get(name, torch.zeros(0, dtype=torch.int64)) for name in self.shards}
        count = torch.tensor([asking], dtype=torch.float64)
        group = self.world.long_timeout_group  # of gloo: on the CPU
        exchange = RowExchange(all_ids, {}, count, self.world, group)
        own = {name: self.shards[name].values(ids).cpu() for name, ids in exchange.owned.items()}
        return exchange.from_owners(own), bool(exchange.extra[0] > 0)


class RemoteTable:
    """A sharded table read through its owners; every `read` is a round of the lookup.

    Args:
        lookup: the lookup that serves the table.
        name: name of the table.
    """

    def __init__(self, lookup: RowLookup, name: str) -> None:
        self.lookup, self.name = lookup, name
        self.n_rows, self.dimension = lookup.shards[name].n_rows, lookup.shards[name].dimension

    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors `[..., D]` and biases `[...]` of ids `[...]`; biases are empty for a table without bias.

        Vectors are made contiguous, as in a table: products with a slice of wider rows round differently.
        """
        distinct, index = torch.unique(ids, return_inverse=True)
        rows = torch.nn.functional.embedding(index, self.lookup.values(self.name, distinct))
        vector, bias = rows[..., : self.dimension].contiguous(), rows[..., self.dimension :]
        return vector, bias[..., 0] if bias.shape[-1] else bias.flatten()
