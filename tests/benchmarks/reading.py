"""The cost of decoding complete windows on each worker: seconds of a window against those of a worker's steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from etl.dataset import TRAIN_HOLDOUT, open_dataset
from tests.benchmarks.models import twin
from tests.benchmarks.rates import CPU
from trainer.config import TrainerConfig
from trainer.data.order import Order, share
from trainer.distributed.world import World
from trainer.prepare import resolve_config
from trainer.program_configs import PlanConfig
from trainer.step_cost import messages
from trainer.task.registry import model_task_of

WORKERS = (1, 2, 4, 8, 16, 32, 64)
BATCHES = (512, 8_192, 65_536)
STEPS, WARM = 24, 2
SECONDS = 4.0
"""Time limit for the steps of one number of workers; at least three steps are run."""
MATTERS = 0.05
"""Share of a step above which dividing the decoding among workers would pay off."""


@dataclass(frozen=True)
class Window:
    """CPU seconds of one worker for a window of row groups, with any number of workers.

    Attributes:
        groups, sessions, steps: row groups, sessions, and global batches that they are cut into.
        decode: to read the row groups.
        cut: to shuffle, sort and cut the sessions into batches.
        step: to collate and compute the first worker's share of a step, by number of workers; without exchange.
    """

    groups: int
    sessions: int
    steps: int
    decode: float
    cut: float
    step: dict[int, float]

    def decode_share(self, workers: int, latency: float = 0.0) -> float:
        """Share of decoding in a step, which includes collating, computing and waiting for messages of this latency."""
        a_step = self.decode / self.steps
        return a_step / (a_step + self.cut / self.steps + self.step[workers] + messages(workers) * latency)

    def earliest(self) -> float:
        """Number of workers at which decoding is `MATTERS` of a step, if all but decoding is divided among them."""
        return MATTERS / (1 - MATTERS) * (self.step[1] + self.cut / self.steps) * self.steps / self.decode


def processor_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """CPU seconds of one call, the minimum of several, so that other programs on the machine do not matter."""
    rounds = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        rounds.append(time.process_time() - begin)
    return min(rounds)


def measure_window(config: TrainerConfig) -> Window:
    """Measure the first window of an epoch."""
    dataset = open_dataset(config.data, verify=False)
    model_task, options = model_task_of(config, dataset, World(0, 1, CPU)), config.train
    train_step, reader = model_task.train_step(1), model_task.reader(TRAIN_HOLDOUT)
    train_step.model.train()
    collate = model_task.collate(TRAIN_HOLDOUT, 1)
    fingerprint = dataset.manifest.fingerprint
    order = Order(reader.group_rows, config.seed, 0, fingerprint, options.batch_tokens, options.shuffle_buffer_sessions)
    groups = next(order.windows())
    targets = np.concatenate([reader.targets(group) for group in groups])
    window, batches = reader.read(groups), order.batches(0, targets)
    seconds = {}
    for workers in WORKERS:
        rounds = []
        for number in range(WARM + STEPS):
            batch = batches[number % len(batches)]
            begin = time.process_time()
            train_step.step([collate(window, share(batch, 0, workers), batch)], number)
            rounds.append(time.process_time() - begin)
            if len(rounds) > WARM and sum(rounds) > SECONDS:
                break
        seconds[workers] = float(np.median(rounds[WARM:]))
    decode = processor_seconds(lambda: reader.read(groups))
    cut = processor_seconds(lambda: order.batches(0, targets))
    return Window(len(groups), len(window), len(batches), decode, cut, seconds)


def reading() -> None:
    """One line per model and batch: seconds of a window, and the share of decoding in a step by number of workers."""
    torch.set_num_threads(1)
    data, latency = twin(0.5), PlanConfig.latency_us / 1e6
    print("QB-video twin, recipe=medium, one thread, processor seconds; a step: collating and computing its share")
    print("| model | target clicks a step | row groups, sessions, steps of a window | decode, ms | cut, ms | ", end="")
    print(" | ".join(f"step of {w}, ms" for w in WORKERS) + " | ", end="")
    print(
        " | ".join(f"decode of {w}" for w in WORKERS)
        + f" | of 64, {latency * 1e6:.0f} us a message | 5 % at the earliest with |"
    )
    print("|---" * (7 + 2 * len(WORKERS)) + "|")
    for model in ("gru4rec", "hybrid"):
        for tokens in BATCHES:
            line = [f"data={data}", "output=unused", "recipe=medium", f"model={model}", f"train.batch_tokens={tokens}"]
            window = measure_window(resolve_config([*line, "ray.workers=0"])[0])
            cells = [model, f"{tokens:,}", f"{window.groups}, {window.sessions:,}, {window.steps}"]
            cells += [f"{1000 * s:.1f}" for s in (window.decode, window.cut, *window.step.values())]
            cells += [f"{window.decode_share(w):.1%}" for w in WORKERS]
            cells += [f"{window.decode_share(64, latency):.1%}", f"{window.earliest():.0f} workers"]
            print("| " + " | ".join(cells) + " |", flush=True)
