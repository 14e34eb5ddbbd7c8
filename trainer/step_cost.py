"""Cost model of a training step with N workers, from steps measured on this machine.

One worker runs steps of two sizes: the global batch, and the share of one of many workers. The cost of merging rows is
measured too; communication time is computed from message sizes, bandwidth and latency. Two local workers check the
model; since they share the machine's memory, two workers that do not communicate are measured as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from etl.dataset import TRAIN_HOLDOUT, Dataset, open_dataset
from etl.runtime.errors import InputError
from trainer.config import TrainerConfig
from trainer.distributed.world import World
from trainer.memory_plan import MemoryPlan
from trainer.program_configs import PlanConfig
from trainer.step_measurement import Link, Measured, measure
from trainer.task.registry import model_task_of
from trainer.training.cooccurrence import needed_bytes

PLANNED = (8, 64, 512)
"""Worker counts in each plan."""
EFFICIENT = 0.6
MAX_DOUBLINGS = 12
ID_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """Seconds of a step by component."""

    compute: float
    merge: float
    network: float
    latency: float
    received: float
    """Bytes that a worker receives."""

    @property
    def seconds(self) -> float:
        """Total seconds of the step."""
        return self.compute + self.merge + self.network + self.latency


@dataclass(frozen=True)
class StepModel:
    """Predicts the seconds of a step by size and number of workers, from one worker's steps of two sizes.

    Compute time is linear in the targets; the number of distinct rows follows a power law in the targets.
    """

    small: Measured
    large: Measured
    sharded: bool = False

    def compute(self, targets: float) -> float:
        """Compute seconds of one worker for its share of a step."""
        by_target = max(0.0, self.large.seconds - self.small.seconds) / (self.large.targets - self.small.targets)
        return max(0.0, self.large.seconds - by_target * (self.large.targets - targets))

    def own_rows(self, targets: float) -> float:
        """Number of distinct rows of a share of a step, without the shared ones."""
        growth = math.log(max(1.0, self.large.own_rows) / max(1.0, self.small.own_rows))
        power = growth / math.log(self.large.targets / self.small.targets)
        return self.large.own_rows * float((targets / self.large.targets) ** min(1.0, max(0.0, power)))

    def cost(self, targets: float, workers: int, link: Link) -> Cost:
        """Cost of a step of `targets` target clicks."""
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
        """Parallel efficiency: one worker's time over `workers` × theirs."""
        return self.compute(targets) / (workers * self.cost(targets, workers, link).seconds)


def received_bytes(measured: Measured, own: float, union: float, workers: int) -> float:
    """Bytes that a worker receives in a step.

    Ids and gradients of the rows that it owns, then all updated rows with their state; the ring all-reduce of dense
    gradients moves them twice.
    """
    others = (workers - 1) / workers
    gradients = own * (measured.row_bytes + ID_BYTES) + measured.shared_rows * measured.row_bytes
    return others * (gradients + union * (measured.state_bytes + ID_BYTES) + 2 * measured.dense_bytes)


def sharded_bytes(measured: Measured, own: float, workers: int) -> float:
    """The same with a sharded table: ids and gradients of the rows that it owns, and the rows that it reads."""
    rows = own * (2 * measured.row_bytes + ID_BYTES) + measured.shared_rows * 2 * measured.row_bytes
    return (workers - 1) / workers * (rows + 2 * measured.dense_bytes)


def messages(workers: int) -> int:
    """Number of sequential messages of a worker in a step.

    Three all-to-alls (counts, ids, gradients), two ring all-reduces of two rounds each (networks; losses, norm and
    counts), and an all-gather of rows, or with a sharded table an all-to-all.
    """
    return (3 + 2 * 2 + 1) * (workers - 1)


def plan(options: PlanConfig, config: TrainerConfig) -> list[str]:
    """The lines to print."""
    dataset = open_dataset(config.data, verify=False)
    model_task, batch = model_task_of(config, dataset, World.alone()), config.train.batch_tokens
    steps = -(-model_task.reader(TRAIN_HOLDOUT).total_targets() // batch)
    share = max(1, batch // max(options.workers, 8))
    small, large = (measure(config, options, 1, tokens)[0][0] for tokens in (share, batch))
    if small.targets >= large.targets:
        got = f"{large.targets:,.0f} {model_task.unit} in the largest step"
        raise InputError("a dataset with larger steps, to measure two sizes", got, "plan with more sessions")
    model = StepModel(small, large, sharded=config.train.table == "sharded")
    # Steps of ranking models are measured in rows: how many a target click of the batch has.
    per_click = large.targets / batch if config.is_ranking_model else 1.0
    pair, here = measure(config, options, 2, batch)
    measured_seconds = max(m.seconds for m in pair)
    checked = model.cost(model.large.targets, 2, here)
    concurrent, _ = measure(config, options, 2, max(1, batch // 2), apart=True)
    slower = max(1.0, *(m.seconds / max(model.compute(m.targets), 1e-9) for m in concurrent))
    together = checked.seconds + (slower - 1) * (checked.compute + checked.merge)
    link = Link(options.latency_us / 1e6, options.network_gbit / 8 * 1e9)
    memory = MemoryPlan.of(config, model_task.train_step(1), model.large.resident, dataset.manifest.n_items)
    items = options.items or dataset.manifest.n_items
    lines = [
        f"{config.model}: {dataset.manifest.counts.get('sessions', 0):,} sessions, {dataset.manifest.n_items:,} items",
        f"measured here: one worker with {options.cores} core(s), {options.measured_steps} steps of "
        f"{model.small.targets:,.0f} and of {model.large.targets:,.0f} target clicks",
        f"between two workers here: {here.latency * 1e6:,.0f} us a message, {here.bandwidth * 8 / 1e9:,.1f} Gbit/s; "
        f"planned: {options.latency_us:,.0f} us, {options.network_gbit:,.1f} Gbit/s",
        f"check: two workers here take {measured_seconds:.4f} s, by this plan {checked.seconds:.4f} s "
        f"({checked.seconds / measured_seconds - 1:+.0%}) on machines of their own",
        f"two that exchange nothing slow each other down by {slower - 1:.0%} here (they share its memory): with that "
        f"{together:.4f} s ({together / measured_seconds - 1:+.0%})",
        "",
        *(f"{name:<44}{value:>16}" for name, value in memory.lines(items, options.workers, model.large.draw_seconds)),
        *start_lines(config, dataset, items, memory.bytes(items, options.workers)),
        "",
        f"{'target clicks of a step (train.batch_tokens)':<44}{batch:>16,}",
        f"{'steps an epoch':<44}{steps:>16,}",
        "",
        f"{'workers':>7}{'compute':>10}{'merge':>10}{'network':>10}{'latency':>10}{'s a step':>10}{'MB in':>8}"
        f"{'events/s':>12}{'efficiency':>12}{'h an epoch':>12}{'GiB each':>10}",
    ]
    for workers in sorted({1, *PLANNED, options.workers}):
        cost = model.cost(batch * per_click, workers, link)
        columns = "".join(f"{s:>10.4f}" for s in (cost.compute, cost.merge, cost.network, cost.latency, cost.seconds))
        lines.append(
            f"{workers:>7}{columns}{cost.received / 1e6:>8.2f}{batch / cost.seconds:>12,.0f}"
            f"{model.efficiency(batch * per_click, workers, link):>12.1%}{steps * cost.seconds / 3600:>12.3f}"
            f"{memory.bytes(items, workers) / 2**30:>10.2f}"
        )
    return [*lines, "", efficient_batch(model, batch, options.workers, link, per_click=per_click)]


def start_lines(config: TrainerConfig, dataset: Dataset, items: int, resident: float) -> list[str]:
    """Memory of the worker that counts co-occurrence (`train.ppmi_start`), for a dataset with `items` items."""
    if not config.train.ppmi_start:
        return []
    clicks = dataset.manifest.counts["clicks"]
    needed = resident + needed_bytes(clicks, items, config.network.embedding_dim)
    return [f"{'… while it counts co-occurrence':<44}{f'{needed / 2**20:,.0f} MiB':>16}"]


def efficient_batch(model: StepModel, batch: int, workers: int, link: Link, *, per_click: float = 1.0) -> str:
    """The global batch at which the workers are efficient, found by doubling; `per_click` rows are a target click."""
    for doublings in range(MAX_DOUBLINGS):
        tokens = batch << doublings
        if model.efficiency(tokens * per_click, workers, link) >= EFFICIENT:
            return f"{workers} workers are {EFFICIENT:.0%} efficient from about {tokens:,} target clicks a step on"
    limit = model.efficiency((batch << MAX_DOUBLINGS) * per_click, workers, link)
    return f"{workers} workers are at most {limit:.0%} efficient, with however many target clicks a step"
