"""Sparse gradient exchange by row owner: worker `id % size` owns a row, sums its gradients and updates it.

One exchange serves all tables of a step, to pay each message's latency once. W workers, T tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trainer.distributed.world import World

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Route:
    """How the rows of one table are routed to their owners.

    Attributes:
        order: int64 `[U]`, permutation of this worker's rows by owner, the shared rows of each owner first.
        sent: number of rows sent to each owner, `[W]`.
        owned: int64, distinct ids of rows owned here and read by any worker, sorted.
        owned_index: int64, index in `owned` of each received row; received rows are in the order of sender ranks.
        received: number of rows received from each worker, `[W]`.
    """

    order: torch.Tensor
    sent: list[int]
    owned: torch.Tensor
    owned_index: torch.Tensor
    received: list[int]


class RowExchange:
    """Exchange of the rows that a step reads; constructed collectively, before the forward pass.

    Ids of rows that every worker reads (the shared negatives) are not sent: each owner knows them.

    Args:
        requested: distinct ids that this worker reads by table, int64, sorted; the same tables on all workers.
        shared: distinct ids that all workers read by table, int64, sorted, a subset of `requested`.
        extra: float64 `[K]`, values to all-reduce (sum) with the same message.
        world: the workers, more than one.
        group: process group of the exchange; None = the default group.
    """

    def __init__(
        self,
        requested: Tensors,
        shared: Tensors,
        extra: torch.Tensor,
        world: World,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.world, self.group = world, group
        size, names = world.size, list(requested)
        common = {n: shared.get(n, requested[n][:0]) for n in names}
        own = {n: requested[n][~torch.isin(requested[n], common[n], assume_unique=True)] for n in names}
        own_order = {n: torch.argsort(own[n] % size, stable=True) for n in names}
        counts = torch.stack([torch.bincount(own[n] % size, minlength=size) for n in names], dim=1)
        head = torch.cat([counts.double(), extra.double().expand(size, -1)], dim=1)
        heads = self._all_to_all(head.flatten(), [head.shape[1]] * size, [head.shape[1]] * size).view(size, -1)
        self.extra = heads[:, len(names) :].sum(0)
        sent, received = counts.tolist(), heads[:, : len(names)].long().tolist()
        ids = self._exchanged([own[n][own_order[n]].int() for n in names], sent, received)
        self.routes = {}
        for number, name in enumerate(names):
            self.routes[name] = _route(
                requested[name],
                common[name],
                own[name][own_order[name]],
                [row[number] for row in sent],
                ids[number].long(),
                [row[number] for row in received],
                world,
            )

    @property
    def owned(self) -> Tensors:
        """Distinct ids by table of rows owned here and read by any worker, sorted."""
        return {name: route.owned for name, route in self.routes.items()}

    def to_owners(self, values: Tensors) -> Tensors:
        """Sum float32 rows `[U, C]` by table over workers, at their owners: `[owned, C]`.

        Owners add in the order of ranks, so that runs are reproducible bit for bit.
        """
        tensors = [values[name][route.order] for name, route in self.routes.items()]
        sent, received = self._splits()
        result = {}
        for (name, route), rows in zip(self.routes.items(), self._exchanged(tensors, sent, received), strict=True):
            result[name] = sum_by_sender(route.owned_index, rows, route.received, len(route.owned))
        return result

    def from_owners(self, values: Tensors) -> Tensors:
        """Fetch the rows `[U, C]` that this worker reads, by table, from their owners' `[owned, C]`."""
        sent, received = self._splits()
        tensors = [values[name][route.owned_index] for name, route in self.routes.items()]
        result = {}
        for (name, route), rows in zip(self.routes.items(), self._exchanged(tensors, received, sent), strict=True):
            result[name] = torch.empty_like(rows).index_copy_(0, route.order, rows)
        return result

    def to_all(self, values: Tensors, counts_WT: list[list[int]]) -> tuple[Tensors, Tensors]:
        """All-gather the rows of the step.

        Args:
            values: `[owned, C]` by table, float32 (float64 in tests).
            counts_WT: number of owned rows by worker and table.

        Returns:
            Ids and rows by table, in the order of owners.
        """
        kind = next(iter(values.values())).dtype
        id_kind = torch.int32 if kind == torch.float32 else torch.int64  # same width, so that ids are sent as raw bits
        tensors = []
        for name, route in self.routes.items():
            tensors += [route.owned.to(id_kind).view(kind), values[name].flatten()]
        mine, widths = torch.cat(tensors), [values[name].shape[1] for name in self.routes]
        lengths = [sum(n * (1 + width) for n, width in zip(counts, widths, strict=True)) for counts in counts_WT]
        longest = max(lengths)
        everything = mine.new_empty(self.world.size * longest)
        dist.all_gather_single(everything, torch.nn.functional.pad(mine, (0, longest - len(mine))))
        ids: dict[str, list[torch.Tensor]] = {name: [] for name in self.routes}
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in self.routes}
        for counts, length, block in zip(counts_WT, lengths, everything.split(longest), strict=True):
            sizes = [size for n, width in zip(counts, widths, strict=True) for size in (n, n * width)]
            pieces = block[:length].split(sizes)
            for number, name in enumerate(self.routes):
                ids[name].append(pieces[2 * number])
                rows[name].append(pieces[2 * number + 1].view(-1, widths[number]))
        return (
            {name: torch.cat(tensors).view(id_kind).long() for name, tensors in ids.items()},
            {name: torch.cat(tensors) for name, tensors in rows.items()},
        )

    def _splits(self) -> tuple[list[list[int]], list[list[int]]]:
        """Number of rows sent to and received from each worker, by table."""
        routes = self.routes.values()
        return (
            [list(row) for row in zip(*(route.sent for route in routes), strict=True)],
            [list(row) for row in zip(*(route.received for route in routes), strict=True)],
        )

    def _exchanged(
        self, tables: Sequence[torch.Tensor], sent_WT: list[list[int]], received_WT: list[list[int]]
    ) -> list[torch.Tensor]:
        """Send rows of T tables, ordered by receiver, in one message to each; returns rows by table and sender."""
        widths = [1 if table.dim() == 1 else table.shape[1] for table in tables]
        pieces = [table.flatten().split([row[t] * widths[t] for row in sent_WT]) for t, table in enumerate(tables)]
        data = torch.cat([piece for to in zip(*pieces, strict=True) for piece in to])
        out = [[n * width for n, width in zip(row, widths, strict=True)] for row in sent_WT]
        into = [[n * width for n, width in zip(row, widths, strict=True)] for row in received_WT]
        came = self._all_to_all(data, [sum(row) for row in out], [sum(row) for row in into])
        blocks = came.split([n for row in into for n in row])
        result = []
        for t, table in enumerate(tables):
            flat = torch.cat(blocks[t :: len(tables)])
            result.append(flat if table.dim() == 1 else flat.view(-1, table.shape[1]))
        return result

    def _all_to_all(self, data: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        result = data.new_empty(sum(received))
        dist.all_to_all_single(result, data, received, sent, group=self.group)
        return result


def sum_by_sender(owned_index: torch.Tensor, rows: torch.Tensor, received: list[int], n_owned: int) -> torch.Tensor:
    """Sum received rows to `[n_owned, C]`, one sender after another.

    Multi-threaded `index_put_(accumulate=True)` adds in any order, so its sums are not reproducible.

    Args:
        owned_index: int64, result row of each received row; distinct for each sender.
        rows: received rows, by sender.
        received: number of rows from each sender.
        n_owned: number of rows of the result.
    """
    total = rows.new_zeros(n_owned, rows.shape[1])
    for at, part in zip(owned_index.split(received), rows.split(received), strict=True):
        total[at] += part
    return total


def _route(
    requested: torch.Tensor,
    shared: torch.Tensor,
    own: torch.Tensor,
    sent: list[int],
    came: torch.Tensor,
    received: list[int],
    world: World,
) -> Route:
    """Build the route of a table's rows.

    Args:
        requested: ids that this worker reads, sorted.
        shared: ids that all workers read, sorted.
        own: the other ids of `requested`, by owner.
        sent: number of ids of `own` sent to each owner.
        came: ids that workers request from this owner, without the shared ones, by rank.
        received: number of ids of `came` from each worker.
        world: the workers.
    """
    of_owner = [shared[shared % world.size == owner] for owner in range(world.size)]
    mine = of_owner[world.global_rank]
    in_owner_order = torch.cat([part for pair in zip(of_owner, own.split(sent), strict=True) for part in pair])
    ids = torch.cat([part for rows in came.split(received) for part in (mine, rows)])
    owned, owned_index = torch.unique(ids, return_inverse=True)
    return Route(
        order=torch.searchsorted(requested, in_owner_order),
        sent=[n + len(part) for n, part in zip(sent, of_owner, strict=True)],
        owned=owned,
        owned_index=owned_index,
        received=[n + len(mine) for n in received],
    )
