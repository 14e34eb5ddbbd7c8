"""The process behind a twin: what is clicked next, and what follows a click. Arithmetic only.

Items are numbered by popularity rank 0..M-1; their category is `rank % CATEGORIES`. Successor lists,
item qualities and tastes' affinities are hashes, so nothing is stored for each item and any of it can
be worked out for any item.

A click is, with probability `COPY`, a copy of the last click (an exactly repeated row); else a draw from
    FOLLOW      a successor of the last click,
    FOLLOW_TWO  a successor of the click before it,
    TASTE       popularity inside a category that fits the user's hidden taste,
    GLOBAL      popularity over all items.
A first click is by taste or global popularity; a second one has no click before the last, and draws
from global popularity instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from etl.protocol import Array, Int

Float = npt.NDArray[np.float64]

COPY, FOLLOW, FOLLOW_TWO, TASTE, GLOBAL = range(5)
COPY_SHARE = 0.007
MIXTURE = {FOLLOW: 0.22, FOLLOW_TWO: 0.09, TASTE: 0.42, GLOBAL: 0.27}
SUCCESSOR_WEIGHTS = np.array([0.34, 0.24, 0.16, 0.12, 0.08, 0.06])
TASTES, CATEGORIES = 20, 40
FIT_OFFSETS, FIT_WEIGHTS = np.array([0, 1, 7, 20]), np.array([0.4, 0.3, 0.2, 0.1])
"""Taste z fits categories 2z + offset, with these shares."""
STEEPNESS = 3.0
"""Rank r has probability (r + 1)^(1/s) − r^(1/s) over M^(1/s): Zipf-like with exponent 1 − 1/s."""
SKIPPED_STEEPNESS = 2.0
TASKS = ("like", "share", "follow", "read", "favorite")
QUALITY, MATCH, THREAD = 0.9, 1.0, 0.6
"""Weights of item quality, taste × category affinity and following the thread in a task's logit."""


def hashed(value_N: Array, salt: int) -> Float:
    """Uniform numbers in [0, 1) from integers: the SplitMix64 finaliser (Steele et al. 2014)."""
    x = np.atleast_1d(value_N).astype(np.uint64) + np.uint64((salt * 0x9E3779B97F4A7C15) & 0xFFFF_FFFF_FFFF_FFFF)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform = ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
    return np.asarray(uniform.reshape(np.shape(value_N)), np.float64)


def normal(value_N: Array, salt: int) -> Float:
    """Roughly standard normal numbers from integers: four uniform ones, centred and scaled."""
    total: Float = np.sum([hashed(value_N, salt * 4 + i) for i in range(4)], axis=0)
    return np.asarray((total - 2.0) * np.sqrt(3.0), np.float64)


def draw_rank(uniform_N: Array, n: Any, steepness: float = STEEPNESS) -> Int:
    """Ranks 0..n-1 from uniform numbers."""
    return np.minimum((n * uniform_N**steepness).astype(np.int64), n - 1)


def rank_probability(rank_N: Array, n: Any, steepness: float = STEEPNESS) -> Float:
    """Probability of each rank under `draw_rank`."""
    return ((rank_N + 1) / n) ** (1 / steepness) - (rank_N / n) ** (1 / steepness)


def fits(taste_N: Array) -> Int:
    """The categories that fit tastes, `[N, 4]`."""
    return (2 * taste_N[:, None] + FIT_OFFSETS) % CATEGORIES


@dataclass(frozen=True)
class Process:
    """A process over `items` items.

    Attributes:
        items: M.
        task_correlation: 1 = all tasks share item quality and affinity, 0 = each has its own.
        seed: of every hash.
        intercepts: of the tasks' logits, in the order of `TASKS`.
    """

    items: int
    task_correlation: float
    seed: int
    intercepts: tuple[float, ...] = (0.0,) * len(TASKS)

    def category_size(self, category_N: Array) -> Int:
        """Items of each category."""
        return (self.items - category_N + CATEGORIES - 1) // CATEGORIES

    def successor(self, rank_N: Array, place_N: Array, order: int) -> Int:
        """Successor number `place_N` of items; `order` 1 or 2 chooses the list."""
        key = rank_N.astype(np.int64) * len(SUCCESSOR_WEIGHTS) + place_N
        return draw_rank(hashed(key, self.seed * 8 + order), self.items)

    def successors(self, rank_N: Array, order: int) -> Int:
        """All successors of items, `[N, 6]`."""
        places = np.arange(len(SUCCESSOR_WEIGHTS))
        return self.successor(np.asarray(rank_N)[:, None], places, order)

    def draw(self, rng: np.random.Generator, taste_N: Int, last_N: Int, before_N: Int) -> tuple[Int, Int]:
        """The next clicks of users, and which part of the mixture each came from.

        Args:
            rng: the generator.
            taste_N: hidden tastes.
            last_N: last clicks, -1 where there is none yet.
            before_N: clicks before these, -1 likewise.
        """
        choose, which, where = rng.random((3, len(taste_N)))
        bounds = np.cumsum([COPY_SHARE, *((1 - COPY_SHARE) * share for share in MIXTURE.values())])
        part = np.searchsorted(bounds[:-1], choose, side="right")
        part[(before_N < 0) & (part == FOLLOW_TWO)] = GLOBAL
        first = last_N < 0
        by_taste = MIXTURE[TASTE] / (MIXTURE[TASTE] + MIXTURE[GLOBAL])
        part[first] = np.where(choose[first] < by_taste, TASTE, GLOBAL)
        rank = np.where(part == COPY, last_N, 0)
        place = np.searchsorted(np.cumsum(SUCCESSOR_WEIGHTS)[:-1], which, side="right")
        for kind, source, order in ((FOLLOW, last_N, 1), (FOLLOW_TWO, before_N, 2)):
            at = np.flatnonzero(part == kind)
            rank[at] = self.successor(source[at], place[at], order)
        at = np.flatnonzero(part == TASTE)
        category = 2 * taste_N[at] + FIT_OFFSETS[np.searchsorted(np.cumsum(FIT_WEIGHTS)[:-1], which[at], side="right")]
        category %= CATEGORIES
        rank[at] = draw_rank(where[at], self.category_size(category)) * CATEGORIES + category
        at = np.flatnonzero(part == GLOBAL)
        rank[at] = draw_rank(where[at], self.items)
        return rank, part

    # -----------------------------------------------------------------------------------------
    # Probabilities

    def parts(self, item_NK: Int, last_N: Int, before_N: Int) -> tuple[Float, Float, Float]:
        """What the probability of candidates is made of, before the taste is weighed in.

        Args:
            item_NK: K candidates for each of N histories.
            last_N, before_N: their last two clicks, -1 where missing.

        Returns:
            `[N, K]` each: probability through copies and successors, through global popularity, and
            inside the candidate's category given that the taste part chose it.
        """
        thread = np.zeros(item_NK.shape)
        for share, source, order in ((MIXTURE[FOLLOW], last_N, 1), (MIXTURE[FOLLOW_TWO], before_N, 2)):
            lists = self.successors(np.maximum(source, 0), order)
            weight = (item_NK[:, :, None] == lists[:, None, :]) @ SUCCESSOR_WEIGHTS
            thread += (1 - COPY_SHARE) * share * weight * (source >= 0)[:, None]
        copies = COPY_SHARE * ((item_NK == last_N[:, None]) & (last_N >= 0)[:, None])
        broad, taste = self._shares(last_N, before_N)
        category = item_NK % CATEGORIES
        inside = rank_probability(item_NK // CATEGORIES, self.category_size(category))
        return thread + copies, broad[:, None] * rank_probability(item_NK, self.items), taste[:, None] * inside

    def _shares(self, last_N: Int, before_N: Int) -> tuple[Float, Float]:
        """Shares of global popularity and of taste."""
        taste, broad = MIXTURE[TASTE], MIXTURE[GLOBAL]
        later = (1 - COPY_SHARE) * (broad + np.where(before_N < 0, MIXTURE[FOLLOW_TWO], 0.0))
        first = last_N < 0
        return np.where(first, broad / (taste + broad), later), np.where(
            first, taste / (taste + broad), (1 - COPY_SHARE) * taste
        )

    def likelihood(self, item_N: Int, last_N: Int, before_N: Int) -> Float:
        """Probability of each click under each taste, `[N, TASTES]`."""
        thread, broad, inside = (part[:, 0] for part in self.parts(item_N[:, None], last_N, before_N))
        return (thread + broad)[:, None] + inside[:, None] * AFFINITY[:, item_N % CATEGORIES].T

    def next_distribution(self, history: Int) -> Float:
        """Exact probabilities of all items being clicked next, given a user's clicks so far `[M]`.

        Args:
            history: ranks of all clicks since the user's first, oldest first.
        """
        belief = np.full(TASTES, 1.0 / TASTES)
        padded = np.concatenate([[-1, -1], np.asarray(history, np.int64)])
        for t in range(2, len(padded)):
            belief *= self.likelihood(padded[[t]], padded[[t - 1]], padded[[t - 2]])[0]
            belief /= belief.sum()
        every = np.arange(self.items)[None]
        thread, broad, inside = self.parts(every, padded[[-1]], padded[[-2]])
        return np.asarray((thread + broad + inside * (belief @ AFFINITY)[every % CATEGORIES])[0])

    # -----------------------------------------------------------------------------------------
    # Feedback

    def logits(self, task: str, rank_N: Int, taste_N: Int, thread_N: Array) -> Float:
        """Logits of an action on a click, given the taste and whether the click followed the thread."""
        number = TASKS.index(task)
        share = self.task_correlation
        quality = np.sqrt(share) * normal(rank_N, self.seed * 100 + 10)
        quality = quality + np.sqrt(1 - share) * normal(rank_N, self.seed * 100 + 11 + number)
        pair = taste_N * CATEGORIES + rank_N % CATEGORIES
        affinity = np.sqrt(share) * normal(pair, self.seed * 100 + 30)
        affinity = affinity + np.sqrt(1 - share) * normal(pair, self.seed * 100 + 31 + number)
        return np.asarray(self.intercepts[number] + QUALITY * quality + MATCH * affinity + THREAD * thread_N)


def _affinity() -> Float:
    share = np.zeros((TASTES, CATEGORIES))
    for taste, categories in enumerate(fits(np.arange(TASTES))):
        np.add.at(share[taste], categories, FIT_WEIGHTS)
    return share


AFFINITY = _affinity()
"""Share of each category in each taste, `[TASTES, CATEGORIES]`."""
