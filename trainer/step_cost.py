"""What an epoch takes with some number of workers, from steps measured here.

As many workers as this machine has cores take steps of the size that each of `workers` would take, with the exchange
between them. What more workers send each other is added by the speed of the network between them.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from etl.dataset import open_dataset
from trainer.config import TrainerConfig, from_plain
from trainer.data.order import Order
from trainer.data.prefetch import Prefetch
from trainer.distributed.world import World
from trainer.plan import PlanConfig
from trainer.task.base import TRAIN_HOLDOUT
from trainer.task.registry import family_of
from trainer.training.step import TrainStep

WARM_STEPS = 3


@dataclass(frozen=True)
class Measured:
    """What one worker of the measurement found.

    Attributes:
        seconds: of a step, the mean.
        targets: target clicks of a step, over all workers of the measurement.
        rows: rows of all tables that this worker's share of a step touches.
        row_bytes: bytes of a row's id and gradient.
        dense_bytes: of the networks' gradients.
        resident: bytes of the process.
    """

    seconds: float
    targets: float
    rows: float
    row_bytes: int
    dense_bytes: int
    resident: int


def plan(options: PlanConfig, config: TrainerConfig) -> list[str]:
    """The lines to print."""
    dataset = open_dataset(config.data, verify=False)
    here = max(1, min(options.workers, (os.cpu_count() or 1) // options.cores))
    measured = measure(config, options, here)
    family = family_of(config, dataset, World.alone())
    steps = -(-family.reader(TRAIN_HOLDOUT).total_targets() // config.train.batch_tokens)
    result = measured[0]
    sent = exchanged(result, options.workers)
    beyond = max(0.0, sent - exchanged(result, here)) / (options.network_gbit / 8 * 1e9)
    seconds = max(m.seconds for m in measured) + beyond
    memory = memory_parts(config, family.train_step(1), result)
    rate = config.train.batch_tokens / seconds
    return [
        f"{config.model}: {dataset.manifest.counts.get('sessions', 0):,} sessions, {dataset.manifest.n_items:,} items",
        f"measured here: {here} workers with {options.cores} core(s) each, {options.measured_steps} steps, "
        f"{result.targets / here:,.0f} target clicks of a worker",
        "",
        *(f"{name:<44}{value:>16}" for name, value in memory),
        "",
        f"{'steps an epoch':<44}{steps:>16,}",
        f"{'bytes a worker receives a step':<44}{sent:>16,.0f}",
        f"{'seconds a step: measured + network':<44}{seconds - beyond:>9.3f} + {beyond:.3f}",
        f"{'events/s, all workers':<44}{rate:>16,.0f}",
        f"{'hours an epoch':<44}{steps * seconds / 3600:>16.2f}",
        f"{'worker hours an epoch':<44}{steps * seconds / 3600 * options.workers:>16.1f}",
    ]


def exchanged(found: Measured, workers: int) -> float:
    """Bytes that a worker receives in a step: all others' rows, and its part of the ring that sums dense gradients."""
    others = workers - 1
    return others * found.rows * found.row_bytes + 2 * found.dense_bytes * others / workers


def memory_parts(config: TrainerConfig, train_step: TrainStep, found: Measured) -> list[tuple[str, str]]:
    """Parameters and memory of a worker, by part."""
    parts, known = [], 0
    for name, table in train_step.tables.items():
        tensors = table.tensors()
        for what, names in (("table", ("vector", "bias")), ("optimiser state", ("vector_state", "bias_state"))):
            size = sum(tensors[n].numel() * tensors[n].element_size() for n in names)
            known += size
            parts.append((f"{name} {what}", f"{size / 2**20:,.0f} MiB"))
    networks = sum(p.numel() for p in train_step.model.parameters())
    states = 2 if config.train.optimizer == "adagrad" else 3
    known += 4 * networks * (1 + states)
    parts.append(("networks with gradients and optimiser", f"{4 * networks * (1 + states) / 2**20:,.1f} MiB"))
    rest = max(0, found.resident - known)
    parts.append(("sessions read ahead, batches, libraries", f"{rest / 2**20:,.0f} MiB"))
    parts.append(("memory of a worker (measured)", f"{found.resident / 2**20:,.0f} MiB"))
    parts.append(("… the first one, while it copies a checkpoint", f"{(found.resident + known) / 2**20:,.0f} MiB"))
    total = sum(table.parameters() for table in train_step.tables.values()) + networks
    return [("parameters", f"{total:,}"), *parts]


def measure(config: TrainerConfig, options: PlanConfig, here: int) -> list[Measured]:
    """Take steps with `here` workers, each with the share that one of `options.workers` has."""
    tokens = max(1, config.train.batch_tokens * here // options.workers)
    small = replace(config, train=replace(config.train, batch_tokens=tokens))
    with tempfile.TemporaryDirectory() as folder:
        arguments = (here, small.plain(), options.measured_steps, options.cores, folder)
        spawn(_work, arguments, nprocs=here)
        return [Measured(**json.loads((Path(folder) / str(rank)).read_text())) for rank in range(here)]


def _work(rank: int, size: int, settings: dict[str, Any], steps: int, cores: int, folder: str) -> None:
    torch.set_num_threads(cores)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    result = steps_of(from_plain(settings), World(rank, size, torch.device("cpu")), steps)
    (Path(folder) / str(rank)).write_text(json.dumps(asdict(result)))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def steps_of(config: TrainerConfig, world: World, steps: int) -> Measured:
    """Take some steps of an epoch, and the time."""
    dataset = open_dataset(config.data, verify=False)
    family = family_of(config, dataset, world)
    train_step, reader = family.train_step(steps), family.reader(TRAIN_HOLDOUT)
    train_step.model.train()
    options = config.train
    fingerprint = dataset.manifest.fingerprint
    order = Order(reader.group_rows, config.seed, 0, fingerprint, options.batch_tokens, options.shuffle_buffer_sessions)
    batches = reader.epoch(
        order, family.collate(TRAIN_HOLDOUT, 1), start=0, global_rank=world.global_rank, world_size=world.size
    )
    rows, targets, begin, taken = [], [], time.perf_counter(), 0
    for batch in Prefetch(batches):
        if taken == WARM_STEPS:
            begin = time.perf_counter()
        objective: Any = train_step.objective
        _, weights = train_step.step([batch.data], taken)
        if taken < WARM_STEPS:  # not while the time is taken
            wanted = objective.wanted(batch.data, objective.candidates(batch.data, taken))
            rows.append(sum(len(torch.unique(ids)) for ids in wanted.values()))
        targets.append(float(weights[0]))
        taken += 1
        if taken == WARM_STEPS + steps:
            break
    row = max(table.vector.shape[1] + bool(table.bias.numel()) for table in train_step.tables.values())
    dense = sum(p.numel() * 4 for p in train_step.model.parameters())
    return Measured(
        seconds=(time.perf_counter() - begin) / max(1, taken - WARM_STEPS),
        targets=float(np.mean(targets)),
        rows=float(np.mean(rows)),
        row_bytes=4 * row + 8,
        dense_bytes=dense,
        resident=psutil.Process().memory_info().rss,
    )
