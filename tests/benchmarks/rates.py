"""Rates of the three programs, each compared with a limit or a peer measured in the same run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import torch

from retrieval.search.index import Catalogue, build_index
from trainer.config import TrainerConfig
from trainer.data.batch import Batch
from trainer.distributed.world import World
from trainer.models.embedding_table import SparseTable
from trainer.models.recommender import Recommender
from trainer.option_groups import TrainOptions
from trainer.prepare import resolve_config
from trainer.program_configs import PlanConfig
from trainer.step_measurement import measure, steps_of
from trainer.training.losses import fused_sum, softmax_kernel
from trainer.training.objective import ITEM, SessionObjective
from trainer.training.step import TrainStep


def timed(work: Callable[[], object], repeats: int) -> float:
    """Seconds of one call, the best of three rounds."""
    work()
    rounds = []
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(repeats):
            work()
        rounds.append((time.perf_counter() - begin) / repeats)
    return min(rounds)


STEPS = 15
"""Number of steps measured by `workers`."""
SIZES = {"gru4rec": ["next"], "hybrid": ["next", "click", "like", "share", "follow"]}


CPU = torch.device("cpu")


def make_step(
    model: str, n_items: int, tokens: int, length: int, device: torch.device = CPU, precision: str = "float32"
) -> tuple[TrainStep, Batch]:
    """A `TrainStep` of a model and a batch of sessions of one length."""
    clicks = np.random.default_rng(0).zipf(1.5, n_items).clip(max=10**6)
    options = TrainOptions(precision=precision)
    config = TrainerConfig(data="", output="", model=model, tasks=SIZES[model], train=options)
    table = SparseTable(
        n_items, config.network.embedding_dim, generator=torch.Generator().manual_seed(0), device=device
    )
    objective = SessionObjective(config, Recommender(config), clicks)
    train_step = TrainStep(config, objective, {ITEM: table}, 1, World(0, 1, device))
    train_step.model.train()
    return train_step, random_batch(tokens, length, n_items, len(config.tasks) - 1)


def events_per_second(
    model: str, n_items: int, tokens: int, length: int, device: torch.device = CPU, precision: str = "float32"
) -> tuple[float, float]:
    """Target clicks and FLOPs per second of training steps, including the transfer of batches to the device."""
    train_step, batch = make_step(model, n_items, tokens, length, device, precision)
    step = iter(range(10**9))

    def work() -> None:
        train_step.step([batch], next(step))
        finish(device)

    seconds = timed(work, 3)
    options = train_step.config
    assert isinstance(train_step.model, Recommender)
    flops = train_step.model.flops(
        candidates=options.train.negatives, embedding_dim=options.network.embedding_dim, clicks=14
    )
    events = int((batch.targets > 0).sum())
    return events / seconds, 3 * sum(flops.values()) * events / seconds


def finish(device: torch.device) -> None:
    """Wait for all work queued on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training(small: int = 100_000, full: int = 3_753_436, sessions: int = 512, length: int = 30) -> None:
    """Training steps on one core: share of the matrix product, cost of the catalogue, cost of many tasks."""
    torch.set_num_threads(1)
    tokens = sessions * length
    print(f"{sessions} sessions of {length} target clicks a step, dimension 64, 2,048 negatives, one core")
    a, b = torch.randn(tokens, 64), torch.randn(64, 2048)
    limit = 2 * a.numel() * b.shape[1] / timed(lambda: a @ b, 5)
    rates = {}
    for model, n_items in (("gru4rec", small), ("gru4rec", full), ("hybrid", full)):
        rates[model, n_items], flops = events_per_second(model, n_items, tokens, length)
        print(
            f"{model}, {n_items:,} items: {rates[model, n_items]:,.0f} events/s, {flops / 1e9:.1f} GFLOP/s, "
            f"{flops / limit:.0%} of the matrix product's {limit / 1e9:.1f} (wanted 60 %)",
            flush=True,
        )
    print(f"full / small catalogue: {rates['gru4rec', full] / rates['gru4rec', small]:.2f} (wanted 0.8)")
    print(f"hybrid / gru4rec: {rates['hybrid', full] / rates['gru4rec', full]:.2f} (wanted 0.5)")
    query, vector = torch.randn(2_048, 64, requires_grad=True), torch.randn(2_048, 64, requires_grad=True)
    ids, bias = torch.randint(0, 2_048, (2_048,)), torch.zeros(2_048)
    plain = timed(lambda: torch.nn.functional.cross_entropy(query @ vector.t(), ids, reduction="sum").backward(), 5)
    every = torch.arange(2_048)
    fused = timed(
        lambda: fused_sum(softmax_kernel, query, vector[ids], bias[ids], vector, bias, ids, every).backward(), 5
    )
    print(f"fused softmax: {plain / fused:.2f} × torch cross_entropy, forward and backward")


def workers() -> None:
    """Two workers on two cores against one on one, including exchange and reading, on `NEXTCLICK_LARGE`'s dataset.

    They are compared with two that exchange nothing: the limit of two cores of this machine that share its memory.
    """
    named = os.environ.get("NEXTCLICK_LARGE", "")
    if ":" not in named:
        print("NEXTCLICK_LARGE=RUN:DATA names no dataset: nothing to do")
        return
    options = [f"data={named.split(':')[1]}", "output=unused", "recipe=large", "ray.workers=0"]
    for model in ("gru4rec", "hybrid"):
        config, _ = resolve_config([*options, f"model={model}"])
        half = replace(config, train=replace(config.train, batch_tokens=config.train.batch_tokens // 2))
        alone, apart = sum(independent(config, [0])), sum(independent(half, [0, 1]))
        asked = PlanConfig(data="", model="", measured_steps=STEPS)
        actual, _ = measure(config, asked, 2, config.train.batch_tokens)
        together = actual[0].targets / max(m.seconds for m in actual)
        for name, rate in (("one worker", alone), ("two that exchange nothing", apart), ("two workers", together)):
            print(f"{model}, {name}: {rate:,.0f} events/s", flush=True)
        print(
            f"{model}: two / one {together / alone:.2f} (wanted 1.7; the machine gives {apart / alone:.2f}), "
            f"{actual[0].resident / 2**30:.2f} GiB a worker (limit 3)"
        )


def independent(config: TrainerConfig, cores: list[int]) -> list[float]:
    """Events per second of independent workers that run at the same time, each on its core."""
    with get_context("spawn").Pool(len(cores), maxtasksperchild=1) as pool:
        return pool.starmap(_pinned, [(config, core) for core in cores], chunksize=1)


def _pinned(config: TrainerConfig, core: int) -> float:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    actual = steps_of(config, World(0, 1, CPU), STEPS)
    return actual.targets / actual.seconds


def random_batch(tokens: int, length: int, n_items: int, tasks: int) -> Batch:
    """Sessions of one length, with two feedback rows per click if there are feedback tasks."""
    rng = np.random.default_rng(1)
    sessions = tokens // length
    item = torch.from_numpy(rng.integers(1, n_items + 1, (sessions, length + 1)))
    rows = 2 * sessions * length if tasks else 0
    return Batch(
        item[:, :-1].contiguous(),
        item[:, 1:].contiguous(),
        torch.zeros(sessions, 2, dtype=torch.long),
        torch.arange(rows) // 2,
        torch.from_numpy(rng.integers(1, n_items + 1, rows)),
        torch.from_numpy(rng.integers(0, 2, (rows, tasks)).astype(np.float32)),
    )


def search(n_items: int = 200_000, dimension: int = 65, n_queries: int = 2_000) -> None:
    """Exact search, including rescoring, against a full product and top-k in torch, on all cores."""
    torch.set_num_threads(torch.get_num_threads())
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(n_items, dimension)).astype(np.float32)
    query = rng.normal(size=(n_queries, dimension)).astype(np.float32)
    index = build_index("flat", Catalogue(np.arange(1, n_items + 1, dtype=np.int32), vectors))
    ours = timed(lambda: index.search(query, 21), 1)
    q, v = torch.from_numpy(query), torch.from_numpy(vectors)
    theirs = timed(lambda: [torch.topk(q[i : i + 256] @ v.t(), 21) for i in range(0, n_queries, 256)], 1)
    print(
        f"{n_items:,} items × {dimension}: exact {n_queries / ours:,.0f} queries/s, "
        f"{theirs / ours:.2f} × torch product and top-k ({n_queries / theirs:,.0f})"
    )
