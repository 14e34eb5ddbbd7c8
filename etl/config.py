"""Options of `python -m etl` and their validation."""

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
"""Keys of `tenrec.SCENARIOS`, repeated here since that imports Arrow."""
DEDUPE = ("none", "exact", "first")
SPLIT_BYTES = 64 << 20
"""Default bytes of a log per task; determines the order of sessions."""
ENGINES = ("auto", "local", "spark")
UNCLICKED_PER_CLICK = 2
MAX_CLICKS_LIMIT = 1_000
MIN_CLICKS_LIMIT = 3


@dataclass
class Protocol:
    """Which rows, items, users and clicks are retained; see `etl/protocol.py` for the order of the filters."""

    name: str = option("study", "name of the preset")
    first_rows: int | None = option(None, "read the first N data rows only", at_least=1)
    clicked_only: bool = option(False, "drop unclicked rows before anything else is counted")
    dedupe: str = option(
        "none", "exact = keep one of equal rows; first = keep a user's first click on an item", choices=DEDUPE
    )
    min_item_clicks: int = option(1, "drop all rows of items with fewer clicks; 1 drops none", at_least=0)
    max_item_clicks: int | None = option(None, "drop all rows of items with more clicks", at_least=1)
    first_users: int | None = option(None, "keep the lowest N user ids only", at_least=1)
    min_clicks: int = option(10, "drop users with fewer clicks", at_least=MIN_CLICKS_LIMIT)
    max_clicks: int = option(30, "keep a user's last N clicks", at_least=MIN_CLICKS_LIMIT, at_most=MAX_CLICKS_LIMIT)


MASTERS = r"local|local\[(\*|[1-9]\d*)(,[1-9]\d*)?\]|spark://[^/\s:,]+:\d+(,[^/\s:,]+:\d+)*|k8s://\S+|yarn"
"""Spark master addresses."""
UNITS = {"k": 10, "m": 20, "g": 30, "t": 40}
LEAST_SPARK_MEMORY = 512 << 20
"""Minimum memory: Spark does not start a driver or executor with less than about 450 MiB."""


@dataclass
class SparkOptions:
    """How Spark runs the job."""

    master: str | None = option(None, "Spark master URL; local[*] where Spark runs and none is named")
    driver_memory: str | None = option(None, "memory of the driver; default: by input size")
    executor_memory: str | None = option(None, "memory of each executor on a cluster; default: by input size")


@dataclass
class EtlConfig:
    """Options of `python -m etl`."""

    input: Any = option(MISSING, "CSV file, glob or URI, or a list of these, read in this order")
    output: str = option(MISSING, "dataset folder to make")
    scenario: str = option(MISSING, "format of the log", choices=SCENARIOS)
    protocol: Protocol = group(Protocol)
    exposures: bool = option(True, "keep all exposures, clicked or not")
    shards: int | None = option(
        None, "number of session files; default: one for each 4,096 sessions, 1 to 64", at_least=1
    )
    items_from: str | None = option(None, "dataset whose item ids are used; other items are dropped")
    users_from: Any = option(None, "log, glob or URI, or a list of these: keep only rows of users who are in it")
    unclicked_per_click: int | None = option(
        UNCLICKED_PER_CLICK, "scenario ctr: unclicked rows sampled for each clicked one; null = all rows", at_least=0
    )
    strict: bool = option(False, "stop at the first malformed row")
    overwrite: bool = option(False, "replace an existing dataset once the new one is complete")
    seed: int = option(0, "random seed of the sampled rows and of the split (scenario ctr)", at_least=0)
    split_bytes: int = option(
        SPLIT_BYTES,
        "bytes of the log that one task reads; the order of sessions follows from it",
        at_least=1,
        at_most=256 << 20,  # a task's rows are one Arrow binary value per partition, of less than 2 GiB
    )
    engine: str = option(
        "auto", "where tasks run; auto = spark for logs over 512 MiB or where spark.* is set", choices=ENGINES
    )
    processes: int | None = option(None, "worker processes of engine=local; default: one for each core", at_least=1)
    spark: SparkOptions = group(SparkOptions)

    @property
    def inputs(self) -> list[str]:
        """The inputs as a list of paths, globs and URIs."""
        return _as_list(self.input)

    @property
    def user_logs(self) -> list[str]:
        """The logs whose users are retained, as a list of paths, globs and URIs; empty = all users."""
        return _as_list(self.users_from or [])


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _are_paths(value: Any) -> bool:
    """Whether a value is a path or a list of paths."""
    paths = value if isinstance(value, list) else [value]
    return bool(paths) and all(isinstance(path, str) and path for path in paths)


def load(options: Sequence[str]) -> EtlConfig:
    """Parse and validate a command line.

    Raises:
        InputError: an option is unknown, missing, ill-typed or out of its range.
    """
    config = read_options(EtlConfig, "etl.conf", options)
    for name in ("input", "users_from"):
        value = getattr(config, name)
        if not (_are_paths(value) or (name == "users_from" and value is None)):
            raise InputError(f"{name}=FILE or {name}=[FILE,…]", repr(value), "name at least one CSV file")
    if config.items_from == "":
        raise InputError("items_from=DATASET", "an empty value", "name a dataset, or leave it out")
    if config.engine == "local" and config.spark != SparkOptions():
        raise InputError("no option of spark with engine=local", "one", "leave out engine=local, or spark.…")
    _check_spark(config.spark)
    return config


def unread_options(config: EtlConfig) -> list[str]:
    """Names of the options that differ from their defaults and that the scenario does not read.

    >>> unread_options(load(["input=a", "output=b", "scenario=ctr", "protocol.dedupe=exact", "exposures=false"]))
    ['exposures', 'protocol.dedupe']
    """
    if config.scenario != "ctr":
        return []
    read, protocol, defaults = {"name", "first_rows"}, dataclasses.asdict(config.protocol), Protocol()
    names = [name for name, value in protocol.items() if name not in read and value != getattr(defaults, name)]
    return [*(["exposures"] if not config.exposures else []), *(f"protocol.{name}" for name in names)]


def _check_spark(spark: SparkOptions) -> None:
    if spark.master is not None and not re.fullmatch(MASTERS, spark.master):
        raise InputError(
            "spark.master as local[N], spark://HOST:PORT or k8s://URL", spark.master, "write spark://HOST:7077"
        )
    for name in ("driver_memory", "executor_memory"):
        text = getattr(spark, name)
        if text is None:
            continue
        match = re.fullmatch(r"(\d+)([kmgt])b?", text.lower())
        if not match or int(match[1]) << UNITS[match[2]] < LEAST_SPARK_MEMORY:
            raise InputError(f"spark.{name} of at least 512m", text, "for example 4g")


def protocol_record(config: EtlConfig, shards: int, users: str | None) -> dict[str, Any]:
    """All options that determine the sessions and files made from the same rows, for the manifest.

    Args:
        config: options of the job.
        shards: number of files.
        users: fingerprint of the users in `users_from`.
    """
    of_rows: dict[str, Any] = {"seed": config.seed}
    if config.unclicked_per_click != UNCLICKED_PER_CLICK:  # the default is left out, to keep fingerprints stable
        of_rows["unclicked_per_click"] = config.unclicked_per_click
    return {
        **dataclasses.asdict(config.protocol),
        "exposures": config.exposures,
        "shards": shards,
        **({"users_from": users} if users else {}),
        **(of_rows if config.scenario == "ctr" else {}),
    }
