"""Cost model of a training step with N workers, from steps measured on this machine.

One worker takes steps of two sizes: that of the run, and the share of one of many workers. What merging rows costs is
measured too; what workers send is worked out, and its time from the network's speed and latency. Two workers on this
machine check the plan.
"""

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
from trainer.config import TrainerConfig, from_plain
from trainer.data.order import Order
from trainer.data.prefetch import Prefetch
from trainer.distributed.row_exchange import sum_by_sender
from trainer.distributed.world import World
from trainer.memory_plan import MemoryPlan
from trainer.models.embedding_table import DRAWN_ROWS, FULL_TABLE, SparseTable, drawn_rows
from trainer.plan import PlanConfig
from trainer.task.registry import model_task_of
from trainer.training.step import TrainStep

WARM_STEPS = 3
PLANNED = (8, 64, 512)
"""Numbers of workers in each plan."""
EFFICIENT = 0.6
MOST_DOUBLINGS = 12
ID_BYTES = 4
LINK_FLOATS, LINK_TRIES = 1 << 20, 100
MERGED_ROWS, MERGE_TRIES = 8192, 5


@dataclass(frozen=True)
class Measured:
    """Measurements of one worker; rows are those of all tables together.

    Attributes:
        seconds: of a step, the mean.
        targets: target clicks of a step, over all workers of the measurement.
        own_rows: rows that this worker reads and that not all read.
        shared_rows: rows that all workers read.
        row_bytes: of a row's gradient.
        state_bytes: of a row with its optimiser state.
        sum_seconds, put_seconds: for a row that an owner adds up, and one that is taken over from its owner.
        take_seconds: for a row of a sharded table that is read from its owner.
        draw_seconds: for a number of a table's first vectors.
        dense_bytes: of the networks' gradients.
        resident: bytes of the process.
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
    """Between two workers: seconds for a message, and bytes a second."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Cost:
    """Seconds of a step by cause."""

    compute: float
    merge: float
    network: float
    latency: float
    received: float
    """Bytes that a worker receives."""

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.compute + self.merge + self.network + self.latency


@dataclass(frozen=True)
class StepModel:
    """Seconds of a step of any size on any number of workers, from one worker's steps of two sizes.

    Computing is a fixed part and one by target; the rows of a step grow with a power of its targets.
    """

    small: Measured
    large: Measured
    sharded: bool = False

    def compute(self, targets: float) -> float:
        """Seconds that one worker takes for its share of a step."""
        by_target = max(0.0, self.large.seconds - self.small.seconds) / (self.large.targets - self.small.targets)
        return max(0.0, self.large.seconds - by_target * (self.large.targets - targets))

    def own_rows(self, targets: float) -> float:
        """Distinct rows of a share of a step, without the shared ones."""
        growth = math.log(max(1.0, self.large.own_rows) / max(1.0, self.small.own_rows))
        power = growth / math.log(self.large.targets / self.small.targets)
        return self.large.own_rows * float((targets / self.large.targets) ** min(1.0, max(0.0, power)))

    def cost(self, targets: float, workers: int, link: Link) -> Cost:
        """Seconds of a step of `targets` target clicks."""
        share = targets / workers
        if workers == 1:
            return Cost(self.compute(share), 0.0, 0.0, 0.0, 0.0)
        own, union = self.own_rows(share), self.own_rows(targets) + self.large.shared_rows
        read = own + self.large.shared_rows
        if self.sharded:
            merge = read * (self.large.sum_seconds + self.large.take_seconds)
            received = sharded_bytes(self.large, own, workers)
        else:
            merge = read * self.large.sum_seconds + union * self.large.put_seconds
            received = received_bytes(self.large, own, union, workers)
        network, latency = received / link.bandwidth, messages(workers) * link.latency
        return Cost(self.compute(share), merge, network, latency, received)

    def efficiency(self, targets: float, workers: int, link: Link) -> float:
        """Of W workers: one worker's time over W times theirs."""
        return self.compute(targets) / (workers * self.cost(targets, workers, link).seconds)


def received_bytes(measured: Measured, own: float, union: float, workers: int) -> float:
    """Bytes that a worker receives in a step.

    Ids and gradients of the rows it owns, then all rows that the step changed with their state; the networks' gradients
    go round a ring twice.
    """
    others = (workers - 1) / workers
    gradients = own * (measured.row_bytes + ID_BYTES) + measured.shared_rows * measured.row_bytes
    return others * (gradients + union * (measured.state_bytes + ID_BYTES) + 2 * measured.dense_bytes)


def sharded_bytes(measured: Measured, own: float, workers: int) -> float:
    """The same of a sharded table: ids of the rows that it owns, the rows that it reads, gradients of those it owns."""
    rows = own * (2 * measured.row_bytes + ID_BYTES) + measured.shared_rows * 2 * measured.row_bytes
    return (workers - 1) / workers * (rows + 2 * measured.dense_bytes)


def messages(workers: int) -> int:
    """Messages that a worker waits for one after another in a step.

    Three all-to-alls (counts, ids, gradients), two all-reduces, which go round a ring twice (networks; losses, norm and
    counts), and an all-gather, or of a sharded table an all-to-all (rows).
    """
    return (3 + 2 * 2 + 1) * (workers - 1)


def plan(options: PlanConfig, config: TrainerConfig) -> list[str]:
    """The lines to print."""
    dataset = open_dataset(config.data, verify=False)
    model_task, batch = model_task_of(config, dataset, World.alone()), config.train.batch_tokens
    steps = -(-model_task.reader(TRAIN_HOLDOUT).total_targets() // batch)
    share = max(1, batch // max(options.workers, 8))
    small, large = (measure(config, options, 1, tokens)[0][0] for tokens in (share, batch))
    model = StepModel(small, large, sharded=config.train.table == "sharded")
    pair, here = measure(config, options, 2, batch)
    checked = model.cost(model.large.targets, 2, here).seconds
    actual = max(m.seconds for m in pair)
    link = Link(options.latency_us / 1e6, options.network_gbit / 8 * 1e9)
    memory = MemoryPlan.of(config, model_task.train_step(1), model.large.resident, dataset.manifest.n_items)
    items = options.items or dataset.manifest.n_items
    lines = [
        f"{config.model}: {dataset.manifest.counts.get('sessions', 0):,} sessions, {dataset.manifest.n_items:,} items",
        f"measured here: one worker with {options.cores} core(s), {options.measured_steps} steps of "
        f"{model.small.targets:,.0f} and of {model.large.targets:,.0f} target clicks",
        f"between two workers here: {here.latency * 1e6:,.0f} us a message, {here.bandwidth * 8 / 1e9:,.1f} Gbit/s; "
        f"planned: {options.latency_us:,.0f} us, {options.network_gbit:,.1f} Gbit/s",
        f"check: two workers here take {actual:.4f} s, by this plan {checked:.4f} s ({checked / actual - 1:+.0%})",
        "",
        *(f"{name:<44}{value:>16}" for name, value in memory.lines(items, options.workers, model.large.draw_seconds)),
        "",
        f"{'target clicks of a step (train.batch_tokens)':<44}{batch:>16,}",
        f"{'steps an epoch':<44}{steps:>16,}",
        "",
        f"{'workers':>7}{'compute':>10}{'merge':>10}{'network':>10}{'latency':>10}{'s a step':>10}{'MB in':>8}"
        f"{'events/s':>12}{'efficiency':>12}{'h an epoch':>12}{'GiB each':>10}",
    ]
    for workers in sorted({1, *PLANNED, options.workers}):
        cost = model.cost(batch, workers, link)
        columns = "".join(f"{s:>10.4f}" for s in (cost.compute, cost.merge, cost.network, cost.latency, cost.seconds))
        lines.append(
            f"{workers:>7}{columns}{cost.received / 1e6:>8.2f}{batch / cost.seconds:>12,.0f}"
            f"{model.efficiency(batch, workers, link):>12.1%}{steps * cost.seconds / 3600:>12.3f}"
            f"{memory.bytes(items, workers) / 2**30:>10.2f}"
        )
    return [*lines, "", efficient_batch(model, batch, options.workers, link)]


def efficient_batch(model: StepModel, batch: int, workers: int, link: Link) -> str:
    """From which step on the workers are used well: the batch is doubled until they are."""
    for doublings in range(MOST_DOUBLINGS):
        tokens = batch << doublings
        if model.efficiency(tokens, workers, link) >= EFFICIENT:
            return f"{workers} workers are {EFFICIENT:.0%} efficient from about {tokens:,} target clicks a step on"
    limit = model.efficiency(batch << MOST_DOUBLINGS, workers, link)
    return f"{workers} workers are at most {limit:.0%} efficient, with however many target clicks a step"


def measure(config: TrainerConfig, options: PlanConfig, workers: int, tokens: int) -> tuple[list[Measured], Link]:
    """Take steps of `tokens` target clicks with some workers here; each one's finding, and the link between them."""
    small = replace(config, train=replace(config.train, batch_tokens=tokens))
    with tempfile.TemporaryDirectory() as folder:
        arguments = (workers, small.plain(), options.measured_steps, options.cores, folder)
        spawn(_work, arguments, nprocs=workers)
        measured = [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(workers)]
    return [Measured(**steps) for steps, _ in measured], Link(**measured[0][1])


def _work(rank: int, size: int, settings: dict[str, Any], steps: int, cores: int, folder: str) -> None:
    torch.set_num_threads(cores)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    result = steps_of(from_plain(settings), World(rank, size, torch.device("cpu")), steps)
    link = measure_link() if size > 1 else Link(0.0, math.inf)
    (Path(folder) / str(rank)).write_text(json.dumps([asdict(result), asdict(link)]))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def measure_link() -> Link:
    """The link between two workers: small sums, and a long exchange."""
    little, much = torch.zeros(1), torch.zeros(LINK_FLOATS)
    result = torch.empty_like(much)
    for _ in range(LINK_TRIES):  # the first ones connect
        dist.all_reduce(little)
    begin = time.perf_counter()
    for _ in range(LINK_TRIES):
        dist.all_reduce(little)
    latency = (time.perf_counter() - begin) / LINK_TRIES / 2
    dist.all_to_all_single(result, much)
    begin = time.perf_counter()
    for _ in range(3):
        dist.all_to_all_single(result, much)
    return Link(latency, 3 * 2 * LINK_FLOATS / (time.perf_counter() - begin))


def steps_of(config: TrainerConfig, world: World, steps: int) -> Measured:
    """Take some steps of an epoch, and the time."""
    dataset = open_dataset(config.data, verify=False)
    model_task = model_task_of(config, dataset, world)
    train_step, reader = model_task.train_step(steps), model_task.reader(TRAIN_HOLDOUT)
    train_step.model.train()
    options = config.train
    fingerprint = dataset.manifest.fingerprint
    order = Order(reader.group_rows, config.seed, 0, fingerprint, options.batch_tokens, options.shuffle_buffer_sessions)
    batches = reader.epoch(
        order, model_task.collate(TRAIN_HOLDOUT, 1), start=0, global_rank=world.global_rank, world_size=world.size
    )
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
    """Seconds of a step after the warm-up; means of its targets, of rows that it reads and of shared rows."""
    rows, shared, targets, begin, taken = [], [], [], time.perf_counter(), 0
    for batch in batches:
        if taken == WARM_STEPS:
            begin = time.perf_counter()
        objective: Any = train_step.objective
        _, weights = train_step.step([batch.data], taken)
        if taken < WARM_STEPS:  # not while the time is taken
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
    """Seconds for each of the normal numbers that a table begins with."""
    begin = time.perf_counter()
    drawn_rows(DRAWN_ROWS, dimension, torch.Generator().manual_seed(0), FULL_TABLE)
    return (time.perf_counter() - begin) / (DRAWN_ROWS * dimension)


def measure_merging(table: SparseTable) -> tuple[float, float, float]:
    """Seconds a row for what an owner does with rows of others (index, order, add), for taking rows over, for reading.

    To read rows of a sharded table their owner looks them up in the order of who asks, and these put them in theirs.
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
        table.put_state_rows(ids, state)
    end = time.perf_counter()
    for _ in range(MERGE_TRIES):
        values = table.values(owned)[owned_index]
        torch.empty_like(values).index_copy_(0, torch.arange(len(ids)), values)
    read = time.perf_counter()
    n_rows = MERGE_TRIES * max(1, len(ids))
    return (middle - begin) / n_rows, (end - middle) / n_rows, (read - end) / n_rows
