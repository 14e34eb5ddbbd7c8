"""Simulating the clicks of users, a chunk of users at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from etl.protocol import Int
from etl.twin.process import (
    COPY,
    FOLLOW,
    FOLLOW_TWO,
    TASKS,
    TASTES,
    UNCLICKED_STEEPNESS,
    Float,
    Process,
    draw_rank,
)
from etl.twin.published import FEWEST_ITEMS, PUBLISHED, SCANNED

USERS_PER_CHUNK = 50_000
SPREAD = 1.15
"""Standard deviation of log clicks of a user: heavy-tailed."""
FEWEST_CLICKS, MOST_CLICKS = 5, 3_000
CALIBRATION_USERS = 4_000


@dataclass(frozen=True)
class Twin:
    """What is generated: everything follows from these values.

    Attributes:
        scenario: the log that the twin is shaped like.
        users: number of users.
        process: what is clicked.
        log_clicks: mean of the logarithm of a user's clicks.
        blocks: mean number of contiguous blocks of a user's rows.
        observed_topics: the category column shows the hidden topic instead of hinting at it.
    """

    scenario: str
    users: int
    process: Process
    log_clicks: float
    blocks: float = 1.0
    observed_topics: bool = False

    def unclicked(self, task: str) -> float:
        """Share of an action's rows that were not clicked."""
        return SCANNED[self.scenario].unclicked.get(task, 0.0)


def make_twin(
    scenario: str,
    *,
    users: int,
    items: int | None = None,
    task_correlation: float = 0.5,
    successor_smoothness: float = 0.7,
    observed_topics: bool = False,
    blocks: float | None = None,
    seed: int = 0,
) -> Twin:
    """A twin whose mean clicks and action rates are those published, whatever its size.

    Args:
        scenario: a key of `PUBLISHED`.
        users: number of users.
        items: size of the catalogue; by default in the published proportion to the users.
        task_correlation: of the process.
        successor_smoothness: of the process.
        observed_topics: whether the category column shows the topic.
        blocks: mean blocks of a user; by default as scanned.
        seed: of everything.
    """
    published, scanned = PUBLISHED[scenario], SCANNED[scenario]
    items = items or max(FEWEST_ITEMS, round(published.items * users / published.users))
    low, high = 0.0, 10.0
    spread = SPREAD * _normal_quantiles((np.arange(200_000) + 0.5) / 200_000)
    for _ in range(60):
        middle = (low + high) / 2
        enough = _clicks(middle + spread).mean() >= published.clicks / published.users
        low, high = (low, middle) if enough else (middle, high)
    process = Process(items, task_correlation, seed, successor_smoothness)
    twin = Twin(scenario, users, process, low, blocks or scanned.blocks(published), observed_topics)
    on_clicks, on_others = _intercepts(twin)
    return replace(twin, process=replace(process, intercepts=on_clicks, unclicked_intercepts=on_others))


def _normal_quantiles(share: Float) -> Float:
    """Standard normal quantiles, interpolated over a fine grid."""
    tail = np.geomspace(1e-9, 1e-3, 200)
    nodes = np.concatenate([tail, np.linspace(1e-3, 1 - 1e-3, 4_000)[1:-1], 1 - tail[::-1]])
    return np.interp(share, nodes, [NormalDist().inv_cdf(node) for node in nodes])


def _clicks(log_clicks: Any) -> Int:
    return np.clip(np.exp(log_clicks), FEWEST_CLICKS, MOST_CLICKS).astype(np.int64)


def _intercepts(twin: Twin) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The intercepts at which actions are as frequent as published, on clicked and on other rows."""
    published = PUBLISHED[twin.scenario]
    clicks = simulate(replace(twin, users=CALIBRATION_USERS), chunk=-1)
    rng = np.random.default_rng([twin.process.seed, 0, 4])
    shown = draw_rank(rng.random(len(clicks.rank)), twin.process.items, UNCLICKED_STEEPNESS)
    unclicked_rows = published.exposures - published.clicks
    on_clicks, on_others = [], []
    for task in TASKS:
        total, unclicked, taste = published.total(task), twin.unclicked(task), clicks.taste[clicks.user]
        logit = twin.process.logits(task, clicks.rank, taste, clicks.thread)
        on_clicks.append(_intercept(logit, total * (1 - unclicked) / published.clicks))
        logit = twin.process.logits(task, shown, taste, None)
        on_others.append(_intercept(logit, total * unclicked / unclicked_rows if unclicked_rows else 0.0))
    return tuple(on_clicks), tuple(on_others)


def _intercept(logit_N: Float, rate: float) -> float:
    """The intercept at which the mean probability is `rate`, by bisection; 0 where there is none to find."""
    if rate == 0:
        return 0.0
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 / (1 + np.exp(-logit_N - middle))).mean() < rate else (low, middle)
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
        thread: bool `[N]`, clicks that followed the last two (of a copy: what its original did).
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
