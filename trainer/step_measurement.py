"""Measures local training steps, with one and two workers, for the plan's cost model."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from etl.dataset import TRAIN_HOLDOUT, open_dataset
from trainer.config import TrainerConfig, from_dict
from trainer.data.prefetch import Prefetch
from trainer.distributed.row_exchange import sum_by_sender
from trainer.distributed.world import World
from trainer.models.embedding_table import DRAWN_ROWS, FULL_TABLE, SparseTable, drawn_rows
from trainer.program_configs import PlanConfig
from trainer.task.registry import model_task_of
from trainer.training.step import TrainStep

WARM_STEPS = 3
LINK_FLOATS, LINK_TRIES = 1 << 20, 100
MERGED_ROWS, MERGE_TRIES = 8192, 5


@dataclass(frozen=True)
class Measured:
    """Measurements of one worker; row counts are over all tables.

    Attributes:
        seconds: mean seconds of a step.
        targets: target clicks of a step, over all workers.
        own_rows: rows that this worker reads, without the shared ones.
        shared_rows: rows that all workers read.
        row_bytes: bytes of a row's gradient.
        state_bytes: bytes of a row with its optimiser state.
        sum_seconds, put_seconds: seconds per row to sum at its owner, and to copy from its owner.
        take_seconds: seconds per row to read from its owner (sharded table).
        draw_seconds: seconds per random initial value of a table.
        dense_bytes: bytes of the networks' gradients.
        resident: resident memory of the process in bytes.
    """

    seconds: float
    targets: float
    own_rows: float
    shared_rows: float
    row_bytes: float
    state_bytes: float
    sum_seconds: float
    put_seconds: float
    take_seconds: float
    draw_seconds: float
    dense_bytes: float
    resident: int


@dataclass(frozen=True)
class Link:
    """Link between two workers: latency in seconds, bandwidth in bytes per second."""

    latency: float
    bandwidth: float


def measure(
    config: TrainerConfig, options: PlanConfig, workers: int, tokens: int, *, apart: bool = False
) -> tuple[list[Measured], Link]:
    """Run steps of `tokens` target clicks with some local workers; returns measurements and the link between them.

    With `apart` the workers train independently at the same time, without communication.
    """
    small = replace(config, train=replace(config.train, batch_tokens=tokens))
    with tempfile.TemporaryDirectory() as folder:
        arguments = (workers, apart, small.to_dict(), options.measured_steps, options.cores, folder)
        spawn(_work, arguments, nprocs=workers)
        measured = [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(workers)]
    return [Measured(**steps) for steps, _ in measured], Link(**measured[0][1])


def _work(rank: int, size: int, apart: bool, settings: dict[str, Any], steps: int, cores: int, folder: str) -> None:
    torch.set_num_threads(cores)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
        dist.barrier()  # start at the same time, also with `apart`
    world = World.alone() if apart else World(rank, size, torch.device("cpu"))
    measured = steps_of(from_dict(settings), world, steps)
    link = measure_link() if size > 1 else Link(0.0, math.inf)
    (Path(folder) / str(rank)).write_text(json.dumps([asdict(measured), asdict(link)]))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def measure_link() -> Link:
    """Measure the link between two workers, by small all-reduces and one long exchange."""
    little, much = torch.zeros(1), torch.zeros(LINK_FLOATS)
    received = torch.empty_like(much)
    for _ in range(LINK_TRIES):  # the first tries establish connections
        dist.all_reduce(little)
    begin = time.perf_counter()
    for _ in range(LINK_TRIES):
        dist.all_reduce(little)
    latency = (time.perf_counter() - begin) / LINK_TRIES / 2
    dist.all_to_all_single(received, much)
    begin = time.perf_counter()
    for _ in range(3):
        dist.all_to_all_single(received, much)
    return Link(latency, 3 * 2 * LINK_FLOATS / (time.perf_counter() - begin))


def steps_of(config: TrainerConfig, world: World, steps: int) -> Measured:
    """Run and time some steps of an epoch."""
    dataset = open_dataset(config.data, verify=False)
    model_task = model_task_of(config, dataset, world)
    train_step, reader = model_task.train_step(steps), model_task.reader(TRAIN_HOLDOUT)
    train_step.model.train()
    order, collate = reader.order(config, epoch=0), model_task.collate(TRAIN_HOLDOUT, 1)
    batches = reader.epoch(order, collate, start=0, global_rank=world.global_rank, world_size=world.size)
    seconds, targets, rows, shared = _timed_steps(train_step, Prefetch(batches), steps)
    table = max(train_step.tables.values(), key=lambda table: table.vector.numel())
    merging = measure_merging(table)
    return Measured(
        seconds=seconds,
        targets=targets,
        own_rows=rows,
        shared_rows=shared,
        row_bytes=4 * (table.vector.shape[1] + bool(table.bias.numel())),
        state_bytes=4 * table.state_rows(torch.zeros(1, dtype=torch.int64)).shape[1],
        sum_seconds=merging[0],
        put_seconds=merging[1],
        take_seconds=merging[2],
        draw_seconds=measure_drawing(table.dimension),
        dense_bytes=sum(p.numel() * 4 for p in train_step.model.parameters()),
        resident=psutil.Process().memory_info().rss,
    )


def _timed_steps(train_step: TrainStep, batches: Iterable[Any], steps: int) -> tuple[float, float, float, float]:
    """Mean seconds of a step after warm-up, and mean counts of its targets, read rows and shared rows."""
    rows, shared, targets, begin, taken = [], [], [], time.perf_counter(), 0
    for batch in batches:
        if taken == WARM_STEPS:
            begin = time.perf_counter()
        objective: Any = train_step.objective
        _, weights = train_step.step([batch.data], taken)
        if taken < WARM_STEPS:  # outside the timed steps
            candidates = objective.candidates(batch.data, taken)
            shared.append(_distinct(objective.shared(candidates)))
            rows.append(_distinct(objective.lookup_ids(batch.data, candidates)) - shared[-1])
        targets.append(float(weights[0]))
        taken += 1
        if taken == WARM_STEPS + steps:
            break
    seconds = (time.perf_counter() - begin) / max(1, taken - WARM_STEPS)
    return seconds, float(np.mean(targets)), float(np.mean(rows)), float(np.mean(shared))


def _distinct(ids: dict[str, torch.Tensor]) -> int:
    return sum(len(torch.unique(values)) for values in ids.values())


def measure_drawing(dimension: int) -> float:
    """Seconds per normal random number, as drawn to initialise a table."""
    begin = time.perf_counter()
    drawn_rows(DRAWN_ROWS, dimension, torch.Generator().manual_seed(0), FULL_TABLE)
    return (time.perf_counter() - begin) / (DRAWN_ROWS * dimension)


def measure_merging(table: SparseTable) -> tuple[float, float, float]:
    """Seconds per row to merge rows at their owner (index, order, add), to copy rows, and to read them.

    Reading rows of a sharded table is a lookup at the owner plus a reordering by the worker that reads.
    """
    random = torch.Generator().manual_seed(0)
    shard = table.shard
    drawn = [torch.randint(1, table.n_rows, (MERGED_ROWS // 2,), generator=random) for _ in range(2)]
    drawn = [ids[ids % shard.size == shard.rank].unique() for ids in drawn]
    ids, received = torch.cat(drawn), [len(part) for part in drawn]
    state = table.state_rows(ids)
    begin = time.perf_counter()
    for _ in range(MERGE_TRIES):
        owned, owned_index = torch.unique(ids, return_inverse=True)
        sum_by_sender(owned_index, state, received, len(owned))
    middle = time.perf_counter()
    for _ in range(MERGE_TRIES):
        table.load_state_rows(ids, state)
    end = time.perf_counter()
    for _ in range(MERGE_TRIES):
        values = table.values(owned)[owned_index]
        torch.empty_like(values).index_copy_(0, torch.arange(len(ids)), values)
    read = time.perf_counter()
    n_rows = MERGE_TRIES * max(1, len(ids))
    return (middle - begin) / n_rows, (end - middle) / n_rows, (read - end) / n_rows
