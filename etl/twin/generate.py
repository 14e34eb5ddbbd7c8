"""Simulating users and writing their rows, a chunk of users at a time, over all cores."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from etl.protocol import Int
from etl.tenrec import NULL, SCENARIOS
from etl.twin.process import (
    CATEGORIES,
    COPY,
    COPY_SHARE,
    FOLLOW,
    FOLLOW_TWO,
    SKIPPED_STEEPNESS,
    TASKS,
    TASTES,
    Process,
    draw_rank,
)
from etl.twin.published import PUBLISHED
from etl.twin.scenarios import item_ids, user_ids

USERS_PER_CHUNK = 50_000
SPREAD = 1.15
"""Standard deviation of log clicks of a user: heavy-tailed."""
MOST_CLICKS = 3_000
CONFLICTS = 0.005
"""Share of rows that show the item just clicked once more, unclicked."""
NULL_CATEGORIES = 0.01
CALIBRATION_USERS = 4_000


@dataclass(frozen=True)
class Twin:
    """What is generated: everything follows from these values."""

    scenario: str
    users: int
    process: Process
    log_clicks: float

    @property
    def skips_per_click(self) -> float:
        """Mean number of unclicked rows drawn before a click, before copies."""
        published = PUBLISHED[self.scenario]
        return (published.exposures / published.clicks - 1) / (1 + COPY_SHARE)

    @property
    def conflict_share(self) -> float:
        """Share of unclicked rows that show the last click once more."""
        published = PUBLISHED[self.scenario]
        return CONFLICTS * published.exposures / (published.exposures - published.clicks)


def make_twin(scenario: str, *, users: int, items: int | None, task_correlation: float, seed: int) -> Twin:
    """A twin whose mean clicks and action rates are those published, whatever its size."""
    published = PUBLISHED[scenario]
    items = items or max(CATEGORIES * 25, round(published.items * users / published.users))
    grid = (np.arange(200_000) + 0.5) / 200_000
    spread = SPREAD * _normal_quantiles(grid)
    low, high = 0.0, 10.0
    wanted = published.clicks / published.users
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _clicks(middle + spread).mean() < wanted else (low, middle)
    twin = Twin(scenario, users, Process(items, task_correlation, seed), low)
    clicks = simulate(replace(twin, users=CALIBRATION_USERS), chunk=-1)
    intercepts = tuple(_intercept(twin.process, clicks, task, published.rate(task)) for task in TASKS)
    return replace(twin, process=replace(twin.process, intercepts=intercepts))


def _normal_quantiles(share: Any) -> Any:
    """Standard normal quantiles (statistics.NormalDist, interpolated over a fine grid)."""
    from statistics import NormalDist

    nodes = np.concatenate(
        [
            np.geomspace(1e-9, 1e-3, 200),
            np.linspace(1e-3, 1 - 1e-3, 4_000)[1:-1],
            1 - np.geomspace(1e-9, 1e-3, 200)[::-1],
        ]
    )
    return np.interp(share, nodes, [NormalDist().inv_cdf(node) for node in nodes])


def _clicks(log_clicks: Any) -> Int:
    return np.clip(np.exp(log_clicks), 1, MOST_CLICKS).astype(np.int64)


def _intercept(process: Process, clicks: Clicks, task: str, rate: float) -> float:
    """The intercept at which the expected share of clicks with the action is `rate`, by bisection."""
    if rate == 0:
        return 0.0
    logit = process.logits(task, clicks.rank, clicks.taste[clicks.user], clicks.thread)
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 / (1 + np.exp(-logit - middle))).mean() < rate else (low, middle)
    return low


@dataclass(frozen=True)
class Clicks:
    """Clicks of a chunk's users, grouped by user, in time order.

    Attributes:
        taste: int64 `[U]`, hidden.
        offset: int64 `[U + 1]`.
        user: int64 `[N]`, number in the chunk.
        rank: int64 `[N]`, items.
        copied: bool `[N]`, exact copies of the click before.
        thread: bool `[N]`, clicks that followed the thread (of a copy: what its original did).
    """

    taste: Int
    offset: Int
    user: Int
    rank: Int
    copied: Any
    thread: Any


def simulate(twin: Twin, chunk: int) -> Clicks:
    """All clicks of a chunk of users, a step of all users at a time."""
    begin = max(chunk, 0) * USERS_PER_CHUNK
    n = min(USERS_PER_CHUNK, twin.users - begin)
    rng = np.random.default_rng([twin.process.seed, chunk + 1, 1])
    taste = rng.integers(0, TASTES, n)
    length = _clicks(twin.log_clicks + SPREAD * rng.standard_normal(n))
    offset = np.concatenate([[0], np.cumsum(length)])
    rank, part = np.empty(offset[-1], np.int64), np.empty(offset[-1], np.int8)
    order = np.argsort(-length, kind="stable")  # longest first: the users still active are a prefix
    active = np.searchsorted(-length[order], -np.arange(length.max(initial=0)), side="left")
    last, before = (np.full(n, -1, np.int64) for _ in range(2))
    for step, count in enumerate(active):
        users = order[:count]
        drawn, kind = twin.process.draw(rng, taste[users], last[:count], before[:count])
        rank[offset[users] + step], part[offset[users] + step] = drawn, kind
        before[:count], last[:count] = last[:count], drawn
    copied = part == COPY
    original = np.maximum.accumulate(np.where(copied, 0, np.arange(len(part))))
    thread = np.isin(part[original], (FOLLOW, FOLLOW_TWO))
    return Clicks(taste, offset, np.repeat(np.arange(n), length), rank, copied, thread)


def rows_of(twin: Twin, chunk: int) -> dict[str, Any]:
    """All rows of a chunk: what was shown, in order, with its outcome.

    Returns:
        Arrays by name: `user` (number in the chunk), `rank`, `click`, `watching_times`, the actions that the log has.
    """
    clicks = simulate(twin, chunk)
    rng = np.random.default_rng([twin.process.seed, chunk + 1, 2])
    n = len(clicks.rank)
    stop = 1 / (1 + twin.skips_per_click)
    # A copied click follows its original at once, so nothing is shown between them.
    skips = rng.geometric(stop, n) - 1
    skips[clicks.copied] = 0
    repeats = rng.random(int(skips.sum())) < COPY_SHARE
    owner = np.repeat(np.arange(n), skips)
    previous = np.where(np.arange(n) > clicks.offset[clicks.user], np.roll(clicks.rank, 1), -1)
    conflict = (rng.random(len(owner)) < twin.conflict_share) & (previous[owner] >= 0)
    shown = draw_rank(rng.random(len(owner)), twin.process.items, SKIPPED_STEEPNESS)
    shown = np.where(conflict, previous[owner], shown)
    owner, shown = np.repeat(owner, 1 + repeats), np.repeat(shown, 1 + repeats)
    # Rows before a click sort under the click's number, the click itself after them.
    place = np.argsort(np.concatenate([2 * owner, 2 * np.arange(n) + 1]), kind="stable")
    table = {
        "user": np.concatenate([clicks.user[owner], clicks.user])[place],
        "rank": np.concatenate([shown, clicks.rank])[place],
        "click": np.concatenate([np.zeros(len(owner), np.int8), np.ones(n, np.int8)])[place],
    }
    original = np.maximum.accumulate(np.where(clicks.copied, 0, np.arange(n)))
    watched = 1 + (rng.exponential(0.6, n)).astype(np.int64)
    outcomes = {"watching_times": watched[original]}
    for task in TASKS:
        if PUBLISHED[twin.scenario].rate(task) == 0:
            continue
        chance = rng.random(n)[original]
        logit = twin.process.logits(task, clicks.rank, clicks.taste[clicks.user], clicks.thread)
        outcomes[task] = (chance < 1 / (1 + np.exp(-logit))).astype(np.int8)
    for name, values in outcomes.items():
        table[name] = np.concatenate([np.zeros(len(owner), values.dtype), values])[place]
    return table


# ---------------------------------------------------------------------------------------------
# Writing


def write(twin: Twin, path: Path) -> int:
    """Write the log as CSV: the same bytes for the same twin, however many cores there are.

    Returns:
        The number of rows.
    """
    chunks = range(-(-twin.users // USERS_PER_CHUNK))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    rows = 0
    with contextlib.ExitStack() as stack:
        stack.callback(temporary.unlink, missing_ok=True)
        stream = stack.enter_context(temporary.open("wb"))
        stream.write((",".join(SCENARIOS[twin.scenario].columns) + "\n").encode())
        for count, text in _in_order(stack.enter_context(_workers()), ((twin, chunk) for chunk in chunks)):
            stream.write(text)
            rows += count
        stream.flush()
        temporary.replace(path)
    return rows


def _workers() -> Any:
    """As many processes as cores."""
    return multiprocessing.get_context("spawn").Pool(os.cpu_count())


def _in_order(pool: Any, tasks: Iterator[tuple[Twin, int]]) -> Iterator[tuple[int, bytes]]:
    """Chunks in order, a few made ahead: memory does not grow where the disk is slower than the cores."""
    ahead: deque[Any] = deque()
    for task in itertools.chain(tasks, [None] * 2 * (os.cpu_count() or 1)):
        if task is not None:
            ahead.append(pool.apply_async(_chunk_csv, task))
        if ahead and (task is None or len(ahead) > 2 * (os.cpu_count() or 1)):
            yield ahead.popleft().get()


def _chunk_csv(twin: Twin, chunk: int) -> tuple[int, bytes]:
    rows = rows_of(twin, chunk)
    table = pa.table(_columns(twin, chunk, rows), names=list(SCENARIOS[twin.scenario].columns))
    sink = pa.BufferOutputStream()
    pa_csv.write_csv(table, sink, pa_csv.WriteOptions(include_header=False, quoting_style="none"))
    return len(table), sink.getvalue().to_pybytes()


def _columns(twin: Twin, chunk: int, rows: dict[str, Any]) -> list[Any]:
    """The scenario's columns in the order of its header."""
    number = rows["user"] + chunk * USERS_PER_CHUNK
    item = rows["rank"]
    category = pa.DictionaryArray.from_arrays(
        pa.array(_null_some(item % CATEGORIES, chunk, rows, twin.process.seed)),
        pa.array([NULL, *(str(100 + c) for c in range(CATEGORIES))]),
    ).cast(pa.string())
    made = {
        "user_id": user_ids(twin.scenario, twin.users).of(number),
        "item_id": item_ids(twin.scenario, twin.process.items).of(scatter(item, twin.process.items)),
        "gender": number * 7 % 3,
        "age": number * 13 % 8,
        "video_category": category,
        "category_second": category,
    }
    made |= {name: values for name, values in rows.items() if name not in ("user", "rank")}
    article = "category_second" in SCENARIOS[twin.scenario].columns
    if article:
        made["click"] = pa.array(np.array(["0.0", "1.0"])[rows["click"]])
    return [
        pa.array(made[name]) if name in made else pa.array(np.zeros(len(item), np.int8))
        for name in SCENARIOS[twin.scenario].columns
    ]


def _null_some(category: Int, chunk: int, rows: dict[str, Any], seed: int) -> Any:
    """Codes from 1, with 0 (null) for one row in a hundred; a copied row has its original's."""
    rng = np.random.default_rng([seed, chunk + 1, 3])
    missing = rng.random(len(category)) < NULL_CATEGORIES
    same = np.zeros(len(category), bool)
    same[1:] = (rows["user"][1:] == rows["user"][:-1]) & (rows["rank"][1:] == rows["rank"][:-1])
    same[1:] &= rows["click"][1:] == rows["click"][:-1]
    original = np.maximum.accumulate(np.where(same, 0, np.arange(len(category))))
    return np.where(missing[original], 0, category + 1).astype(np.int8)


def scatter(rank_N: Int, items: int) -> Int:
    """Numbers of items in no order of popularity: a bijection of 0..items-1."""
    step = int(items * 0.618)
    while np.gcd(step, items) != 1:
        step += 1
    return (rank_N * step + items // 3) % items
