"""Collective lookup of table rows at their owners, outside of training steps."""

from __future__ import annotations

import torch

from trainer.distributed.row_exchange import RowExchange, Tensors
from trainer.distributed.world import World
from trainer.models.embedding_table import SparseTable


class RowLookup:
    """Lookups in rounds, each an exchange of all workers about all tables.

    Workers need not ask for the same things or equally often: one that needs nothing more calls `finish`, which answers
    the others until they have called it too. A round waits as long as the slowest worker takes, up to a day.

    Args:
        tables: the shards of this worker by name; the same names in the same order on all workers.
        world: the workers, more than one.
    """

    def __init__(self, tables: dict[str, SparseTable], world: World) -> None:
        self.shards, self.world = tables, world
        self.tables = {name: RemoteTable(self, name) for name in tables}

    def values(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows `[U, D + 1]` (`[U, D]` without bias) of distinct ids, int64 `[U]`, rising, of a table."""
        return self._round({name: ids.cpu()}, asking=True)[0][name].to(ids.device)

    def finish(self) -> None:
        """Answer until all workers need nothing more."""
        while self._round({}, asking=False)[1]:
            pass

    def _round(self, asked: Tensors, *, asking: bool) -> tuple[Tensors, bool]:
        """Rows of the ids asked by table, and whether any worker asked."""
        requested = {name: asked.get(name, torch.zeros(0, dtype=torch.int64)) for name in self.shards}
        count = torch.tensor([asking], dtype=torch.float64)
        exchange = RowExchange(requested, {}, count, self.world, self.world.waits)  # a gloo group: on the CPU
        own = {name: self.shards[name].values(ids).cpu() for name, ids in exchange.owned.items()}
        return exchange.from_owners(own), bool(exchange.extra[0] > 0)


class RemoteTable:
    """A table as its owners answer for it; every `read` is a round of the lookup.

    Args:
        lookup: that the table is one of.
        name: of the table.
    """

    def __init__(self, lookup: RowLookup, name: str) -> None:
        self.lookup, self.name = lookup, name
        self.n_rows, self.dimension = lookup.shards[name].n_rows, lookup.shards[name].dimension

    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors `[..., D]` and biases `[...]` of ids `[...]`; the biases of a table without any are empty.

        The vectors are contiguous as those of a table are: products of a slice of wider rows round differently.
        """
        distinct, index = torch.unique(ids, return_inverse=True)
        rows = torch.nn.functional.embedding(index, self.lookup.values(self.name, distinct))
        vector, bias = rows[..., : self.dimension].contiguous(), rows[..., self.dimension :]
        return vector, bias[..., 0] if bias.shape[-1] else bias.flatten()
