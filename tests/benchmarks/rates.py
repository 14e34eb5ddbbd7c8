"""Rates of the three programs, each beside a limit or a peer measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from retrieval.index import Catalogue, build_index
from trainer.config import TrainerConfig
from trainer.data.batch import Batch
from trainer.losses import fused_sum, softmax_kernel
from trainer.models.recommender import Recommender
from trainer.objective import ITEM, SessionObjective
from trainer.sparse.table import SparseTable
from trainer.step import Stepper
from trainer.world import World


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


def training(n_items: int = 100_000, tokens: int = 2_048) -> None:
    """Training steps against this machine's matrix multiplication at the softmax's shape, one core."""
    torch.set_num_threads(1)
    clicks = np.random.default_rng(0).zipf(1.5, n_items).clip(max=10**6)
    print(f"{n_items:,} items, {tokens:,} target clicks a step, one core")
    rates = {}
    for model in ("gru4rec", "hybrid"):
        config = TrainerConfig(
            data="", output="", model=model, tasks=["next"] if model == "gru4rec" else ["next", "click", "like"]
        )
        network = config.network
        table = SparseTable(
            n_items, network.dimension, generator=torch.Generator().manual_seed(0), device=torch.device("cpu")
        )
        objective = SessionObjective(config, Recommender(config), clicks)
        stepper = Stepper(config, objective, {ITEM: table}, 1, World.alone())
        stepper.model.train()
        batch = random_batch(tokens, 27, n_items, len(config.tasks) - 1)
        step = iter(range(10**9))
        seconds = timed(lambda stepper=stepper, batch=batch, step=step: stepper.step([batch], next(step)), 10)
        parts = objective.model.flops(candidates=config.train.negatives, dimension=network.dimension, clicks=14)
        flops = 3 * sum(parts.values()) * tokens
        rates[model] = tokens / seconds
        a, b = torch.randn(tokens, network.dimension), torch.randn(network.dimension, config.train.negatives)
        limit = 2 * a.numel() * b.shape[1] / timed(lambda a=a, b=b: a @ b, 20)
        print(
            f"{model}: {rates[model]:,.0f} events/s, {flops / seconds / 1e9:.1f} GFLOP/s, "
            f"{flops / seconds / limit:.0%} of the matrix product's {limit / 1e9:.1f}"
        )
    print(f"hybrid / gru4rec: {rates['hybrid'] / rates['gru4rec']:.2f}")
    query, vector = torch.randn(tokens, 64, requires_grad=True), torch.randn(2_048, 64, requires_grad=True)
    ids, bias = torch.randint(0, 2_048, (tokens,)), torch.zeros(2_048)
    plain = timed(lambda: torch.nn.functional.cross_entropy(query @ vector.t(), ids, reduction="sum").backward(), 5)
    fused = timed(
        lambda: fused_sum(
            softmax_kernel, query, vector[ids], bias[ids], vector, bias, ids, torch.arange(2_048)
        ).backward(),
        5,
    )
    print(f"fused softmax: {plain / fused:.2f} × torch cross_entropy, forward and backward")


def random_batch(tokens: int, length: int, n_items: int, tasks: int) -> Batch:
    """Sessions of one length, with two feedback rows a click where there are feedback tasks."""
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
    """Exact search, rescoring included, against a full product and top-k in torch, all cores."""
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
