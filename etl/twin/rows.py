"""Generates the rows of a chunk of users: exposures in order, with outcomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from etl.logs.tenrec_published import CONFLICTS, ENTERED, PUBLISHED
from etl.runtime.arrays import FloatArray, IntArray
from etl.twin.process import COPY_SHARE, TASKS, UNCLICKED_STEEPNESS, draw_rank
from etl.twin.simulate import Clicks, Twin, simulate

LATE = 3.0
"""Number of unclicked rows around a user's last click, as a multiple of the mean per click: before click j of n the
multiple is 3 ((j + 1/2) / n)², whose mean over a user is 1. Early rows are mostly clicked, late rows mostly not."""
WATCHED_AGAIN = 0.5
"""Mean of the exponential distribution whose integer part is added to the first visit of an entered row."""


def skips_per_click(twin: Twin) -> float:
    """Mean number of unclicked rows before a click, before exact duplicates."""
    published = PUBLISHED[twin.scenario]
    skips = (published.exposures - published.clicks) / published.users / (1 + COPY_SHARE)
    return skips / (published.clicks / published.users * (1 - COPY_SHARE) + LATE)


def conflict_share(twin: Twin) -> float:
    """Share of unclicked rows that show the last clicked item again."""
    published = PUBLISHED[twin.scenario]
    unclicked = published.exposures - published.clicks
    return CONFLICTS * published.exposures / unclicked if unclicked else 0.0


@dataclass(frozen=True)
class Slots:
    """Layout of rows: one slot per click, and one after each user's last click.

    A slot has the unclicked rows before its click, then the click; the last slot of a user has no click.

    Attributes:
        user: int64 `[S]`, index in the chunk.
        click: int64 `[S]`, index of the slot's click in the chunk, -1 for a last slot.
        previous: int64 `[S]`, the user's click before the slot's rows, -1 before the first.
        skips: int64 `[S]`, number of unclicked rows.
    """

    user: IntArray
    click: IntArray
    previous: IntArray
    skips: IntArray


def make_slots(twin: Twin, clicks: Clicks, rng: np.random.Generator) -> Slots:
    """The slots of a chunk, with random numbers of unclicked rows."""
    length = np.diff(clicks.offset)
    user = np.repeat(np.arange(len(length)), length + 1)
    within = np.arange(len(user)) - (clicks.offset[:-1] + np.arange(len(length)))[user]
    last = within == length[user]
    click = np.where(last, -1, clicks.offset[user] + within)
    previous = np.where(within > 0, clicks.offset[user] + within - 1, -1)
    multiple = np.where(last, LATE, LATE * ((within + 0.5) / length[user]) ** 2)
    skips = rng.geometric(1 / (1 + skips_per_click(twin) * multiple)) - 1
    # A copied click directly follows its original, without rows in between.
    skips[~last] *= ~clicks.copied
    return Slots(user, click, previous, skips)


def rows_of(twin: Twin, chunk: int, clicks: Clicks | None = None) -> dict[str, Any]:
    """Generate all rows of a chunk.

    Returns:
        Arrays by name: `user` (index in the chunk), `position` (the user's clicks before the row), `rank`, `click`,
        `watching_times` and the actions that the log has.
    """
    clicks = clicks or simulate(twin, chunk)
    rng = np.random.default_rng([twin.process.seed, chunk + 1, 2])
    slots = make_slots(twin, clicks, rng)
    slot = np.repeat(np.arange(len(slots.user)), slots.skips)
    conflict = (rng.random(len(slot)) < conflict_share(twin)) & (slots.previous[slot] >= 0)
    shown = draw_rank(rng.random(len(slot)), twin.process.items, UNCLICKED_STEEPNESS)
    shown = np.where(conflict, clicks.rank[slots.previous[slot]], shown)
    unclicked = _outcomes(twin, clicks.taste[slots.user[slot]], shown, None, rng)
    copies = 1 + (rng.random(len(slot)) < COPY_SHARE)
    slot, shown = np.repeat(slot, copies), np.repeat(shown, copies)
    original = np.maximum.accumulate(np.where(clicks.copied, 0, np.arange(len(clicks.rank))))
    clicked = _outcomes(twin, clicks.taste[clicks.user], clicks.rank, clicks.thread, rng)

    # A slot's unclicked rows come before its click.
    has_click = slots.click >= 0
    through = np.cumsum(np.bincount(slot, minlength=len(slots.user)) + has_click)
    at_click = through[has_click] - 1
    is_click = np.zeros(through[-1] if len(through) else 0, bool)
    is_click[at_click] = True
    owner = np.empty(len(is_click), np.int64)
    owner[at_click], owner[~is_click] = np.flatnonzero(has_click), slot
    rank = np.empty(len(is_click), np.int64)
    rank[at_click], rank[~is_click] = clicks.rank, shown
    user = slots.user[owner]
    table = {
        "user": user,
        "position": slots.previous[owner] + 1 - clicks.offset[user] * (slots.previous[owner] >= 0),
        "rank": rank,
        "click": is_click.astype(np.int8),
    }
    for name, values in clicked.items():
        table[name] = np.empty(len(is_click), values.dtype)
        table[name][at_click], table[name][~is_click] = values[original], np.repeat(unclicked[name], copies)
    return table


def _outcomes(
    twin: Twin, taste_N: IntArray, rank_N: IntArray, thread_N: Any | None, rng: np.random.Generator
) -> dict[str, Any]:
    """Draw the actions on rows that were clicked (`thread_N` given) or not, by column."""
    n = len(rank_N)
    times = 1 + rng.exponential(WATCHED_AGAIN, n).astype(np.int64)
    if thread_N is None:
        times *= rng.random(n) < ENTERED
    out: dict[str, Any] = {"watching_times": times}
    for task in actions(twin):
        out[task] = (rng.random(n) < chance_of(twin, task, rank_N, taste_N, thread_N)).astype(np.int8)
    return out


def chance_of(twin: Twin, task: str, rank_N: IntArray, taste_N: IntArray, thread_N: Any | None) -> FloatArray:
    """Probability of an action on rows, given all latent variables; `thread_N` is None for unclicked rows."""
    if thread_N is None and twin.unclicked(task) == 0:
        return np.zeros(len(rank_N))
    return np.asarray(1 / (1 + np.exp(-twin.process.logits(task, rank_N, taste_N, thread_N))))


def actions(twin: Twin) -> list[str]:
    """Feedback tasks of the log."""
    return [task for task in TASKS if PUBLISHED[twin.scenario].total(task)]
