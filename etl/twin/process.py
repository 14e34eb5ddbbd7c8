"""The generating process of a twin: next clicks and feedback (pure functions).

Items are numbered by popularity rank 0..M-1; their hidden topic is `rank % TOPICS`. Each topic is divided into
neighbourhoods of about `NEIGHBOURHOOD` items of all popularities. Successor lists, item qualities and taste
affinities are hashes, so nothing is stored per item and everything can be computed for any item.

A click is, with probability `COPY`, a copy of the last click (an exact duplicate row); else a draw from
    FOLLOW      successors of the last click,
    FOLLOW_TWO  successors of the click before it,
    TASTE       popularity within a topic that fits the user's hidden taste,
    GLOBAL      popularity over all items.
The successor of an item is, with probability `smoothness`, drawn by popularity from its neighbourhood (shared by
similar items, so embeddings can learn it), else one of its own six successors anywhere in the catalogue (which only
counting can learn). A first click is by taste or global popularity; a second one uses global popularity in place of
FOLLOW_TWO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from etl.runtime.arrays import AnyArray, FloatArray, IntArray

COPY, FOLLOW, FOLLOW_TWO, TASTE, GLOBAL = range(5)
COPY_SHARE = 0.002
"""Exact duplicates are 0.73 % of the published CTR file's rows: together with repeated clicks on popular items, this
share of copies gives as many in a log of QK-video's shape."""
MIXTURE = {FOLLOW: 0.22, FOLLOW_TWO: 0.09, TASTE: 0.42, GLOBAL: 0.27}
SUCCESSOR_WEIGHTS = np.array([0.34, 0.24, 0.16, 0.12, 0.08, 0.06])
TASTES, TOPICS = 20, 40
NEIGHBOURHOOD = 50
"""Items per neighbourhood, if a topic has as many."""
FIT_OFFSETS, FIT_WEIGHTS = np.array([0, 1, 7, 20]), np.array([0.4, 0.3, 0.2, 0.1])
"""Taste z fits topics 2z + offset, with these shares."""
STEEPNESS = 3.0
"""Rank r has probability (r + 1)^(1/s) − r^(1/s) over M^(1/s): Zipf-like with exponent 1 − 1/s."""
UNCLICKED_STEEPNESS = 2.0
"""The same for unclicked rows."""
TASKS = ("like", "share", "follow", "read", "favorite")
QUALITY, MATCH, THREAD = 0.9, 1.0, 0.6
"""Weights of item quality, taste × topic affinity and following the thread in a task's logit."""


def hashed(value_N: AnyArray, salt: int) -> FloatArray:
    """Uniform numbers in [0, 1) from integers: the SplitMix64 finaliser (Steele et al. 2014)."""
    x = np.atleast_1d(value_N).astype(np.uint64) + np.uint64((salt * 0x9E3779B97F4A7C15) & 0xFFFF_FFFF_FFFF_FFFF)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform = ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
    return np.asarray(uniform.reshape(np.shape(value_N)), np.float64)


def normal(value_N: AnyArray, salt: int) -> FloatArray:
    """Approximately standard normal numbers from integers: the sum of four uniform numbers, centred and scaled."""
    total: FloatArray = np.sum([hashed(value_N, salt * 4 + i) for i in range(4)], axis=0)
    return np.asarray((total - 2.0) * np.sqrt(3.0), np.float64)


def draw_rank(uniform_N: AnyArray, n: Any, steepness: float = STEEPNESS) -> IntArray:
    """Ranks 0..n-1 from uniform numbers."""
    return np.minimum((n * uniform_N**steepness).astype(np.int64), n - 1)


def rank_probability(rank_N: AnyArray, n: Any, steepness: float = STEEPNESS) -> FloatArray:
    """Probability of each rank under `draw_rank`."""
    return ((rank_N + 1) / n) ** (1 / steepness) - (rank_N / n) ** (1 / steepness)


def fits(taste_N: AnyArray) -> IntArray:
    """The topics that fit tastes, `[N, 4]`."""
    return (2 * taste_N[:, None] + FIT_OFFSETS) % TOPICS


@dataclass(frozen=True)
class Process:
    """A process over `items` items.

    Attributes:
        items: M.
        task_correlation: 1 = tasks share item quality and affinity, 0 = independent.
        seed: seed of every hash.
        smoothness: share of successors drawn from the item's neighbourhood.
        intercepts: intercepts of the tasks' logits on clicked rows, in the order of `TASKS`.
        unclicked_intercepts: the same on unclicked rows.
    """

    items: int
    task_correlation: float
    seed: int
    smoothness: float = 0.7
    intercepts: tuple[float, ...] = (0.0,) * len(TASKS)
    unclicked_intercepts: tuple[float, ...] = (0.0,) * len(TASKS)

    def topic_size(self, topic_N: AnyArray) -> IntArray:
        """Number of items of each topic."""
        return (self.items - topic_N + TOPICS - 1) // TOPICS

    @property
    def neighbourhoods(self) -> int:
        """Number of neighbourhoods per topic."""
        return max(1, self.items // (TOPICS * NEIGHBOURHOOD))

    def neighbourhood(self, rank_N: AnyArray) -> tuple[IntArray, IntArray]:
        """The most popular item of each item's neighbourhood, and the neighbourhood's size.

        Member `m` of the neighbourhood with first item `b` has rank `b + m * TOPICS * neighbourhoods`.
        """
        first = np.asarray(rank_N) % (TOPICS * self.neighbourhoods)
        size = (self.items - first - 1) // (TOPICS * self.neighbourhoods) + 1
        return first, size

    def near(self, rank_N: AnyArray, uniform_N: FloatArray) -> IntArray:
        """Draw items by popularity from the neighbourhoods of items."""
        first, size = self.neighbourhood(rank_N)
        return first + draw_rank(uniform_N, size) * TOPICS * self.neighbourhoods

    def near_probability(self, item_N: IntArray, source_N: IntArray) -> FloatArray:
        """Probability of items under `near` of `source_N`; both broadcast."""
        first, size = self.neighbourhood(source_N)
        period = TOPICS * self.neighbourhoods
        return np.where(item_N % period == first, rank_probability(item_N // period, size), 0.0)

    def successor(self, rank_N: AnyArray, place_N: AnyArray, order: int) -> IntArray:
        """Successor number `place_N` of items; `order` 1 or 2 selects the list."""
        key = rank_N.astype(np.int64) * len(SUCCESSOR_WEIGHTS) + place_N
        return draw_rank(hashed(key, self.seed * 8 + order), self.items)

    def successors(self, rank_N: AnyArray, order: int) -> IntArray:
        """All successors of items, `[N, 6]`."""
        places = np.arange(len(SUCCESSOR_WEIGHTS))
        return self.successor(np.asarray(rank_N)[:, None], places, order)

    def draw(
        self, rng: np.random.Generator, taste_N: IntArray, last_N: IntArray, before_N: IntArray
    ) -> tuple[IntArray, IntArray]:
        """Draw the next clicks of users; also returns the mixture component of each.

        Args:
            rng: the generator.
            taste_N: hidden tastes.
            last_N: last clicks, -1 = none.
            before_N: clicks before these, -1 = none.
        """
        choose, which, where, smooth = rng.random((4, len(taste_N)))
        bounds = np.cumsum([COPY_SHARE, *((1 - COPY_SHARE) * share for share in MIXTURE.values())])
        part = np.searchsorted(bounds[:-1], choose, side="right")
        part[(before_N < 0) & (part == FOLLOW_TWO)] = GLOBAL
        first = last_N < 0
        by_taste = MIXTURE[TASTE] / (MIXTURE[TASTE] + MIXTURE[GLOBAL])
        part[first] = np.where(choose[first] < by_taste, TASTE, GLOBAL)
        rank = np.where(part == COPY, last_N, 0)
        choice = np.searchsorted(np.cumsum(SUCCESSOR_WEIGHTS)[:-1], which, side="right")
        for kind, source, order in ((FOLLOW, last_N, 1), (FOLLOW_TWO, before_N, 2)):
            near = smooth < self.smoothness
            at = np.flatnonzero((part == kind) & ~near)
            rank[at] = self.successor(source[at], choice[at], order)
            at = np.flatnonzero((part == kind) & near)
            rank[at] = self.near(source[at], where[at])
        at = np.flatnonzero(part == TASTE)
        topic = 2 * taste_N[at] + FIT_OFFSETS[np.searchsorted(np.cumsum(FIT_WEIGHTS)[:-1], which[at], side="right")]
        topic %= TOPICS
        rank[at] = draw_rank(where[at], self.topic_size(topic)) * TOPICS + topic
        at = np.flatnonzero(part == GLOBAL)
        rank[at] = draw_rank(where[at], self.items)
        return rank, part

    # -----------------------------------------------------------------------------------------
    # Probabilities

    def components(
        self, item_NK: IntArray, last_N: IntArray, before_N: IntArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Components of the candidates' probabilities, not yet weighted by taste.

        Args:
            item_NK: K candidates for each of N histories.
            last_N, before_N: their last two clicks, -1 = none.

        Returns:
            `[N, K]` each: probability through copies and successors of the last two clicks, through global popularity,
            and within the candidate's topic given that the taste component selected it.
        """
        thread = np.zeros(item_NK.shape)
        for share, source, order in ((MIXTURE[FOLLOW], last_N, 1), (MIXTURE[FOLLOW_TWO], before_N, 2)):
            known = np.maximum(source, 0)
            lists = self.successors(known, order)
            weight = (1 - self.smoothness) * ((item_NK[:, :, None] == lists[:, None, :]) @ SUCCESSOR_WEIGHTS)
            weight = weight + self.smoothness * self.near_probability(item_NK, known[:, None])
            thread += (1 - COPY_SHARE) * share * weight * (source >= 0)[:, None]
        copies = COPY_SHARE * ((item_NK == last_N[:, None]) & (last_N >= 0)[:, None])
        broad, taste = self._shares(last_N, before_N)
        inside = rank_probability(item_NK // TOPICS, self.topic_size(item_NK % TOPICS))
        return thread + copies, broad[:, None] * rank_probability(item_NK, self.items), taste[:, None] * inside

    def _shares(self, last_N: IntArray, before_N: IntArray) -> tuple[FloatArray, FloatArray]:
        """Mixture shares of global popularity and of taste."""
        taste, broad = MIXTURE[TASTE], MIXTURE[GLOBAL]
        later = (1 - COPY_SHARE) * (broad + np.where(before_N < 0, MIXTURE[FOLLOW_TWO], 0.0))
        first = last_N < 0
        return np.where(first, broad / (taste + broad), later), np.where(
            first, taste / (taste + broad), (1 - COPY_SHARE) * taste
        )

    def likelihood(self, item_N: IntArray, last_N: IntArray, before_N: IntArray) -> FloatArray:
        """Probability of each click under each taste, `[N, TASTES]`."""
        thread, broad, inside = (part[:, 0] for part in self.components(item_N[:, None], last_N, before_N))
        return (thread + broad)[:, None] + inside[:, None] * AFFINITY[:, item_N % TOPICS].T

    def next_distribution(self, history: IntArray) -> FloatArray:
        """Exact next-click probabilities of all items given a user's clicks so far, `[M]`.

        Args:
            history: ranks of all clicks since the user's first, oldest first.
        """
        belief = np.full(TASTES, 1.0 / TASTES)
        padded = np.concatenate([[-1, -1], np.asarray(history, np.int64)])
        for t in range(2, len(padded)):
            belief *= self.likelihood(padded[[t]], padded[[t - 1]], padded[[t - 2]])[0]
            belief /= belief.sum()
        every = np.arange(self.items)[None]
        thread, broad, inside = self.components(every, padded[[-1]], padded[[-2]])
        return np.asarray((thread + broad + inside * (belief @ AFFINITY)[every % TOPICS])[0])

    # -----------------------------------------------------------------------------------------
    # Feedback

    def logits(self, task: str, rank_N: IntArray, taste_N: IntArray, thread_N: AnyArray | None) -> FloatArray:
        """Logits of an action on rows, given the taste.

        Args:
            task: the action.
            rank_N: items.
            taste_N: hidden tastes.
            thread_N: whether the click followed the last two clicks; None for unclicked rows.
        """
        number = TASKS.index(task)
        share = self.task_correlation
        quality = np.sqrt(share) * normal(rank_N, self.seed * 100 + 10)
        quality = quality + np.sqrt(1 - share) * normal(rank_N, self.seed * 100 + 11 + number)
        pair = taste_N * TOPICS + rank_N % TOPICS
        affinity = np.sqrt(share) * normal(pair, self.seed * 100 + 30)
        affinity = affinity + np.sqrt(1 - share) * normal(pair, self.seed * 100 + 31 + number)
        logit = QUALITY * quality + MATCH * affinity
        if thread_N is None:
            return np.asarray(self.unclicked_intercepts[number] + logit)
        return np.asarray(self.intercepts[number] + logit + THREAD * thread_N)


def _affinity() -> FloatArray:
    share = np.zeros((TASTES, TOPICS))
    for taste, topics in enumerate(fits(np.arange(TASTES))):
        np.add.at(share[taste], topics, FIT_WEIGHTS)
    return share


AFFINITY = _affinity()
"""Share of each topic in each taste, `[TASTES, TOPICS]`."""
