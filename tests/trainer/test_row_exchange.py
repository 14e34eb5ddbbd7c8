"""Exchange of rows between workers and owners, against sums computed row by row."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.support.workers import run_workers
from trainer.distributed.row_exchange import RowExchange, sum_by_sender
from trainer.distributed.world import World

SHARED = {"item": [2, 3, 9, 40], "user": []}
WIDTHS = {"item": 3, "user": 1}
OWN = {
    "item": [[0, 1, 2, 7], [], [1, 5, 7, 8, 9, 41]],
    "user": [[], [4], [4, 5, 6]],
}
"""Rows that each of three workers reads: some are read by two, some are also shared, some owners have none."""


def rows_of(name: str, rank: int, size: int) -> list[int]:
    return sorted({*SHARED[name], *(i for r in range(rank, 3, size) for i in OWN[name][r])})


def value(name: str, rank: int, row: int) -> np.ndarray:
    return np.arange(1, WIDTHS[name] + 1) * (rank + 1) + 100.0 * row


def worker(rank: int, size: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{size}", rank=rank, world_size=size)
    wanted = {name: torch.tensor(rows_of(name, rank, size), dtype=torch.int64) for name in WIDTHS}
    shared = {name: torch.tensor(rows, dtype=torch.int64) for name, rows in SHARED.items()}
    world = World(rank, size, torch.device("cpu"))
    exchange = RowExchange(wanted, shared, torch.tensor([1.5, rank], dtype=torch.float64), world)
    values = {n: [value(n, rank, int(i)) for i in ids] for n, ids in wanted.items()}
    values = {n: torch.tensor(np.array(v)).float().view(-1, WIDTHS[n]) for n, v in values.items()}
    sums = exchange.to_owners(values)
    counts = world.gather([len(ids) for ids in exchange.owned.values()])
    back, (ids, rows) = exchange.from_owners(sums), exchange.to_all(sums, counts)
    torch.save([exchange.extra, exchange.owned, sums, back, ids, rows], folder / f"{size}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


@pytest.mark.cluster
@pytest.mark.parametrize("size", [2, 3])
def test_sums_reach_their_owners_and_return_to_readers_and_to_all_workers(tmp_path, size):
    run_workers(worker, (size, tmp_path), nprocs=size)
    for name, width in WIDTHS.items():
        expected: dict[int, np.ndarray] = {}
        for rank in range(size):
            for row in rows_of(name, rank, size):
                expected[row] = expected.get(row, np.zeros(width)) + value(name, rank, row)
        for rank in range(size):
            extra, owned, sums, back, ids, rows = torch.load(tmp_path / f"{size}-{rank}.pt")
            assert extra.tolist() == [1.5 * size, sum(range(size))]
            assert owned[name].tolist() == sorted(row for row in expected if row % size == rank)
            for row, total in zip(owned[name].tolist(), sums[name].numpy(), strict=True):
                assert total == pytest.approx(expected[row])
            for row, total in zip(rows_of(name, rank, size), back[name].numpy(), strict=True):
                assert total == pytest.approx(expected[row])
            assert sorted(ids[name].tolist()) == sorted(expected)
            for row, total in zip(ids[name].tolist(), rows[name].numpy(), strict=True):
                assert total == pytest.approx(expected[row])


def test_sum_by_sender_does_not_depend_on_the_number_of_threads():
    random = torch.Generator().manual_seed(0)
    place = torch.cat([torch.randperm(2_000, generator=random)[:1_500] for _ in range(20)])
    rows = torch.randn(len(place), 16, generator=random)
    expected = torch.zeros(2_000, 16)
    for at, row in zip(place.tolist(), rows, strict=True):
        expected[at] += row
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            assert torch.equal(sum_by_sender(place, rows, [1_500] * 20, 2_000), expected)
    finally:
        torch.set_num_threads(before)
