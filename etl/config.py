"""Options of `python -m etl`, checked once at the start."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from etl.runtime.errors import InputError
from etl.runtime.options import group, option, read_options

SCENARIOS = ("qk_video", "qb_video", "qk_article", "qb_article", "sbr", "ctr")
"""Keys of `tenrec.SCENARIOS`, which needs Arrow."""
DEDUPE = ("none", "exact", "first")
SPLIT_BYTES = 64 << 20
"""What one task reads of a log unless told otherwise: the order of sessions follows from it."""
ENGINES = ("auto", "local", "spark")
MAX_CLICKS_LIMIT = 1_000
MIN_CLICKS_LIMIT = 3


@dataclass
class Protocol:
    """Which rows, items, users and clicks are kept; see `etl/protocol.py` for the order."""

    name: str = option("study", "name of the preset")
    first_rows: int | None = option(None, "the first N data rows only")
    clicked_only: bool = option(False, "drop unclicked rows before anything else is counted")
    dedupe: str = option("none", "none, exact (equal rows once) or first (a user's first click on an item)")
    min_item_clicks: int = option(1, "drop all rows of items with fewer clicks; 1 drops none")
    max_item_clicks: int | None = option(None, "drop all rows of items with more clicks")
    first_users: int | None = option(None, "the lowest N user ids only")
    min_clicks: int = option(10, "drop users with fewer clicks (at least 3)")
    max_clicks: int = option(30, "keep a user's last N clicks (3 to 1000)")


MASTERS = r"local|local\[(\*|[1-9]\d*)(,[1-9]\d*)?\]|spark://[^/\s:,]+:\d+(,[^/\s:,]+:\d+)*|k8s://\S+|yarn"
"""Addresses of masters that Spark knows."""
UNITS = {"k": 10, "m": 20, "g": 30, "t": 40}
LEAST_SPARK_MEMORY = 512 << 20
"""Spark starts no driver or executor with less than about 450 MiB."""


@dataclass
class SparkOptions:
    """How Spark runs the job."""

    master: str | None = option(None, "Spark master URL; local[*] where Spark runs and none is named")
    driver_memory: str | None = option(None, "of the JVM in local mode, of the driver elsewhere; by input size")
    executor_memory: str | None = option(None, "of each executor on a cluster; by input size")


@dataclass
class EtlConfig:
    """Options of `python -m etl`."""

    input: Any = option(MISSING, "CSV file, glob or URI, or a list of these, read in the order given")
    output: str = option(MISSING, "dataset folder to make")
    scenario: str = option(MISSING, ", ".join(SCENARIOS))
    protocol: Protocol = group(Protocol)
    exposures: bool = option(True, "keep what was shown, clicked or not")
    shards: int | None = option(None, "number of session files; by default one for each 4,096 sessions, 1 to 64")
    items_from: str | None = option(None, "dataset whose dense ids are kept; other items are dropped")
    strict: bool = option(False, "stop at the first malformed row")
    overwrite: bool = option(False, "replace an existing dataset once the new one is whole")
    seed: int = option(0, "scenario ctr: seed of the sampled rows and of the split")
    split_bytes: int = option(SPLIT_BYTES, "log that one task reads; the order of sessions follows from it")
    engine: str = option("auto", "local, spark, or auto: spark for logs over 512 MiB or where spark.* is set")
    processes: int | None = option(None, "worker processes of engine=local; one for each core by default")
    spark: SparkOptions = group(SparkOptions)

    @property
    def inputs(self) -> list[str]:
        """The inputs as a list of paths, globs and URIs."""
        return [self.input] if isinstance(self.input, str) else list(self.input)


def load(options: Sequence[str]) -> EtlConfig:
    """The checked configuration of a command line.

    Raises:
        InputError: an option is unknown, missing, ill-typed or out of its range.
    """
    config = read_options(EtlConfig, "etl.conf", options)
    given = config.input
    if not (isinstance(given, str) or (isinstance(given, list) and given and all(isinstance(i, str) for i in given))):
        raise InputError("input=FILE or input=[FILE,…]", repr(given), "name at least one CSV file")
    _one_of("scenario", config.scenario, SCENARIOS)
    _one_of("protocol.dedupe", config.protocol.dedupe, DEDUPE)
    _one_of("engine", config.engine, ENGINES)
    if config.engine == "local" and config.spark != SparkOptions():
        raise InputError("no option of spark with engine=local", "one", "leave out engine=local, or spark.…")
    _check_spark(config.spark)
    protocol = config.protocol
    _at_least("seed", config.seed, 0)
    _at_least("split_bytes", config.split_bytes, 1)
    _at_least("protocol.min_clicks", protocol.min_clicks, MIN_CLICKS_LIMIT)
    _at_least("protocol.min_item_clicks", protocol.min_item_clicks, 0)
    positive = {name: getattr(config, name) for name in ("shards", "processes")}
    positive |= {
        f"protocol.{name}": getattr(protocol, name) for name in ("first_rows", "max_item_clicks", "first_users")
    }
    for name, value in positive.items():
        if value is not None:
            _at_least(name, value, 1)
    if not MIN_CLICKS_LIMIT <= protocol.max_clicks <= MAX_CLICKS_LIMIT:
        raise InputError(
            f"protocol.max_clicks in {MIN_CLICKS_LIMIT}..{MAX_CLICKS_LIMIT}",
            protocol.max_clicks,
            "a session needs a train, a valid and a test click",
        )
    return config


def _check_spark(spark: SparkOptions) -> None:
    if spark.master is not None and not re.fullmatch(MASTERS, spark.master):
        raise InputError(
            "spark.master as local[N], spark://HOST:PORT or k8s://URL", spark.master, "write spark://HOST:7077"
        )
    for name in ("driver_memory", "executor_memory"):
        text = getattr(spark, name)
        if text is None:
            continue
        found = re.fullmatch(r"(\d+)([kmgt])b?", text.lower())
        if not found or int(found[1]) << UNITS[found[2]] < LEAST_SPARK_MEMORY:
            raise InputError(f"spark.{name} of at least 512m", text, "write 4g, say")


def protocol_record(config: EtlConfig, shards: int) -> dict[str, Any]:
    """All that decides which sessions come out of the same rows, and in how many files, for the manifest."""
    return {
        **dataclasses.asdict(config.protocol),
        "exposures": config.exposures,
        "shards": shards,
        **({"seed": config.seed} if config.scenario == "ctr" else {}),
    }


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} one of {', '.join(choices)}", value, f"choose {name}={choices[0]}, say")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{name} of at least {least}", value, "give a larger number")
