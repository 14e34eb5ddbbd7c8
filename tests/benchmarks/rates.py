"""Rates of the three programs, each beside a limit or a peer measured in the same run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from etl.config import SparkOptions, load
from etl.sessions import build
from etl.spark import spark_session
from retrieval.index import Catalogue, build_index
from trainer.config import TrainerConfig
from trainer.data.batch import Batch
from trainer.losses import softmax_sum
from trainer.models.recommender import Recommender
from trainer.sparse.table import ItemTable
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
        table = ItemTable(
            n_items, network.dimension, generator=torch.Generator().manual_seed(0), device=torch.device("cpu")
        )
        stepper = Stepper(config, Recommender(config), table, clicks, World.alone())
        stepper.model.train()
        batch = random_batch(tokens, 27, n_items, len(config.tasks) - 1)
        step = iter(range(10**9))
        seconds = timed(lambda stepper=stepper, batch=batch, step=step: stepper.step(batch, next(step)), 10)
        flops = 3 * sum(stepper.model.flops(config.train.negatives, network.dimension).values()) * tokens
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
        lambda: softmax_sum(query, vector[ids], bias[ids], vector, bias, ids, torch.arange(2_048)).backward(), 5
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


def sessionizing(rows: int = 4_000_000) -> None:
    """Clicks-only sessions by the job and by plain Spark SQL on the same file and session."""
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "log.csv"
        random_log(log, rows)
        with spark_session(SparkOptions(), Path(name) / "spark") as spark:
            options = [f"input={log}", "scenario=qk_video", "exposures=false", "shards=16", "overwrite=true"]
            ours = timed_once(lambda: build(load([*options, f"output={name}/a"])), 2)
            theirs = timed_once(lambda: plain_sql(spark, log, f"{name}/b"), 2)
        print(
            f"{rows:,} rows, clicks only: {rows / ours:,.0f} rows/s; {theirs / ours:.2f} × plain Spark SQL "
            f"({rows / theirs:,.0f}), which makes no item table, dense ids, hashes or statistics"
        )


def timed_once(work: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def plain_sql(spark, log: Path, output: str) -> None:
    """`read.csv`, `groupBy`, `sort_array(collect_list)`: what one would write first."""
    from pyspark.sql import functions as f

    frame = spark.read.csv(str(log), header=True, nullValue="\\N", inferSchema=False)
    clicks = frame.where("click = 1").select(
        f.col("user_id").cast("long"), f.col("item_id").cast("long"), f.monotonically_increasing_id().alias("place")
    )
    sessions = clicks.groupBy("user_id").agg(f.sort_array(f.collect_list(f.struct("place", "item_id"))).alias("c"))
    kept = sessions.where(f.size("c") >= 10).select("user_id", f.slice(f.col("c.item_id"), -30, 30).alias("items"))
    kept.union(sessions.where("false").select("user_id", f.col("c.item_id"))).write.mode("overwrite").parquet(output)


def random_log(path: Path, rows: int) -> None:
    """Random rows with Tenrec's header; users have about a hundred each."""
    import pyarrow as pa
    import pyarrow.csv as pa_csv

    rng = np.random.default_rng(0)
    user = np.sort(rng.integers(1, rows // 98 + 2, rows))
    item = (500_000 * rng.random(rows) ** 2.5).astype(np.int64) + 1
    click = (rng.random(rows) < 0.288).astype(np.int8)
    flags = [((rng.random(rows) < p) & (click == 1)).astype(np.int8) for p in (0.006, 0.07, 0.008)]
    names = [
        "user_id",
        "item_id",
        "click",
        "follow",
        "like",
        "share",
        "video_category",
        "watching_times",
        "gender",
        "age",
    ]
    table = pa.table([user, item, click, *flags, item * 31 % 20, click.astype(np.int16), user % 3, user % 8], names)
    pa_csv.write_csv(table, path, pa_csv.WriteOptions(quoting_style="none", quoting_header="none"))
