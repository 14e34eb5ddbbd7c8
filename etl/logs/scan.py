"""Computes the statistics that public analyses of the real Tenrec files report, in one pass over a log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from etl.logs.parse import parse_file
from etl.logs.splits import LogFile
from etl.logs.tenrec import SCENARIOS, Scenario, open_logs
from etl.logs.tenrec_published import FIRST_USERS
from etl.runtime.errors import InputError

SAMPLED_BYTES = 128 << 20
"""Largest log for which all users are held in memory; else an even sample of users is used."""
FIRST_ROWS = 100_000


def scan(inputs: list[str], scenario_name: str) -> dict[str, float]:
    """Statistics of a log, by their names in `SCAN_STATISTICS`; those without a column are left out.

    Row counts use all rows; statistics per user (pairs, duplicates, genders, click rates) use an even sample of users,
    in bounded memory. Lines that `python -m etl` would quarantine are skipped.

    Raises:
        InputError: a missing log, one of another scenario, or one without a usable row.
    """
    scenario = SCENARIOS[scenario_name]
    files = open_logs(inputs, scenario)
    every = max(1, sum(file.unpacked_bytes for file in files) // SAMPLED_BYTES)
    counts: Counter[str] = Counter()
    samples, last_user, first_users = [], None, set[int]()
    for table in _tables(files, scenario):
        if not len(table):
            continue
        user = table["user_id"].to_numpy()
        counts["blocks"] += int(np.count_nonzero(user[1:] != user[:-1])) + (last_user != user[0])
        if counts["rows"] < FIRST_ROWS:
            first_users.update(user[: FIRST_ROWS - counts["rows"]].tolist())
        last_user = user[-1]
        counts.update(_count(table, scenario))  # keeps zeros, unlike +=
        samples.append(table.filter(pa.array(user % every == 0)))
    if not samples:
        raise InputError("a log with rows", "none usable", "python -m etl says which rows it quarantines, and why")
    statistics = {FIRST_USERS: float(len(first_users))} if counts["rows"] >= FIRST_ROWS else {}
    rows = pa.concat_tables(samples, promote_options="default").unify_dictionaries().to_pandas()
    return _shares(counts) | statistics | _user_statistics(rows, counts)


def _tables(files: list[LogFile], scenario: Scenario) -> Iterator[pa.Table]:
    """Well-formed rows of the logs, in parts; only columns that a file has."""
    for file in files:
        for tables, _ in parse_file(file, scenario):
            for table in tables:
                absent = [name for name in table.column_names if _name_in_log(name, scenario) not in file.columns]
                yield table.drop_columns(absent).unify_dictionaries()


def _name_in_log(name: str, scenario: Scenario) -> str:
    return scenario.category if name == "category" else name


def _count(table: pa.Table, scenario: Scenario) -> Counter[str]:
    """Row counts of a part of the log."""
    counts = Counter(rows=len(table))
    click = table["click"].fill_null(0).to_numpy() == 1
    acted = np.zeros(len(table), bool)
    counts["clicked"] = int(click.sum())
    for action in scenario.actions:
        if action in table.column_names:
            done = table[action].fill_null(0).to_numpy() == 1
            acted |= done
            counts[action], counts[f"{action} unclicked"] = int(done.sum()), int((done & ~click).sum())
    counts["acted unclicked"] = int((acted & ~click).sum())
    for name in ("gender", "age", "category"):
        if name in table.column_names:
            for entry in pc.value_counts(table[name].combine_chunks()).to_pylist():
                value = "null" if entry["values"] is None else entry["values"]
                counts[f"{name} {value}"] += entry["counts"]
                counts[f"{name} rows"] += entry["counts"]
    if "watching_times" in table.column_names:
        counts["entered"] = int((table["watching_times"].fill_null(0).to_numpy()[~click] >= 1).sum())
    return counts


def _shares(counts: Counter[str]) -> dict[str, float]:
    rows, unclicked = max(counts["rows"], 1), counts["rows"] - counts["clicked"]
    statistics = {
        "rows": float(counts["rows"]),
        "clicks": float(counts["clicked"]),
        "click rate": counts["clicked"] / rows,
        "rows with an action and no click": counts["acted unclicked"] / rows,
        "mean run of a user's rows": counts["rows"] / max(counts["blocks"], 1),
    }
    if unclicked and "entered" in counts:
        statistics["entered share of unclicked rows"] = counts["entered"] / unclicked
    for action in ("like", "share", "follow"):
        if counts[action]:
            statistics[f"{action}s"] = float(counts[action])
            statistics[f"{action}s on unclicked rows"] = counts[f"{action} unclicked"] / counts[action]
    for kind in ("gender", "age", "category"):
        for name in [name for name in counts if name.startswith(f"{kind} ") and not name.endswith(" rows")]:
            statistics[name] = counts[name] / counts[f"{kind} rows"]
    return statistics


def _user_statistics(rows: pd.DataFrame, counts: Counter[str]) -> dict[str, float]:
    """Statistics that need all rows of a user, over the sampled users."""
    if rows.empty:
        return {}
    pair = ["user_id", "item_id"]
    by_pair = rows.groupby(pair, sort=False)["click"].agg(["min", "max"])
    index = rows.groupby("user_id").cumcount()
    through = (index + 0.5) / rows.groupby("user_id")["item_id"].transform("size")
    clicks = rows["click"].fillna(0).groupby(rows["user_id"]).sum()
    statistics: dict[str, Any] = {
        "exact duplicates": rows.duplicated().mean(),
        "repeated pairs of user and item": rows.duplicated(pair).mean(),
        "pairs with conflicting clicks, per row": (by_pair["min"] < by_pair["max"]).sum() / len(rows),
        "fewest clicks of a user": clicks.min(),
        "click rate in the first third of a user's rows": rows["click"][through < 1 / 3].mean(),
        "click rate in the last third of a user's rows": rows["click"][through > 2 / 3].mean(),
    }
    users = rows["user_id"].nunique() / len(rows) * counts["rows"]
    statistics["blocks of a user"] = counts["blocks"] / users
    if "gender" in rows:
        statistics["users with several genders"] = (rows.groupby("user_id")["gender"].nunique() > 1).mean()
    # A click rate of no row is NaN.
    return {name: float(value) for name, value in statistics.items() if not np.isnan(value)}
