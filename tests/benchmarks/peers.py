"""Sessionizing against Polars and plain Spark SQL: the same file, the same run, the same sessions."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from etl.config import SparkOptions, load
from etl.dataset import open_dataset
from etl.engines.spark import spark_session
from etl.sessions import build

ROUNDS = 2
USERS = 818_000
"""Users of the twin, which gives 80 million rows."""


def sessionizing(users: int = USERS) -> None:
    """Our job, Polars and Spark SQL on a twin of QK-video; best of two rounds each, without starting the session."""
    with tempfile.TemporaryDirectory() as name:
        log, folder = Path(name) / "log.csv", Path(name)
        twin = ["-m", "etl.twin", f"output={log}", "scenario=qk_video", f"users={users}", "seed=3"]
        subprocess.run([sys.executable, *twin], check=True)
        options = [f"input={log}", "scenario=qk_video", "overwrite=true"]
        seconds = {
            "Polars, clicks only": best(lambda: polars_clicks(log, folder / "polars.parquet")),
            "Polars with exposures": best(lambda: polars_exposures(log, folder / "polars_exposures.parquet")),
        }
        with spark_session(SparkOptions(), folder / "spark") as spark:
            seconds["ours, clicks only"] = best(
                lambda: build(load([*options, "exposures=false", f"output={folder / 'clicks'}"]))
            )
            seconds["ours with exposures"] = best(lambda: build(load([*options, f"output={folder / 'all'}"])))
            seconds["plain Spark SQL, clicks only"] = best(lambda: spark_sql(spark, log, folder / "sql"))
        rows = open_dataset(folder / "clicks").manifest.counts["rows_read"]
        for label, took in seconds.items():
            print(f"{label:<30} {took:6.1f} s  {rows / took / 1e6:5.2f} M rows/s")
        ours = seconds["ours, clicks only"]
        print(f"clicks only: {ours / seconds['Polars, clicks only']:.2f} × Polars' time")
        print(f"clicks only: {seconds['plain Spark SQL, clicks only'] / ours:.2f} × faster than plain Spark SQL")
        ratio = seconds["ours with exposures"] / seconds["Polars with exposures"]
        print(f"exposures, item table, dense ids: {ratio:.2f} × Polars' time for the sessions alone")
        same_sessions(folder)


def best(work: Callable[[], object]) -> float:
    """Seconds of the fastest round."""
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def scan(log: Path):
    import polars as pl

    ids = {"user_id": pl.Int64, "item_id": pl.Int64}
    return pl, pl.scan_csv(log, null_values=["\\N"], schema_overrides=ids)


def polars_clicks(log: Path, output: Path) -> None:
    """Clicks-only sessions with all columns of ours, with raw item ids."""
    pl, rows = scan(log)
    feedback = (pl.col("like") + 2 * pl.col("share") + 4 * pl.col("follow")).cast(pl.Int8)
    clicks = rows.filter(pl.col("click") == 1).with_columns(feedback.alias("feedback"))
    columns = ("item_id", "feedback", "watching_times")
    sessions = clicks.group_by("user_id").agg(
        pl.len().alias("n_clicks"), *(pl.col(c).tail(30) for c in columns), pl.last("gender"), pl.last("age")
    )
    sessions.filter(pl.col("n_clicks") >= 10).collect(engine="streaming").write_parquet(output)


def polars_exposures(log: Path, output: Path) -> None:
    """Sessions with exposures and their positions, with raw item ids."""
    pl, rows = scan(log)
    click = pl.col("click").cast(pl.Int32)
    bits = pl.col("like") + 2 * pl.col("share") + 4 * pl.col("follow") + 128 * pl.col("click").cast(pl.Int16)
    rows = rows.select("user_id", "item_id", "click", bits.cast(pl.Int16).alias("feedback")).with_columns(
        click.cum_sum().over("user_id").alias("k"), click.sum().over("user_id").alias("n")
    )
    inside = (pl.col("k") >= pl.col("n") - 29) & (pl.col("k") >= 1)
    before_test = (pl.col("k") < pl.col("n")) | (pl.col("click") == 1)
    position = pl.col("k") - pl.col("click") - (pl.col("n") - pl.min_horizontal("n", 30))
    result = rows.filter((pl.col("n") >= 10) & inside & before_test).with_columns(position.cast(pl.Int16).alias("p"))
    clicked = pl.col("click") == 1
    sessions = result.group_by("user_id").agg(
        pl.first("n"), pl.col("item_id").filter(clicked).alias("items"), "item_id", "p", "feedback"
    )
    sessions.collect(engine="streaming").write_parquet(output)


def spark_sql(spark, log: Path, output: Path) -> None:
    """The straightforward version: `read.csv`, `groupBy`, `sort_array(collect_list)`."""
    from pyspark.sql import functions as f

    schema = "user_id long, item_id long, click byte, follow byte, like byte, share byte, video_category string, "
    schema += "watching_times int, gender byte, age byte"
    rows = spark.read.csv(str(log), header=True, nullValue="\\N", schema=schema)
    bits = f.expr("like + 2 * share + 4 * follow").alias("feedback")
    click = f.struct(f.monotonically_increasing_id().alias("place"), "item_id", bits, "watching_times")
    clicks = rows.where("click = 1").select("user_id", click.alias("c"))
    sessions = clicks.groupBy("user_id").agg(f.sort_array(f.collect_list("c")).alias("c")).where(f.size("c") >= 10)
    result = sessions.select(
        "user_id",
        f.size("c").alias("n_clicks"),
        f.slice("c", f.greatest(f.lit(1), f.size("c") - 29), f.lit(30)).alias("c"),
    )
    names = ("item_id", "feedback", "watching_times")
    result.select("user_id", "n_clicks", *(f.col(f"c.{n}") for n in names)).write.mode("overwrite").parquet(str(output))


def same_sessions(folder: Path) -> None:
    """Check that all three give the same sessions."""
    dataset = open_dataset(folder / "clicks", verify=False)
    raw = np.concatenate([[0], dataset.items(["item_id"])["item_id"].to_numpy()])
    tables = [pq.read_table(dataset.file(f.path)) for f in dataset.session_files]
    ours = pa.concat_tables(tables).combine_chunks().sort_by("user_id")
    ours_items = raw[ours["items"].combine_chunks().flatten().to_numpy()]
    for label, path in (("Polars", folder / "polars.parquet"), ("Spark SQL", folder / "sql")):
        theirs = pq.read_table(path).combine_chunks().sort_by("user_id")
        equal = np.array_equal(ours["user_id"].to_numpy(), theirs["user_id"].to_numpy())
        equal &= np.array_equal(ours_items, theirs["item_id"].combine_chunks().flatten().to_numpy())
        for name in ("feedback", "watching_times"):
            a, b = (t[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for t in (ours, theirs))
            equal &= np.array_equal(a, np.nan_to_num(b))
        print(f"{len(theirs):,} sessions of {label} equal to ours: {'yes' if equal else 'NO'}")
