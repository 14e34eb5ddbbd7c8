"""Simulates the clicks of users, one chunk of users at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from etl.logs.tenrec_published import FEWEST_ITEMS, PUBLISHED, SCANNED
from etl.runtime.arrays import FloatArray, IntArray
from etl.twin.process import COPY, FOLLOW, FOLLOW_TWO, TASKS, TASTES, UNCLICKED_STEEPNESS, Process, draw_rank

USERS_PER_CHUNK = 50_000
SPREAD = 1.15
"""Standard deviation of the log of a user's click count (heavy-tailed)."""
FEWEST_CLICKS, MOST_CLICKS = 5, 3_000
CALIBRATION_USERS = 4_000


@dataclass(frozen=True)
class Twin:
    """The parameters of a synthetic log, which determine it completely.

    Attributes:
        scenario: the log that the twin is shaped like.
        users: number of users.
        process: process that generates clicks.
        log_clicks: mean log click count of a user.
        blocks: mean number of contiguous blocks of a user's rows.
        observed_topics: whether the category column is the hidden topic instead of a noisy version.
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
    """Build a twin of any size with the published mean clicks and action rates.

    Args:
        scenario: a key of `PUBLISHED`.
        users: number of users.
        items: catalogue size; by default in the published proportion to the users.
        task_correlation: as in `Process`.
        successor_smoothness: `smoothness` of `Process`.
        observed_topics: whether the category column shows the topic.
        blocks: mean blocks per user; by default as in the real log.
        seed: random seed.
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


def _normal_quantiles(share: FloatArray) -> FloatArray:
    """Standard normal quantiles, interpolated over a fine grid."""
    tail = np.geomspace(1e-9, 1e-3, 200)
    nodes = np.concatenate([tail, np.linspace(1e-3, 1 - 1e-3, 4_000)[1:-1], 1 - tail[::-1]])
    return np.interp(share, nodes, [NormalDist().inv_cdf(node) for node in nodes])


def _clicks(log_clicks: Any) -> IntArray:
    return np.clip(np.exp(log_clicks), FEWEST_CLICKS, MOST_CLICKS).astype(np.int64)


def _intercepts(twin: Twin) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The intercepts that give the published action rates, on clicked and on unclicked rows."""
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


def _intercept(logit_N: FloatArray, rate: float) -> float:
    """The intercept for which the mean probability is `rate`, by bisection; 0 if there is none."""
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
        taste: int64 `[U]`, hidden tastes.
        offset: int64 `[U + 1]`.
        user: int64 `[N]`, index in the chunk.
        rank: int64 `[N]`, items.
        copied: bool `[N]`, exact copies of the previous click.
        thread: bool `[N]`, clicks that followed the last two (for a copy: that of its original).
    """

    taste: IntArray
    offset: IntArray
    user: IntArray
    rank: IntArray
    copied: Any
    thread: Any


def simulate(twin: Twin, chunk: int) -> Clicks:
    """Simulate all clicks of a chunk, one click of all users at a time."""
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
